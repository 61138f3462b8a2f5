"""Compares slicemod with ComfyUI's own attention on ComfyUI's own models, small and with random weights.

`python -m tests.integrations.run_in_comfyui FOLDER --use-pytorch-cross-attention`, in a Python that has what ComfyUI
needs. It prints a line for each model, and fails where outputs differ by more than float32 can tell.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tests.integrations.random_weights import randomized

Run = Callable[[dict[str, Any]], Tensor]
SETTINGS: tuple[dict[str, Any], ...] = ({}, {"kernel": "math", "steps": 3}, {"kernel": "math", "budget": "64KiB"})


def made() -> dict[str, Any]:
    return {"dtype": torch.float32, "device": "cpu", "operations": import_module("comfy.ops").disable_weight_init}


def known(parameters: type, **more: Any) -> dict[str, Any]:
    """Those of the arguments that this version of ComfyUI has."""
    return {name: value for name, value in more.items() if name in parameters.__annotations__}


def unet() -> Run:
    model = randomized(
        import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=32,
            num_res_blocks=[1, 1],
            channel_mult=(1, 2),
            num_heads=4,
            use_spatial_transformer=True,
            transformer_depth=[1, 1],
            transformer_depth_output=[1, 1, 1, 1],
            transformer_depth_middle=1,
            context_dim=24,
            **made(),
        )
    )
    x, time, text = torch.randn(2, 4, 16, 24), torch.tensor([3.0, 500.0]), torch.randn(2, 77, 24)
    return lambda options: model(x, time, context=text, transformer_options=options)


def flux() -> Run:
    module = import_module("comfy.ldm.flux.model")
    sizes = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 24, "context_in_dim": 32, "hidden_size": 48}
    depths = {"num_heads": 3, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000}
    rest = {"mlp_ratio": 4.0, "patch_size": 2, "qkv_bias": True, "guidance_embed": True}
    more = known(module.FluxParams, txt_ids_dims=[])
    model = randomized(module.Flux(image_model="flux", **sizes, **depths, **rest, **more, **made()))
    x, time, text, vector = torch.randn(1, 16, 12, 20), torch.tensor([0.3]), torch.randn(1, 13, 32), torch.randn(1, 24)
    return lambda options: model(x, time, text, vector, torch.tensor([3.5]), transformer_options=options)


def wan() -> Run:
    sizes = {"dim": 48, "ffn_dim": 64, "freq_dim": 16, "text_dim": 32, "in_dim": 20, "out_dim": 16, "text_len": 17}
    depths = {"num_heads": 2, "num_layers": 2, "patch_size": (1, 2, 2)}
    model = randomized(import_module("comfy.ldm.wan.model").WanModel(model_type="i2v", **sizes, **depths, **made()))
    x, time, text = torch.randn(1, 20, 3, 8, 12), torch.tensor([300.0]), torch.randn(1, 17, 32)
    image = torch.randn(1, 257, 1280)
    return lambda options: model(x, time, text, clip_fea=image, transformer_options=options)


def qwen() -> Run:
    model = randomized(
        import_module("comfy.ldm.qwen_image.model").QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            **made(),
        )
    )
    x, time, text = torch.randn(2, 16, 1, 8, 12), torch.tensor([300.0, 20.0]), torch.randn(2, 13, 32)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, 9:] = 0
    return lambda options: model(x, time, text, mask, transformer_options=options)


def sd3() -> Run:
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}}
    model = randomized(
        import_module("comfy.ldm.modules.diffusionmodules.mmdit").OpenAISignatureMMDITWrapper(
            input_size=None,
            patch_size=2,
            in_channels=16,
            depth=2,
            adm_in_channels=24,
            context_embedder_config=embedder,
            num_patches=36864,
            pos_embed_max_size=192,
            pos_embed_scaling_factor=None,
            qk_norm="rms",
            **made(),
        )
    )
    x, time, text = torch.randn(2, 16, 8, 12), torch.tensor([3.0, 500.0]), torch.randn(2, 13, 32)
    pooled = torch.randn(2, 24)
    return lambda options: model(x, time, context=text, y=pooled, transformer_options=options)


def main(folder: str, *flags: str) -> None:
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = ["main.py", "--cpu", *flags]
    import_module("comfy.options").enable_args_parsing()
    attention = import_module("comfy.ldm.modules.attention").optimized_attention.__name__
    override = import_module("slicemod.integrations.comfyui.override")
    torch.manual_seed(0)
    for model in (unet, flux, wan, qwen, sd3):
        with torch.inference_mode():
            run = model()
            theirs = run({})
            for slicing in SETTINGS:
                ours = override.SlicedOverride(slicing)
                difference = float((run({override.KEY: ours}) - theirs).abs().max())
                size = float(theirs.abs().max())
                print(
                    f"{model.__name__} against {attention}, {slicing}: {difference:.1e} of {size:.1f}; {ours.report!r}"
                )
                assert not ours.report.passed_on
                assert sum(ours.report.calls.values()) >= 2
                assert difference <= 3e-6 * size, model.__name__


if __name__ == "__main__":
    main(*sys.argv[1:])
