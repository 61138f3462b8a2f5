"""The predicted peak of a UNet's step is the measured one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from slicemod import SliceConfig, swap_attention
from slicemod.bench.memory import peak_memory
from slicemod.planning.step_peaks import WAYS, StepPlanner, Way
from slicemod.planning.unet_step import StepKind, trace_step
from slicemod.planning.unets import NAMED_UNETS, UnetSource, find_unet, meta_inputs, meta_unet
from tests.planning.test_cpu_temporaries import tile_scratch
from tests.processors import MULTIPLIES_BFLOAT16

SMALL = UnetSource(
    {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    latent_pixels=8,
    context_tokens=77,
)
SLICING = SliceConfig(budget=4 * 2**20, policy="exact", kernel="math")
WIDE = SMALL._replace(config={**SMALL.config, "block_out_channels": (64, 256)})


def unet_step(unet: Any, kind: StepKind, source: UnetSource, pixels: int) -> Callable[[], None]:
    """One step on the CPU, of the weights that `unet` has."""
    edge = pixels // source.latent_pixels
    inputs = meta_inputs(unet, kind.dtype, kind.batch, edge, source.context_tokens)
    inputs = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in inputs.items()}
    target = torch.zeros_like(inputs["sample"])
    optimizer = torch.optim.AdamW(unet.parameters())

    def infer() -> None:
        with torch.no_grad():
            unet(**inputs)

    def train() -> None:
        torch.autograd.backward(F.mse_loss(unet(**inputs).sample, target))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train if kind.training else infer


def _predicted_and_measured(
    unet: Any, source: UnetSource, kind: StepKind, pixels: int, slicing: SliceConfig
) -> dict[Way, tuple[int, int]]:
    """Peaks beyond weights and optimizer state; slicemod's attention gets the budget of `slicing`."""
    ample = StepPlanner(source, kind, 2**40, slicing)
    memory = 2**40 - ample.plan(pixels).budget + int(slicing.budget)
    peaks = StepPlanner(source, kind, memory, slicing).plan(pixels).peaks
    step = unet_step(unet, kind, source, pixels)
    use: dict[Way, Callable[[], object]] = {
        "full attention": lambda: unet.set_attn_processor(AttnProcessor()),
        "fused": lambda: unet.set_attn_processor(AttnProcessor2_0()),
        "slicemod": lambda: swap_attention(unet, slicing),
    }
    if kind.training:
        step()  # makes the optimizer's state
    found = {}
    for way in WAYS:
        use[way]()
        peak = peaks[way]
        found[way] = (peak.total - peak.weights - peak.optimizer, peak_memory(step))
    return found


