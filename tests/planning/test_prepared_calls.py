"""The predicted peak of a prepared model's step is the measured one, and never below it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import Attention
from torch import nn

from slicemod import SliceConfig, prepare_for_cpu, swap_attention
from slicemod.bench.memory import peak_memory
from slicemod.call import AttentionShape, CallSpec
from slicemod.choose import choose
from slicemod.half_precision import cpu_products
from slicemod.on_cpu.widened import WidenedLinear
from slicemod.planning.kept_in_float32 import in_dtype
from slicemod.planning.layer_calls import LayerCall
from slicemod.planning.step_peaks import StepPlanner
from slicemod.planning.step_source import StepSource
from slicemod.planning.transformers import TransformerSource
from slicemod.planning.unet_step import StepKind, trace_step
from slicemod.planning.unets import UnetSource, find_unet, meta_unet
from slicemod.torch_internals import has_onednn
from tests.planning.test_transformers import SMALL as SMALL_TRANSFORMERS
from tests.planning.test_unet_step import SMALL, unet_step

pytestmark = pytest.mark.skipif(not has_onednn, reason="PyTorch has no oneDNN here")

BUDGET = 2**23
# Where the CPU multiplies neither half precision, both are computed in the same way.
ALIKE = pytest.mark.slow if cpu_products(torch.bfloat16) is None else ()
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=ALIKE), torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    if chosen == torch.float16 and cpu_products(chosen) is not None:
        pytest.skip("float16 that the CPU multiplies stays as it is")
    return chosen


def unet_of(*channels: int, **more: Any) -> UnetSource:
    return SMALL._replace(config={**SMALL.config, "block_out_channels": channels, **more})


def predicted(source: StepSource, kind: StepKind, pixels: int, budget: int, *, swapped: bool) -> int:
    """The peak beyond the weights, with slicemod's attention within a budget."""
    ample = StepPlanner(source, kind, 2**40, SliceConfig(), swapped=swapped)
    peak = ample.within(2**40 - ample.plan(pixels).budget + budget).plan(pixels).peaks["slicemod"]
    return peak.total - peak.weights


def measured(unet: Any, source: UnetSource, kind: StepKind, pixels: int, budget: int, *, swapped: bool) -> int:
    swap_attention(unet, {"budget": budget}, feed_forward=swapped)
    prepare_for_cpu(unet)
    return peak_memory(unet_step(unet, kind, source, pixels))


def assert_is_the_measured(plan: int, found: int, dtype: torch.dtype) -> None:
    print(f"{dtype}: predicted {plan:,}, measured {found:,}, {plan / found:.4f}")
    assert plan >= found - 64  # for a few numbers PyTorch makes tensors
    if dtype != torch.bfloat16 or cpu_products(dtype) is None:  # packed weights are planned as plain ones
        assert plan <= 1.03 * found


