"""What `slicemod export` is told; without PyTorch, so that `--help` is answered at once."""

from __future__ import annotations

from slicemod.arguments import ArgumentParser

FORMATS = ("diffusers", "compvis", "lora")
DTYPES = ("float32", "float16", "bfloat16")


def parser(name: str = "export") -> ArgumentParser:
    """The parser of its arguments."""
    options = ArgumentParser(f"slicemod {name}", description="Writes a checkpoint as other programs read it.")
    options.add_argument("--checkpoint", required=True, metavar="RUN.ckpt", help="written by `slicemod fit`")
    options.add_argument(
        "--out", required=True, metavar="PLACE", help="a folder that is missing or empty, or a .safetensors file"
    )
    options.add_argument(
        "--format",
        default="diffusers",
        choices=FORMATS,
        help="a diffusers folder, one file in CompVis' and sgm's layout, or the low-rank adapters alone as diffusers"
        " and webuis read them (default: %(default)s)",
    )
    options.add_argument("--dtype", default="float32", choices=DTYPES, help="default: %(default)s")
    options.add_argument("--source", help="where the model that the run began from lies now")
    return options
