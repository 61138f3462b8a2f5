"""What `slicemod sample` is told; without PyTorch, so that `--help` is answered at once."""

from __future__ import annotations

from slicemod.arguments import ArgumentParser

SAMPLERS = (
    "ddim",
    "ddpm",
    "dpm++",
    "dpm++_karras",
    "dpm++_sde",
    "euler",
    "euler_a",
    "heun",
    "pndm",
    "unipc",
)  # as in `samplers.py`, which loads diffusers


def parser(name: str = "sample") -> ArgumentParser:
    """The parser of its arguments."""
    options = ArgumentParser(f"slicemod {name}", description="Draws images of one class or prompt from a checkpoint.")
    options.add_argument("--checkpoint", required=True, metavar="RUN.ckpt", help="written by `slicemod fit`")
    options.add_argument("--class", dest="label", type=int, help="of a model of the digits: the digit to draw, 0 to 9")
    options.add_argument("--prompt", help="of a Stable Diffusion model: what to draw")
    options.add_argument(
        "--negative-prompt", help="what not to draw; without it, what stood for dropped captions in training"
    )
    options.add_argument("--count", type=int, help="how many images (default: 16 of a class, 1 of a prompt)")
    options.add_argument("--out", required=True, metavar="FILE.png", help="where the picture goes")
    options.add_argument(
        "--resolution", type=int, help="edge in pixels, such as 2 or 4 times the trained one (default: the trained one)"
    )
    options.add_argument("--height", type=int, help="of images of a prompt, in pixels (default: --resolution)")
    options.add_argument("--width", type=int, help="of images of a prompt, in pixels (default: --resolution)")
    options.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    options.add_argument(
        "--guidance",
        type=float,
        help="weight of class or prompt, 1 is no guidance (default: 2 of a class, 7 of a prompt)",
    )
    options.add_argument(
        "--scheduler", choices=SAMPLERS, help="what draws a prompt (default: what the model came with)"
    )
    options.add_argument(
        "--seed", type=int, default=0, help="of the first image's noise; the next is one more (default: %(default)s)"
    )
    options.add_argument(
        "--max-tokens", type=int, help="of a prompt, a multiple of 75; what is longer is cut (default: as trained)"
    )
    options.add_argument("--compile", action="store_true", help="run the UNet under torch.compile(fullgraph=True)")
    options.add_argument("--source", help="where the model that a prompt's run began from lies now")
    return options