@pytest.mark.parametrize(
    ("source", "kind", "pixels"),
    [
        (SMALL, StepKind(torch.float32, 1, "cpu"), 256),
        (WIDE, StepKind(torch.float32, 1, "cpu"), 128),
        (WIDE, StepKind(torch.bfloat16, 2, "cpu"), 64),
        pytest.param(SMALL, StepKind(torch.float32, 2, "cpu", training=True), 128, marks=pytest.mark.slow),
        pytest.param(SMALL, StepKind(torch.bfloat16, 1, "cpu", training=True), 192, marks=pytest.mark.slow),
        pytest.param(
            SMALL,
            StepKind(torch.float32, 1, "cpu", training=True, checkpoint_blocks=True),
            256,
            marks=pytest.mark.slow,
        ),
        pytest.param(WIDE, StepKind(torch.float32, 2, "cpu", training=True), 64, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, StepKind) else None,
)
def test_the_predicted_peak_is_the_measured_one(source: UnetSource, kind: StepKind, pixels: int) -> None:
    unet = UNet2DConditionModel(**source.config)
    torch.nn.Module.to(unet, kind.dtype).train(kind.training)
    if kind.checkpoint_blocks:
        unet.enable_gradient_checkpointing()
    scratch = tile_scratch(kind.dtype) // 8  # these convolutions are small
    for way, (predicted, measured) in _predicted_and_measured(unet, source, kind, pixels, SLICING).items():
        assert predicted == pytest.approx(measured, rel=0.02, abs=scratch), way


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_kept_weights_are_counted_of_all_layers_at_once(dtype: torch.dtype) -> None:
    unet, kind = UNet2DConditionModel(**SMALL.config), StepKind(dtype, 1, "cpu", training=True)
    torch.nn.Module.to(unet, dtype).train()
    keeps = replace(SLICING, checkpoint=False)
    predicted, measured = _predicted_and_measured(unet, SMALL, kind, 128, keeps)["slicemod"]
    print(f"{dtype}: predicted {predicted:,}, measured {measured:,}, {predicted / measured:.4f}")
    assert predicted == pytest.approx(measured, rel=0.02, abs=tile_scratch(dtype) // 8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=MULTIPLIES_BFLOAT16)], ids=str)
def test_the_predicted_peak_of_sd15_is_the_measured_one(dtype: torch.dtype) -> None:
    source, kind = find_unet("sd15"), StepKind(dtype, 1, "cpu")
    unet = meta_unet(source, dtype).to_empty(device="cpu").eval()
    for tensor in unet.parameters():
        torch.nn.init.normal_(tensor, std=0.02)
    for way, (predicted, measured) in _predicted_and_measured(
        unet, source, kind, 512, replace(SLICING, budget=64 * 2**20)
    ).items():
        print(f"{way}, {dtype}: predicted {predicted:,}, measured {measured:,}, {predicted / measured:.4f}")
        scratch = 4 * tile_scratch(dtype)  # of the wide convolutions that halve the image
        assert predicted == pytest.approx(measured, rel=0.02, abs=scratch), way


def test_sd15_has_the_attention_layers_of_its_paper() -> None:
    calls = trace_step(find_unet("sd15"), StepKind(torch.float16, 2, "cuda"), 512).calls
    own = [call.shape for call in calls if call.shape.queries == call.shape.keys]
    counted = {(shape.queries, shape.head_dim): own.count(shape) for shape in own}
    assert counted == {(4096, 40): 5, (1024, 80): 5, (256, 160): 5, (64, 160): 1}
    assert all(call.shape.heads == 8 and call.shape.batch == 2 for call in calls)
    assert {call.shape.keys for call in calls} - {shape.keys for shape in own} == {77}


@pytest.mark.parametrize(
    ("model", "parameters"), [("sd15", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684)]
)
def test_named_unets_have_the_parameters_that_were_published(model: str, parameters: int) -> None:
    assert set(NAMED_UNETS) == {"sd15", "sd15-top", "sd21", "sdxl"}
    assert sum(tensor.numel() for tensor in meta_unet(find_unet(model), torch.float16).parameters()) == parameters


def test_a_step_is_traced_without_its_memory() -> None:
    kind = StepKind(torch.float32, 2, "cpu", training=True)
    assert peak_memory(lambda: trace_step(SMALL, kind, 1024)) < 2**20


def test_adamw_holds_what_training_counts() -> None:
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in (1021, 211, 307)]

    def step(*, foreach: bool) -> int:
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer = torch.optim.AdamW(weights, foreach=foreach)
        optimizer.step()
        return peak_memory(optimizer.step)

    assert step(foreach=False) == pytest.approx(2 * 1021 * 4, rel=0.05)  # on a CPU: two of the largest
    assert step(foreach=True) == pytest.approx((1021 + 211 + 307) * 4, rel=0.05)  # on an accelerator: one of all


def test_checkpointed_blocks_are_computed_twice_and_hold_less() -> None:
    plain = StepKind(torch.float16, 1, "cuda", training=True)
    kept, computed = (trace_step(SMALL, kind, 512) for kind in (plain, plain._replace(checkpoint_blocks=True)))
    assert kept.layers == computed.layers == len(kept.calls)
    assert len(computed.calls) == 2 * computed.layers
    nothing = [(0, 0)] * len(computed.calls)
    assert computed.timeline.peak(nothing).activations < 0.6 * kept.timeline.peak(nothing[: kept.layers]).activations  # type: ignore[arg-type]
