"""Compares slicemod with Forge's own attention on Forge's own models.

`python -m tests.integrations.run_in_forge FOLDER`, in a Python that has what Forge needs. Forge itself loads the
extension, and its settings switch it on and off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tests.integrations.installed_extension import loaded_extension
from tests.integrations.random_weights import randomized

TIME, TEXT, GUIDANCE = torch.tensor([0.3]), torch.randn(1, 13, 32), torch.tensor([3.5])
SIZES = {"in_channels": 16, "vec_in_dim": 24, "context_in_dim": 32, "hidden_size": 48, "axes_dim": [4, 6, 6]}
DEPTHS = {"mlp_ratio": 4.0, "num_heads": 3, "depth": 2, "depth_single_blocks": 2, "theta": 10000, "qkv_bias": True}
UNET = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": (1, 2)}
BLOCKS = {
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 4,
    "use_spatial_transformer": True,
    "context_dim": 24,
}


def models() -> dict[str, Callable[[], Any]]:
    names = ("unet", "flux", "chroma", "vae")
    unet_of, flux_of, chroma_of, vae_of = (import_module(f"backend.nn.{name}") for name in names)
    unet = randomized(unet_of.IntegratedUNet2DConditionModel(**UNET, **BLOCKS))
    flux = randomized(flux_of.IntegratedFluxTransformer2DModel(guidance_embed=True, **SIZES, **DEPTHS))
    guidance = {"guidance_out_dim": 48, "guidance_hidden_dim": 32, "guidance_n_layers": 2}
    chroma = randomized(chroma_of.IntegratedChromaTransformer2DModel(**guidance, **SIZES, **DEPTHS))
    vae = randomized(
        vae_of.IntegratedAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 64),
            layers_per_block=1,
            latent_channels=4,
        )
    )
    x, steps, text = torch.randn(2, 4, 16, 24), torch.tensor([3.0, 500.0]), torch.randn(2, 77, 24)
    latents, vector, image = torch.randn(1, 16, 12, 20), torch.randn(1, 24), torch.randn(1, 4, 14, 18)
    return {
        "unet": lambda: unet(x, steps, context=text),
        "flux": lambda: flux(latents, TIME, TEXT, vector, GUIDANCE),
        "chroma": lambda: chroma(latents, TIME, TEXT),
        "vae": lambda: vae.decode(image),
    }


def outputs(calls: dict[str, Callable[[], Any]]) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {name: getattr(out, "sample", out) for name, out in ((name, call()) for name, call in calls.items())}


def main(folder: str, *flags: str) -> None:
    os.chdir(folder)
    sys.path[:0] = [folder, os.path.join(folder, "packages_3rdparty")]  # noqa: PTH118 - as Forge starts
    sys.argv = ["webui.py", "--always-cpu", "--skip-torch-cuda-test", *flags]
    import_module("modules.initialize").imports()
    options, attention = import_module("modules.shared").opts, import_module("backend.attention")
    torch.manual_seed(0)
    calls = models()
    theirs, own = outputs(calls), import_module("backend.nn.unet").attention_function
    with loaded_extension(folder):
        assert options.set("slicemod_enabled", True)
        assert import_module("backend.nn.unet").attention_function is not own
        for budget in ("64KiB", "auto"):
            options.set("slicemod_budget", budget)
            for name, ours in outputs(calls).items():
                difference, size = float((ours - theirs[name]).abs().max()), float(theirs[name].abs().max())
                print(f"{name} against {attention.attention_function.__name__}: {difference:.1e} of {size:.1f}")
                assert difference <= 3e-6 * size, name
        assert options.set("slicemod_enabled", False)
        assert import_module("backend.nn.unet").attention_function is own


if __name__ == "__main__":
    main(*sys.argv[1:])
