"""What `slicemod plan` is told; without PyTorch, so that `--help` is answered at once."""

from __future__ import annotations

from pathlib import Path

from slicemod.arguments import ArgumentParser

DTYPES = ("float32", "float16", "bfloat16")
DEVICES = ("cuda", "mps", "cpu")
PARTS = ("whole", "unet", "transformer")
OFFLOADS = ("none", "model", "sequential")
# As in their own places, which load PyTorch.
UNETS = ("sd15", "sd15-top", "sd21", "sdxl")
TRANSFORMERS = (
    "sd35-medium",
    "sd35-large",
    "flux-schnell",
    "flux-dev",
    "pixart-sigma",
    "qwen-image",
    "wan-1.3b",
    "wan-14b",
)
MODELS = (*UNETS, *TRANSFORMERS)
POLICIES = ("heuristic", "doggettx", "invokeai", "mps", "exact")


def parser(name: str = "plan") -> ArgumentParser:
    """The parser of its arguments."""
    options = ArgumentParser(
        f"slicemod {name}",
        description="Tells what making a picture takes, or training: the peak memory of text encoders, UNet or "
        "transformer, and VAE, what stays loaded meanwhile, which part limits, and the largest image. It needs no "
        "weights and no device: the parts are run on tensors that have sizes and no memory.",
        epilog="Each part of a peak is what it holds at that moment; attention may hold nothing then. Bytes are those "
        "that PyTorch asks its allocator for. On a CPU the temporary memory of its operators is counted too, and the "
        "figures have been held against measured ones. CUDA and MPS are simulated: the workspace of cuDNN, the "
        "rounding of the allocator and the CUDA context come on top, and a fused kernel is taken for granted on "
        "CUDA. Training is a step of AdamW in one dtype.",
    )
    options.add_argument(
        "model", help=f"{', '.join(MODELS)}, a YAML of configs/, a diffusers folder or its config.json"
    )
    options.add_argument(
        "--part",
        default="whole",
        choices=PARTS,
        help="whole, the default: text encoders, UNet or transformer, and VAE. unet or transformer: its step alone, "
        "with the plan of each of its attention layers",
    )
    options.add_argument("--resolution", type=int, nargs="+", default=[512, 768, 1024], help="edges in pixels")
    options.add_argument("--frames", type=int, help="of a video (default: 81)")
    options.add_argument(
        "--memory", default="8GiB", help="of the device, such as 8GiB; auto is what is free (default: %(default)s)"
    )
    options.add_argument("--device", default="cuda", choices=DEVICES, help="default: %(default)s")
    options.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of weights and activations (default: float16 for UNets, bfloat16 for transformers)",
    )
    options.add_argument("--policy", default="exact", choices=POLICIES, help="default: %(default)s")
    options.add_argument(
        "--kernel", default="auto", help="a name that slicemod kernels lists, or %(default)s, the fastest that fits"
    )
    options.add_argument(
        "--batch",
        type=int,
        help="items in the model's batch (default: 1 with --train, otherwise as its pipeline does with guidance)",
    )
    options.add_argument(
        "--offload",
        default="none",
        choices=OFFLOADS,
        help="as diffusers' enable_model_cpu_offload or enable_sequential_cpu_offload (default: %(default)s)",
    )
    options.add_argument("--train", action="store_true", help="a training step: gradients, AdamW's state")
    options.add_argument(
        "--uncached", action="store_true", help="text encoders and VAE stay loaded in training and run in every step"
    )
    options.add_argument(
        "--checkpoint-blocks", action="store_true", help="train with the model's own gradient checkpointing"
    )
    options.add_argument(
        "--checkpoint-layers",
        action="store_true",
        help="train with slicemod's checkpoint='layer', which keeps the inputs of attention layers alone",
    )
    options.add_argument(
        "--feed-forward",
        action="store_true",
        help="train with slicemod's feed-forwards in slices; inference always has them",
    )
    options.add_argument(
        "--prepared",
        action="store_true",
        help="on a CPU, after slicemod's prepare_for_cpu on the UNet or transformer, as this machine's CPU would have "
        "it",
    )
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw the largest image against the memory")
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return options