@pytest.mark.parametrize(
    ("source", "batch", "pixels", "swapped"),
    [
        pytest.param(unet_of(64, 256), 2, 64, True, id="small images"),
        pytest.param(unet_of(64, 128), 1, 512, True, id="4096 tokens"),
        pytest.param(unet_of(64, 128), 1, 512, False, id="4096 tokens, attention alone", marks=pytest.mark.slow),
        pytest.param(unet_of(320, 640, use_linear_projection=True), 1, 128, True, id="wide", marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_of_a_unet_is_the_measured_one(
    source: UnetSource, batch: int, pixels: int, swapped: bool, dtype: torch.dtype
) -> None:
    kind = StepKind(dtype, batch, "cpu", prepared=True)
    plan = predicted(source, kind, pixels, BUDGET, swapped=swapped)
    unet = nn.Module.to(UNet2DConditionModel(**source.config), dtype).eval()
    assert_is_the_measured(plan, measured(unet, source, kind, pixels, BUDGET, swapped=swapped), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], indirect=True, ids=str)
def test_the_predicted_peak_of_sd15_is_the_measured_one(dtype: torch.dtype) -> None:
    source, kind, budget = find_unet("sd15"), StepKind(dtype, 1, "cpu", prepared=True), 2**29
    unet = meta_unet(source, dtype).to_empty(device="cpu").eval()
    for tensor in unet.parameters():
        nn.init.normal_(tensor, std=0.02)
    plan = predicted(source, kind, 512, budget, swapped=True)
    assert_is_the_measured(plan, measured(unet, source, kind, 512, budget, swapped=True), dtype)


def test_a_step_at_any_resolution_is_the_one_traced_there(dtype: torch.dtype) -> None:
    source, kind = unet_of(64, 256), StepKind(dtype, 1, "cpu", prepared=True)
    planner = StepPlanner(source, kind, 2**30, SliceConfig())
    for pixels in (112, 176, 192, 512, 1008):  # images of 256 channels are small up to 176 pixels
        found, traced = planner.at(pixels)[0], trace_step(source, kind, pixels)
        assert traced.prepared
        for rows in ("activations", "temporaries"):
            assert torch.equal(getattr(found, rows), getattr(traced.timeline, rows))


def test_a_prepared_step_takes_what_its_modules_say_and_a_plain_one_does_not() -> None:
    source = unet_of(320, 640)
    plain, prepared = (
        predicted(source, StepKind(torch.float32, 1, "cpu", prepared=prepared), 128, BUDGET, swapped=True)
        for prepared in (False, True)
    )
    assert prepared < 0.9 * plain


@pytest.mark.skipif(cpu_products(torch.float16) is not None, reason="this CPU multiplies float16")
@pytest.mark.parametrize("class_name", ["PixArtTransformer2DModel", "SD3Transformer2DModel"])
def test_the_predicted_peak_of_a_transformer_is_the_measured_one(class_name: str) -> None:
    import diffusers

    source = TransformerSource(class_name, SMALL_TRANSFORMERS[class_name])
    kind = StepKind(torch.float16, 2, "cpu", prepared=True)
    plan, plain = (
        StepPlanner(source, of, 2**40, SliceConfig()).plan(384).peaks["fused"]
        for of in (kind, kind._replace(prepared=False))
    )
    model: Any = in_dtype(getattr(diffusers, class_name)(**source.config).eval(), kind.dtype)
    given = source.inputs(model, kind.dtype, kind.batch, 384)
    inputs = {
        name: torch.ones_like(part, device="cpu") if isinstance(part, torch.Tensor) else part
        for name, part in given.items()
    }
    prepare_for_cpu(model)
    with torch.no_grad():
        found = peak_memory(lambda: model(**inputs))
    assert_is_the_measured(plan.total - plan.weights, found, kind.dtype)
    assert plan.total >= plain.total  # what is widened is not counted in a plain plan


def test_a_model_that_is_fastest_as_it_is_has_the_plan_of_a_plain_one() -> None:
    source = TransformerSource("FluxTransformer2DModel", SMALL_TRANSFORMERS["FluxTransformer2DModel"])
    plain, prepared = (
        StepPlanner(source, StepKind(torch.float32, 1, "cpu", prepared=prepared), 2**40, SliceConfig()).plan(256).peaks
        for prepared in (False, True)
    )
    assert prepared == plain


@pytest.mark.parametrize("keys", [None, 77])
@pytest.mark.parametrize("budget", [2**20, 2**24])
def test_a_layer_of_widened_projections_takes_what_its_call_says(keys: int | None, budget: int) -> None:
    layer: Any = Attention(320, None if keys is None else 131, heads=5, dim_head=64).to(torch.bfloat16)
    swap_attention(nn.Sequential(layer), {"budget": budget})
    for module in (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]):
        module.__class__ = WidenedLinear
    x = torch.randn(2, 4096, 320, dtype=torch.bfloat16)
    context = None if keys is None else torch.randn(2, keys, 131, dtype=torch.bfloat16)
    with torch.no_grad():
        found = peak_memory(lambda: layer(x, context))
    shape = AttentionShape(2, 5, 4096, keys or 4096, 64, 2, upcast=True)
    scratch = max(module.scratch_bytes() for module in (layer.to_q, layer.to_k, layer.to_out[0]))
    call = LayerCall(CallSpec.planned(shape, "cpu", torch.bfloat16), 320, in_parts=False, scratch=scratch)
    assert call.attention == call.call  # it is computed as a whole
    plan = choose(call.call, SliceConfig(budget=budget), budget)
    said = call.working(plan.peak_bytes)
    print(f"{keys} {budget}: said {said:,}, measured {found:,}, {said / found:.4f}")
    assert found <= said <= 1.1 * found
