"""What `slicemod bench` is told; without PyTorch, so that `--help` is answered at once."""

from __future__ import annotations

from slicemod.arguments import ArgumentParser
from slicemod.planning.plan_options import UNETS

DTYPES = ("float32", "bfloat16", "float16", "bfloat16-mixed", "float16-mixed")
CALLS = "calls"
WORK_NAMES = (*(f"{model}-{part}" for part in ("layers", "unet") for model in UNETS), CALLS)
GROWTH_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


def parser(name: str = "bench") -> ArgumentParser:
    """The parser of its arguments."""
    options = ArgumentParser(
        f"slicemod {name}",
        description="Measures attention on this machine, ours and its peers': checked against float64, then peak "
        "memory by the allocator, then time in interleaved rounds.",
        epilog="A ratio is the median over the rounds of a peer's time by that of SDPA in the same round, and a share "
        "of the product rate that of its FLOP/s by a large matrix product's. A peer that cannot compute something, or "
        "whose error against float64 is over 4 times SDPA's, is left out and the reason is said. Ctrl-C keeps what "
        "was measured.",
    )
    options.add_argument(
        "--quick", action="store_true", help="three layers of SD1.5, the main peers, under three minutes"
    )
    options.add_argument(
        "--growth", action="store_true", help="bare attention of 1,024 to 65,536 tokens instead, ten minutes or more"
    )
    options.add_argument("--work", nargs="+", default=["sd15-layers"], metavar="WORK",
                        help=f"{', '.join(WORK_NAMES)}, or of a YAML or folder (default: sd15-layers)")  # fmt: skip
    options.add_argument("--resolution", type=int, nargs="+", default=[512], help="edges in pixels (default: 512)")
    options.add_argument("--largest", type=int, default=4, help="of a model's kinds of layer, how many (default: 4)")
    options.add_argument("--batch", type=int, default=1, help="items (default: 1)")
    options.add_argument("--tokens", type=int, nargs="+", default=list(GROWTH_TOKENS), help="of --growth")
    options.add_argument("--peers", nargs="+", metavar="PEER", help="names or patterns such as 'slicemod*'")
    options.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES,
                        help="mixed: weights and inputs in float32, under autocast (default: float32)")  # fmt: skip
    options.add_argument("--mode", nargs="+", default=None, choices=("inference", "training"),
                        help="default: both; inference for --growth")  # fmt: skip
    options.add_argument("--checkpoint-blocks", action="store_true", help="diffusers' checkpointing of a UNet's blocks")
    options.add_argument("--compile", action="store_true", help="every peer by torch.compile")
    options.add_argument("--budget", default="64MiB", help="of slicemod's exact plans (default: 64MiB)")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    options.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    options.add_argument("--minutes", type=float, default=24 * 60, help="begin no comparison or round after these")
    options.add_argument("--json", metavar="FILE", help="write the results here, after every comparison")
    options.add_argument("--plots", metavar="FOLDER", help="write PNGs here")
    options.add_argument("--from", dest="from_file", metavar="FILE", help="show the results of an earlier --json")
    options.add_argument("--render", nargs="+", default=[], metavar="PAGE",
                         help="measure nothing: renew the figures of Markdown pages from their JSONs")  # fmt: skip
    return options
