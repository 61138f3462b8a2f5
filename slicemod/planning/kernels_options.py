"""What `slicemod kernels` is told; without PyTorch, so that `--help` is answered at once."""

from __future__ import annotations

from slicemod.arguments import ArgumentParser
from slicemod.planning.plan_options import DEVICES, DTYPES, MODELS


def parser(name: str = "kernels") -> ArgumentParser:
    """The parser of its arguments."""
    options = ArgumentParser(
        f"slicemod {name}",
        description="Shows which kernels this machine has, and why it does not have the others. For the attention "
        "layers of a model it shows which kernel runs, how many bytes that takes, and why each better kernel is passed "
        "over.",
        epilog="The batch is that of one image: in inference two items where the pipeline computes guidance at once, "
        "and one in training. You can name a device that this machine does not have; on CUDA, PyTorch is then assumed "
        "to have a fused kernel. The first use of this command compiles the native kernel if it can.",
    )
    options.add_argument("--model", nargs="+", default=["sd15", "sdxl"], metavar="MODEL",
                         help=f"{', '.join(MODELS)}, a YAML of configs/, a diffusers folder or its config.json "
                         "(default: sd15 sdxl)")  # fmt: skip
    options.add_argument("--resolution", type=int, nargs="+", help="edges in pixels (default: the model's own)")
    options.add_argument("--device", choices=DEVICES, help="default: this machine's accelerator, or else cpu")
    options.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, float16 elsewhere")
    options.add_argument(
        "--budget", default="auto", help="for each call, such as 64MiB (default: %(default)s, what is free now)"
    )
    options.add_argument("--build", action="store_true", help="compile the native kernel, print where it is, and stop")
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return options
