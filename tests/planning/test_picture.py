"""The predicted peaks of the parts, and of a whole pipeline, are the measured ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderKLWan, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import slicemod
from slicemod import AttentionShape, SliceConfig, swap_attention, swap_vae
from slicemod.bench.memory import peak_memory
from slicemod.call import CallSpec
from slicemod.planning.autoencoders import AutoencoderSource
from slicemod.planning.layer_calls import LayerCall
from slicemod.planning.picture import Budgets, plan_picture
from slicemod.planning.picture_kind import PictureKind
from slicemod.planning.picture_model import find_picture_model
from slicemod.planning.picture_parts import TracedPart, parts_of
from slicemod.planning.prompt_encoders import KNOWN, PromptEncoderSource
from slicemod.planning.step_peaks import StepPlanner
from slicemod.planning.step_source import StepSource
from slicemod.planning.unet_step import StepKind
from slicemod.planning.unets import UnetSource, find_unet
from slicemod.user_error import UserError
from tests.planning.test_unet_step import SMALL, unet_step
from tests.training.tiny_stable_diffusion import write_text_encoder

KL = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 8,
}
WAN = {"base_dim": 64, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
FLOAT32 = StepKind(torch.float32, 1, "cpu")


def _predicted(source: StepSource, kind: StepKind, pixels: int) -> int:
    """The peak beyond weights and inputs, with PyTorch's fused attention."""
    peak = StepPlanner(source, kind, 2**40, SliceConfig()).plan(pixels).peaks["fused"]
    return peak.total - peak.weights


def _measured(source: StepSource, model: Any, kind: StepKind, pixels: int) -> int:
    given = source.inputs(model, kind.dtype, kind.batch, pixels)
    inputs = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in given.items()}
    with torch.no_grad():
        return peak_memory(lambda: source.run(model, inputs))


@pytest.mark.parametrize("encodes", [False, True], ids=["decoding", "encoding"])
@pytest.mark.parametrize("pixels", [256, pytest.param(512, marks=pytest.mark.slow)])
def test_the_predicted_peak_of_an_autoencoder_is_the_measured_one(pixels: int, encodes: bool) -> None:
    source, model = AutoencoderSource("AutoencoderKL", KL, encodes=encodes), AutoencoderKL(**KL)
    predicted, measured = _predicted(source, FLOAT32, pixels), _measured(source, model, FLOAT32, pixels)
    print(f"{pixels} {encodes=}: predicted {predicted:,}, measured {measured:,}")
    assert predicted == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("pixels", "share"),
    [(256, 0.5), pytest.param(512, 1.0, marks=pytest.mark.slow), pytest.param(512, 0.5, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("encodes", [False, True], ids=["decoding", "encoding"])
def test_the_predicted_peak_of_a_swapped_autoencoder_is_the_measured_one(
    pixels: int, share: float, encodes: bool
) -> None:
    source, model = AutoencoderSource("AutoencoderKL", KL, encodes=encodes), AutoencoderKL(**KL)
    ample = StepPlanner(source, FLOAT32, 2**40, SliceConfig(), swapped=True)
    whole = ample.plan(pixels).peaks["fused"].total
    plan = ample.within(int(share * whole)).plan(pixels)
    swap_vae(model, plan.budget)
    predicted, measured = plan.peaks["slicemod"], _measured(source, model, FLOAT32, pixels)
    print(f"{pixels} {share} {encodes=}: predicted {predicted.total - predicted.weights:,}, measured {measured:,}")
    assert predicted.total <= share * whole
    assert predicted.total - predicted.weights == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("budget", [2**23, 2**33])
def test_the_predicted_peak_of_a_swapped_unet_is_the_measured_one(budget: int) -> None:
    config = {**SMALL.config, "block_out_channels": (64, 128)}
    source, unet = SMALL._replace(config=config), UNet2DConditionModel(**config)
    ample = StepPlanner(source, FLOAT32, 2**40, SliceConfig(), swapped=True)
    plan = ample.within(2**40 - ample.plan(512).budget + budget).plan(512)
    assert plan.budget == budget
    swap_attention(unet, {"budget": budget}, feed_forward=True)
    predicted, measured = plan.peaks["slicemod"], _measured(source, unet, FLOAT32, 512)
    print(f"{budget}: predicted {predicted.total - predicted.weights:,}, measured {measured:,}")
    assert predicted.total - predicted.weights == pytest.approx(measured, rel=0.02)
    assert predicted.total <= plan.peaks["fused"].total


TINY = SMALL._replace(config={**SMALL.config, "block_out_channels": (64, 128)})
LAYERS = {"checkpoint": "layer"}
slow = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "pixels", "checkpoint_blocks", "feed_forward", "slicing"),
    [
        pytest.param(TINY, 256, False, True, {}, id="feed-forwards"),
        pytest.param(TINY, 256, False, False, LAYERS, id="layers"),
        pytest.param(TINY, 256, False, True, LAYERS, id="both"),
        pytest.param(TINY, 256, True, True, LAYERS, id="both and blocks", marks=slow),
        pytest.param(find_unet("sd15-top"), 256, False, True, LAYERS, id="two levels of SD1.5", marks=slow),
    ],
)
def test_the_predicted_peak_of_training_a_swapped_unet_is_the_measured_one(
    source: UnetSource, pixels: int, checkpoint_blocks: bool, feed_forward: bool, slicing: dict[str, Any]
) -> None:
    budget = 2**22 if source is TINY else 2**25
    kind = StepKind(
        torch.float32, 1 if source is TINY else 2, "cpu", training=True, checkpoint_blocks=checkpoint_blocks
    )
    ample = StepPlanner(source, kind, 2**40, SliceConfig(**slicing), swapped=feed_forward)
    plan = ample.within(2**40 - ample.plan(pixels).budget + budget).plan(pixels)
    predicted, fused = (plan.peaks[way].total - ample.weights - ample.optimizer for way in ("slicemod", "fused"))
    unet = UNet2DConditionModel(**source.config).train()
    if checkpoint_blocks:
        unet.enable_gradient_checkpointing()
    swap_attention(unet, {"budget": budget, **slicing}, feed_forward=feed_forward)
    step = unet_step(unet, kind, source, pixels)
    step()  # makes the optimizer's state
    measured = peak_memory(step)
    print(f"{pixels} {feed_forward=} {slicing}: predicted {predicted:,}, measured {measured:,}, unswapped {fused:,}")
    assert predicted == pytest.approx(measured, rel=0.1)
    assert predicted < fused


