"""Compares slicemod with the other optimizations of AUTOMATIC1111's webui, on LDM's and sgm's own models.

`python -m tests.integrations.run_in_webui FOLDER`, in a Python that has what the webui needs. The webui itself loads
the extension, lists the optimizations and chooses among them.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tests.integrations.installed_extension import loaded_extension
from tests.integrations.random_weights import randomized

X, TIME, TEXT = torch.randn(2, 4, 16, 24), torch.tensor([3.0, 500.0]), torch.randn(2, 77, 24)
LATENTS = torch.randn(1, 4, 14, 18)
SIZES = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1, 2], "num_heads": 4}
DEPTHS = {"num_res_blocks": 1, "channel_mult": [1, 2], "transformer_depth": 1, "context_dim": 24}
DECODER = {"ch": 32, "out_ch": 3, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16], "in_channels": 3}


def models(hijack: Any) -> dict[str, Any]:
    """Functions that call a UNet and a VAE of either library."""
    calls: dict[str, Any] = {}
    ldm, sgm = (import_module(f"{library}.modules.diffusionmodules.openaimodel") for library in ("ldm", "sgm"))
    unets = {
        "ldm": ldm.UNetModel(image_size=32, use_spatial_transformer=True, legacy=False, **SIZES, **DEPTHS),
        "sgm": sgm.UNetModel(
            use_linear_in_transformer=True, spatial_transformer_attn_type="softmax", **SIZES, **DEPTHS
        ),
    }
    for library, unet in unets.items():
        randomized(unet)
        forward = getattr(hijack, f"{library}_original_forward")
        calls[f"{library} UNet"] = lambda unet=unet, forward=forward: forward(unet, X, TIME, TEXT)
        module = import_module(f"{library}.modules.diffusionmodules.model")
        decoder = randomized(module.Decoder(double_z=True, z_channels=4, resolution=32, attn_type="vanilla", **DECODER))
        calls[f"{library} VAE"] = lambda decoder=decoder: decoder(LATENTS)
    return calls


def outputs(calls: dict[str, Any], hijack: Any, title: str) -> dict[str, Tensor]:
    """What the models compute after the user has chosen an optimization."""
    import_module("modules.shared").opts.data["cross_attention_optimization"] = title
    hijack.apply_optimizations()
    assert (title == "slicemod") == (getattr(hijack.current_optimizer, "name", None) == "slicemod")
    with torch.no_grad():
        return {name: call() for name, call in calls.items()}


def main(folder: str) -> None:
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = ["webui.py", "--use-cpu", "all", "--no-half", "--precision", "full"]
    import_module("modules.initialize").imports()
    modules: list[Any] = [import_module(f"modules.{name}") for name in ("shared", "devices", "sd_hijack")]
    shared, devices, hijack = modules
    devices.dtype = devices.dtype_unet = devices.dtype_vae = torch.float32
    own = import_module("modules.sd_hijack_optimizations")
    network = import_module("modules.hypernetworks.hypernetwork").Hypernetwork(
        name="random",
        enable_sizes=[24, 32, 64],
        layer_structure=[1, 2, 1],
        activation_func="swish",
        weight_init="Normal",
    )
    for layers in network.layers.values():
        for layer in layers:
            randomized(layer)
    with loaded_extension(folder):
        import_module("modules.script_callbacks").on_list_optimizers(own.list_optimizers)
        hijack.list_optimizers()
        assert not shared.opts.set("slicemod_budget", "a lot")
        assert shared.opts.set("slicemod_budget", "64KiB")
        calls = models(hijack)
        theirs = [each.title() for each in hijack.optimizers if each.name not in ("slicemod", "sdp-no-mem")]
        for hypernetworks in ([], [network]):
            shared.loaded_hypernetworks = hypernetworks
            ours = outputs(calls, hijack, "slicemod")
            for title in ("None", *theirs):
                for name, expected in outputs(calls, hijack, title).items():
                    difference, size = float((ours[name] - expected).abs().max()), float(expected.abs().max())
                    kind = "with" if hypernetworks else "without"
                    print(f"{name} against {title}, {kind} hypernetworks: {difference:.1e} of {size:.1f}")
                    assert difference <= 3e-6 * size, (name, title)
        hijack.undo_optimizations()
        for library in ("ldm", "sgm"):
            layer = import_module(f"{library}.modules.attention").CrossAttention
            assert not layer.forward.__module__.startswith("slicemod")
        print("undone")


if __name__ == "__main__":
    main(*sys.argv[1:])
