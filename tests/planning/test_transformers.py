"""Transformers are found by name, folder or config, and the predicted peak of their steps is the measured one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from slicemod import SliceConfig, sliced_sdpa
from slicemod.bench.memory import peak_memory
from slicemod.planning.denoisers import find_denoiser
from slicemod.planning.plan_options import TRANSFORMERS as NAMES
from slicemod.planning.step_peaks import StepPlanner
from slicemod.planning.transformers import NAMED_TRANSFORMERS, TRANSFORMERS, TransformerSource
from slicemod.planning.unet_step import StepKind, trace_step
from slicemod.user_error import UserError
from tests.slow_cases import slow_if

# Small models of the real classes. Widths are so large that scratch of some KiB does not matter.
SMALL: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 24,
        "num_attention_heads": 5,
        "joint_attention_dim": 56,
        "pooled_projection_dim": 40,
        "axes_dims_rope": (4, 8, 12),
        "guidance_embeds": True,
    },
    "SD3Transformer2DModel": {
        "sample_size": 32,
        "in_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 24,
        "num_attention_heads": 5,
        "caption_projection_dim": 120,
        "joint_attention_dim": 56,
        "pooled_projection_dim": 40,
        "out_channels": 16,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    },
    "QwenImageTransformer2DModel": {
        "in_channels": 64,
        "num_layers": 2,
        "attention_head_dim": 24,
        "num_attention_heads": 5,
        "joint_attention_dim": 56,
        "axes_dims_rope": (4, 8, 12),
    },
    "WanTransformer3DModel": {
        "num_attention_heads": 5,
        "attention_head_dim": 24,
        "text_dim": 56,
        "freq_dim": 64,
        "ffn_dim": 360,
        "num_layers": 2,
    },
    "PixArtTransformer2DModel": {
        "sample_size": 32,
        "num_layers": 2,
        "attention_head_dim": 24,
        "num_attention_heads": 5,
        "cross_attention_dim": 120,
        "caption_channels": 56,
        "use_additional_conditions": False,
    },
}


def _source(class_name: str) -> TransformerSource:
    return TransformerSource(class_name, SMALL[class_name], frames=5 if class_name.startswith("Wan") else 1)


def _filled(source: TransformerSource, kind: StepKind, pixels: int) -> tuple[Any, dict[str, Any]]:
    """The model with random weights, and inputs of its step, on the CPU."""
    torch.manual_seed(0)
    # Tables that are no buffers, such as Qwen-Image's positions, have to be built where they are used.
    import diffusers

    model = getattr(diffusers, source.class_name)(**source.config)
    model = torch.nn.Module.to(model, kind.dtype).train(kind.training)
    given = source.inputs(model, kind.dtype, kind.batch, pixels)
    return model, tree_map(
        lambda part: torch.ones_like(part, device="cpu") if isinstance(part, Tensor) else part, given
    )


def _step(model: Any, inputs: dict[str, Any], kind: StepKind, target: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters())

    def infer() -> None:
        with torch.no_grad():
            model(**inputs)

    def train() -> None:
        predicted = model(**inputs).sample
        predicted = predicted if predicted.shape == target.shape else predicted.chunk(2, dim=1)[0]
        torch.autograd.backward(F.mse_loss(predicted, target))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train if kind.training else infer


@pytest.mark.parametrize("class_name", slow_if({"FluxTransformer2DModel", "WanTransformer3DModel"}.__contains__, SMALL))
@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["inference", "training"])
def test_the_predicted_peak_is_the_measured_one(class_name: str, training: bool) -> None:
    budget, pixels = 2 * 2**20, 256 if training else 384
    source, kind = _source(class_name), StepKind(torch.float32, 2, "cpu", training)
    slicing = SliceConfig(policy="exact", kernel="math")
    ample = StepPlanner(source, kind, 2**40, slicing)
    peaks = StepPlanner(source, kind, 2**40 - ample.plan(pixels).budget + budget, slicing).plan(pixels).peaks
    assert set(peaks) == {"fused", "slicemod"}
    model, inputs = _filled(source, kind, pixels)
    step = _step(model, inputs, kind, torch.zeros_like(inputs[source.latents_name]))
    step()  # makes the optimizer's state, and tables that are kept
    measured = {"fused": peak_memory(step)}
    with sliced_sdpa({"budget": budget, "policy": "exact", "kernel": "math"}) as report:
        measured["slicemod"] = peak_memory(step)
    assert not report.passed_on
    for way, peak in peaks.items():
        predicted = peak.total - peak.weights - peak.optimizer
        print(f"{class_name} {training=} {way}: predicted {predicted:,}, measured {measured[way]:,}")
        assert predicted == pytest.approx(measured[way], rel=0.05 if way == "fused" else 0.03), way


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("flux-dev", 11.901),
        ("flux-schnell", 11.891),
        ("pixart-sigma", 0.611),
        ("qwen-image", 20.430),
        ("sd35-large", 8.057),
        ("sd35-medium", 2.243),
        ("wan-1.3b", 1.419),
        ("wan-14b", 14.288),
    ],
)
def test_named_transformers_have_the_parameters_that_were_published(name: str, billions: float) -> None:
    assert set(NAMES) == set(NAMED_TRANSFORMERS)
    model = find_denoiser(name).model(torch.bfloat16)
    assert sum(tensor.numel() for tensor in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.0006)


def test_every_class_has_a_small_model_that_is_measured() -> None:
    assert set(SMALL) == set(TRANSFORMERS)


def test_weights_that_diffusers_keeps_in_float32_are_planned_so() -> None:
    dtypes = {name: tensor.dtype for name, tensor in find_denoiser("wan-1.3b").model(torch.bfloat16).named_parameters()}
    assert dtypes["blocks.0.scale_shift_table"] == dtypes["condition_embedder.time_embedder.linear_1.weight"]
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16


def _saved(class_name: str, folder: Path) -> str:
    folder.mkdir(parents=True)
    config = {"_class_name": class_name, "_diffusers_version": "0.42.1", **SMALL.get(class_name, {})}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("class_name", ["SD3Transformer2DModel", "WanTransformer3DModel"])
def test_a_folder_or_its_config_is_the_model_that_was_saved(class_name: str, tmp_path: Path) -> None:
    folder = _saved(class_name, tmp_path / "pipeline" / "transformer")
    sources = [find_denoiser(name) for name in (folder, f"{folder}/config.json", str(tmp_path / "pipeline"))]
    assert sources[0] == sources[1] == sources[2]
    assert sources[0].resolution_step == 16
    (tmp_path / "pipeline" / "vae").mkdir()
    (tmp_path / "pipeline" / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [4, 4, 8]}))
    assert find_denoiser(folder).resolution_step == 8


def test_a_class_whose_inputs_are_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    folder = _saved("MochiTransformer3DModel", tmp_path / "transformer")
    with pytest.raises(UserError, match=r"expected .*UNet2DConditionModel.*FluxTransformer2DModel.*got one of Mochi"):
        find_denoiser(folder)


def test_a_config_that_builds_no_model_is_an_error_that_names_its_class(tmp_path: Path) -> None:
    config = {"_class_name": "SD3Transformer2DModel", "num_layers": "many"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="describes no SD3Transformer2DModel"):
        find_denoiser(str(tmp_path)).model(torch.float32)


@pytest.mark.parametrize(
    ("model", "frames", "expected"),
    [("wan-1.3b", 80, "a multiple of 4 and one more"), ("flux-dev", 5, "makes images"), ("sd15", 5, "a UNet makes")],
)
def test_frames_that_a_model_cannot_make_are_named(model: str, frames: int, expected: str) -> None:
    with pytest.raises(UserError, match=f"^frames: expected .*{expected}.*got {frames}"):
        find_denoiser(model, frames)


def test_a_video_has_tokens_for_each_of_its_latent_frames() -> None:
    source = find_denoiser("wan-1.3b", 81)._replace(config=SMALL["WanTransformer3DModel"])  # type: ignore[attr-defined]
    calls = trace_step(source, StepKind(torch.bfloat16, 1, "cuda"), 480).calls
    assert {(call.shape.queries, call.shape.keys) for call in calls} == {(21 * 30 * 30, 21 * 30 * 30), (18900, 512)}


def test_no_image_is_larger_than_the_position_embedding() -> None:
    small = SMALL["SD3Transformer2DModel"] | {"pos_embed_max_size": 24}
    source = TransformerSource("SD3Transformer2DModel", small)
    planner = StepPlanner(source, StepKind(torch.float16, 2, "cuda"), 2**40, SliceConfig())
    assert planner.largest("slicemod") == source.most_pixels == 24 * 16
