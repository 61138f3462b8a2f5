"""What `slicemod kernels` is told; without PyTorch, so that `--help` is answered at once."""

from __future__ import annotations

from slicemod.arguments import ArgumentParser
from slicemod.planning.plan_options import DEVICES, DTYPES, MODELS


def parser(name: str = "kernels") -> ArgumentParser:
    """The parser of its arguments."""
    options = ArgumentParser(
        f"slicemod {name}",
        description="Tells which kernels this machine has and why not the others, and for the attention layers of a "
        "model which kernel takes them, with how many bytes, and why each better one is passed over.",
        epilog="Inference is of two items, as for guidance, training of one. On a device that this machine does not "
        "have, the kernels are planned for, and a fused one is taken for granted on CUDA. The first look at the native "
        "kernel compiles it, which --build does ahead of time.",
    )
    options.add_argument("--model", nargs="+", default=["sd15", "sdxl"], metavar="MODEL",
                         help=f"{', '.join(MODELS)}, a YAML of configs/, or a diffusers folder "
                         "(default: sd15 sdxl)")  # fmt: skip
    options.add_argument("--resolution", type=int, nargs="+", help="edges in pixels (default: the model's own)")
    options.add_argument("--device", choices=DEVICES, help="default: this machine's accelerator, or else cpu")
    options.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, float16 elsewhere")
    options.add_argument(
        "--budget", default="auto", help="for each call, such as 64MiB; %(default)s (the default) is what is free now"
    )
    options.add_argument("--build", action="store_true", help="build the native kernel, say where it lies, and end")
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return options