def test_a_layer_in_parts_takes_less_than_one_as_a_whole() -> None:
    shape = AttentionShape(2, 8, 4096, 4096, 40, 4)
    whole = LayerCall(CallSpec.planned(shape.with_queries(4095), "cpu"), 320, in_parts=False)
    parts = LayerCall(CallSpec.planned(shape, "cpu"), 320, in_parts=True)
    assert (whole.attention, parts.attention and parts.attention.shape.queries) == (whole.call, 2048)
    assert replace(whole, in_parts=True).attention is replace(parts, in_parts=False).attention is None
    tokens = 4096 * 320 * 4  # bytes of (N, C) of one item
    assert whole.held == pytest.approx(2 * 4 * tokens, rel=0.001)  # of both items: query, key, value and their output
    assert parts.held == 2 * tokens // 2 + 2 * tokens // 4  # of half of the heads: key and value, and half of the rows


@pytest.mark.slow
def test_the_predicted_peak_of_sd15s_autoencoder_is_the_measured_one() -> None:
    source = slicemod_autoencoder()
    model = source.model(torch.float32).to_empty(device="cpu")
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.02)
    for pixels in (192, 384):
        predicted, measured = _predicted(source, FLOAT32, pixels), _measured(source, model, FLOAT32, pixels)
        print(f"{pixels}: predicted {predicted:,}, measured {measured:,}")
        assert predicted == pytest.approx(measured, rel=0.02)


def slicemod_autoencoder() -> AutoencoderSource:
    return find_picture_model("sd15").autoencoder


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "pixels"), [pytest.param(1, 384, marks=pytest.mark.slow), (5, 192)])
def test_the_predicted_peak_of_a_videos_decoding_is_the_measured_one(frames: int, pixels: int) -> None:
    source, model = AutoencoderSource("AutoencoderKLWan", WAN, frames), AutoencoderKLWan(**WAN)
    predicted, measured = _predicted(source, FLOAT32, pixels), _measured(source, model, FLOAT32, pixels)
    print(f"{frames} frames: predicted {predicted:,}, measured {measured:,}")
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
def test_a_longer_video_adds_its_finished_frames() -> None:
    source, model = AutoencoderSource("AutoencoderKLWan", WAN, 17), AutoencoderKLWan(**WAN)
    planner = StepPlanner(source, FLOAT32, 2**40, SliceConfig())
    peak = planner.plan(128).peaks["fused"]
    predicted = peak.total - peak.weights + planner.inputs(128)
    latents = torch.zeros(1, 16, 5, 16, 16)
    with torch.no_grad():
        measured = peak_memory(lambda: model.decode(latents)) + latents.nbytes
    print(f"predicted {predicted:,}, measured {measured:,}")
    assert predicted == pytest.approx(measured, rel=0.1)


ENCODERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "CLIPTextModel": (
        lambda: transformers.CLIPTextModel,
        {"hidden_size": 120, "intermediate_size": 480, "num_hidden_layers": 3, "num_attention_heads": 5},
    ),
    "T5EncoderModel": (
        lambda: transformers.T5EncoderModel,
        {"d_model": 120, "d_ff": 480, "d_kv": 24, "num_heads": 5, "num_layers": 3, "feed_forward_proj": "gated-gelu"},
    ),
    "UMT5EncoderModel": (
        lambda: transformers.UMT5EncoderModel,
        {"d_model": 120, "d_ff": 480, "d_kv": 24, "num_heads": 5, "num_layers": 3, "vocab_size": 1009},
    ),
}


@pytest.mark.parametrize("class_name", ENCODERS)
def test_the_predicted_peak_of_a_text_encoder_is_the_measured_one(class_name: str) -> None:
    build, config = ENCODERS[class_name]
    source = PromptEncoderSource(class_name, config, 77)
    model = build()(build().config_class(**config)).eval()
    predicted, measured = _predicted(source, FLOAT32, 8), _measured(source, model, FLOAT32, 8)
    print(f"{class_name}: predicted {predicted:,}, measured {measured:,}")
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=slow)], ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_the_table_of_text_encoders_has_what_a_trace_finds(name: str, dtype: torch.dtype) -> None:
    encoder = KNOWN[name]
    peak = StepPlanner(encoder.source, StepKind(dtype, 1, "cuda"), 2**60, SliceConfig()).plan(8).peaks["fused"]
    assert peak.weights == encoder.peak(dtype).weights
    assert encoder.peak(dtype).activations == pytest.approx(peak.total - peak.weights, rel=0.1)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small pipeline of Stable Diffusion's classes."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_text_encoder(folder, "", 24, projected=False, length=77)
    StableDiffusionPipeline(
        vae=AutoencoderKL(**KL, sample_size=256),
        text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel(**SMALL.config),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def test_the_predicted_peak_of_a_whole_pipeline_is_the_measured_one(pipeline: Path) -> None:
    plan = plan_picture(str(pipeline), 256, 2**40, {"device": "cpu", "dtype": "float32"})
    pipe: Any = StableDiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    parts = [pipe.text_encoder, pipe.unet, pipe.vae]
    weights = sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers()))
    measured = peak_memory(lambda: pipe("a cat", height=256, width=256, num_inference_steps=2, output_type="pt"))
    predicted = plan.whole.peak("fused")
    assert predicted is not None
    print(f"pipeline: predicted {predicted - weights:,}, measured {measured:,}, limit {plan.whole.limit('fused')}")
    assert predicted - weights == pytest.approx(measured, rel=0.1)
    by_part = {part.name: part for part in plan.whole.parts}
    assert list(by_part) == ["text encoder", "UNet, a step", "VAE decoding"]
    assert all(part.weights + part.stays_loaded == pytest.approx(weights, rel=1e-3) for part in plan.whole.parts)


def test_with_model_offload_a_part_is_alone_and_with_sequential_a_layer_is(pipeline: Path) -> None:
    kind = {"device": "cpu", "dtype": "float32"}
    wholes = {
        offload: plan_picture(str(pipeline), 256, 2**30, kind | {"offload": offload}).whole
        for offload in ("none", "model", "sequential")
    }
    none, model, sequential = wholes["none"].parts, wholes["model"].parts, wholes["sequential"].parts
    everything = sum(part.weights for part in none)
    assert [part.weights + part.stays_loaded for part in none] == [everything] * 3
    assert [part.stays_loaded for part in (*model, *sequential)] == [0] * 6
    assert [part.weights for part in model] == [part.weights for part in none]
    for whole, layer in zip(model, sequential, strict=True):
        assert layer.total("fused") < whole.total("fused")  # type: ignore[operator]
        assert layer.weights < whole.weights / 4


def test_layers_are_streamed_that_accelerate_streams(pipeline: Path) -> None:
    from accelerate import cpu_offload

    unet = UNet2DConditionModel(**SMALL.config)
    own = {name for name, part in unet.named_modules() if next(part.parameters(recurse=False), None) is not None}
    cpu_offload(unet, "cpu", offload_buffers=False)
    assert {name for name, part in unet.named_modules() if getattr(part, "_hf_hook", None) is not None} - {""} == own


def test_uncached_training_keeps_the_other_parts_and_cached_training_does_not(pipeline: Path) -> None:
    kind = {"device": "cpu", "dtype": "float32", "train": True}
    cached, uncached = (
        plan_picture(str(pipeline), 256, 2**30, kind | {"cached": cached}).whole.parts for cached in (True, False)
    )
    assert [part.name for part in cached] == ["text encoder", "VAE encoding", "UNet, training"]
    assert [part.stays_loaded for part in cached] == [0, 0, 0]
    text, vae, unet = uncached
    assert unet.stays_loaded == text.weights + vae.weights
    assert vae.stays_loaded == text.weights + unet.weights  # the UNet's with the state of its optimizer
    assert [part.peaks for part in cached] == [part.peaks for part in uncached]


def test_the_part_that_a_larger_image_does_not_fit_is_the_limit(pipeline: Path) -> None:
    kind = {"device": "cpu", "dtype": "float32"}
    plan = plan_picture(str(pipeline), 256, 64 * 2**20, kind)
    fused = {found.way: found for found in plan.largest}["fused"]
    assert fused.pixels % 8 == 0 < fused.pixels
    fits, above = (
        plan_picture(str(pipeline), pixels, 64 * 2**20, kind).whole for pixels in (fused.pixels, fused.pixels + 16)
    )
    assert fits.fits("fused")
    assert not above.fits("fused")
    assert above.limit("fused") == fused.limit == "VAE decoding"


@pytest.mark.slow
def test_weights_that_do_not_fit_are_the_limit() -> None:
    plan = plan_picture("flux-dev", 1024, "8GiB")
    assert {(found.pixels, found.limit) for found in plan.largest} == {(0, "the weights, 31.42 GiB together")}
    assert plan.budgets is None


def test_with_the_budgets_of_the_plan_the_parts_fit(pipeline: Path) -> None:
    memory = 96 * 2**20
    plan = plan_picture(str(pipeline), 256, memory, {"device": "cpu", "dtype": "float32"})
    assert isinstance(plan.budgets, Budgets)
    assert 0 < plan.budgets.vae < memory
    assert 0 < plan.budgets.attention < memory
    assert "largest image, slicemod" in str(plan)


def test_plan_picture_is_a_public_name_that_loads_diffusers_when_it_is_asked_for() -> None:
    assert slicemod.plan_picture is plan_picture


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ({"device": "tpu"}, "^device: expected one of cuda, mps, cpu; got 'tpu'"),
        ({"offload": "disk"}, "^offload: expected one of none, model, sequential; got 'disk'"),
        ({"offload": "model", "train": True}, "^offload: expected none with train"),
        ({"feed_forward": True}, "^feed_forward: expected together with train"),
        ({"cached": False}, "^cached: expected to be changed together with train"),
        ({"batch": 0}, "^batch: expected 1 or more"),
        ({"colour": 1}, "kind: expected fields of dtype, .*; got colour"),
    ],
)
def test_values_that_are_not_known_are_named(kind: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        plan_picture("sd15", 512, "8GiB", kind)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"resolution": 500}, r"^resolution: expected multiples of 64 .*; got 500\. Take 512\."),
        ({"memory": "lots"}, "^memory: .*got 'lots'"),
        ({"frames": 5}, "^frames: expected 1, since a UNet makes images; got 5"),
        (
            {"slicing": {"kernel": "native"}},
            '^kernel: expected .*the call is on cuda. Take kernel="auto" or kernel="math"',
        ),
    ],
)
def test_a_functions_errors_name_its_own_arguments(given: dict[str, Any], named: str) -> None:
    call: dict[str, Any] = {"model": "sd15", "resolution": 512} | given
    with pytest.raises(UserError, match=named):
        plan_picture(**call)


def test_a_kernel_is_asked_of_the_unet_and_not_of_the_vae(pipeline: Path) -> None:
    asked = SliceConfig(kernel="math", policy="doggettx")
    parts = parts_of(find_picture_model(str(pipeline)), PictureKind(device="cpu"), asked, lambda _: None)
    slicings = {part.name: part.planner.slicing for part in parts if isinstance(part, TracedPart)}
    assert slicings == {"text encoder": SliceConfig(), "UNet, a step": asked, "VAE decoding": SliceConfig()}
