"""`slicemod plan`: whether a UNet's attention fits, in how many slices, and up to which resolution."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from slicemod.arguments import ArgumentParser
from slicemod.budget import budget_bytes
from slicemod.plan import POLICIES, NotEnoughMemoryError, SlicePlan, fused_peak, plan_slices
from slicemod.planning.attention_calls import AttentionCall, at_resolution, record_attention_calls
from slicemod.planning.unets import NAMED_UNETS, find_unet
from slicemod.shapes import AttentionShape
from slicemod.user_error import UserError

_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_RESOLUTION_STEP, _HIGHEST_RESOLUTION = 64, 16384


def run(arguments: Sequence[str]) -> int:
    """Prints the plans; `arguments[0]` is the command's name."""
    options = _parser().parse_args(arguments[1:])
    memory = _memory(options.memory, options.device)
    step = find_unet(options.model).resolution_step
    for pixels in options.resolution:
        if pixels < step or pixels % step:
            raise UserError(
                f"--resolution: expected multiples of {step} pixels, which {options.model} halves down to whole"
                f" latents; got {pixels}. Take {max(1, round(pixels / step)) * step}."
            )
    if options.batch < 1:
        raise UserError(f"--batch: expected 1 or more items; got {options.batch}.")
    calls = record_attention_calls(options.model, batch=options.batch, itemsize=_ITEMSIZES[options.dtype])
    if not calls:
        raise UserError(
            f"{options.model}: computes no attention, so that there is nothing to plan. Name another model."
        )

    def plan(shape: AttentionShape) -> SlicePlan:
        return plan_slices(shape, memory, policy=options.policy, device_type=options.device, training=options.train)

    def peaks(shape: AttentionShape) -> dict[str, int]:
        return {
            "full attention": _full_peak(shape, training=options.train),
            "fused": fused_peak(shape, options.device, training=options.train),
        }

    rows = [_row(at_resolution(call, pixels), pixels, plan, peaks) for pixels in options.resolution for call in calls]
    limits = {
        "full attention": _largest(calls, lambda shape: peaks(shape)["full attention"] <= memory),
        "fused": _largest(calls, lambda shape: peaks(shape)["fused"] <= memory),
        f"sliced, {options.policy}": _largest(calls, lambda shape: _fits(plan, shape, memory)),
    }
    if options.json:
        json.dump({"memory": memory, "layers": rows, "largest_resolution": limits}, sys.stdout, indent=2)
        print()
        return 0
    console = Console(width=max(Console().width, 100))
    title = f"{options.model}, batch {options.batch}, {options.dtype}, {'training' if options.train else 'inference'}"
    console.print(_table(f"{title}: attention within {_size(memory)} on {options.device}", rows))
    for name, pixels in limits.items():
        console.print(f"largest square image whose attention fits, {name}: {pixels}x{pixels}")
    return 0


def _memory(given: str, device: str) -> int:
    try:
        return int(budget_bytes(float(given) if _is_number(given) and "." in given else given, torch.device(device)))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--memory: {error}") from error


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _full_peak(shape: AttentionShape, *, training: bool) -> int:
    """Scores and their softmax; in training both live on, and their gradients come on top of them one at a time."""
    return shape.scores_bytes * (3 if training else 2)


def _fits(plan: Callable[[AttentionShape], SlicePlan], shape: AttentionShape, memory: int) -> bool:
    try:
        return plan(shape).peak_bytes <= memory
    except NotEnoughMemoryError:
        return False


def _largest(calls: list[AttentionCall], fits: Callable[[AttentionShape], bool]) -> int:
    """Pixels of the largest square whose every call fits; 0 where none does."""
    pixels = 0
    while pixels < _HIGHEST_RESOLUTION:
        tried = pixels + _RESOLUTION_STEP
        if not all(fits(at_resolution(call, tried).shape) for call in calls):
            break
        pixels = tried
    return pixels


def _row(
    call: AttentionCall,
    pixels: int,
    plan: Callable[[AttentionShape], SlicePlan],
    peaks: Callable[[AttentionShape], dict[str, int]],
) -> dict[str, Any]:
    row: dict[str, Any] = {"resolution": pixels, "layers": call.layers, "shape": asdict(call.shape)}
    row |= {"peaks": peaks(call.shape)}
    try:
        row["plan"] = asdict(plan(call.shape))
    except NotEnoughMemoryError as error:
        row["plan"], row["error"] = None, str(error)
    return row


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("pixels", "layers", "heads x N x M x D", "full", "fused", "sliced", "slices"):
        table.add_column(column, justify="right", no_wrap=True)
    last = 0
    for row in rows:
        if row["resolution"] != last:
            table.add_section()
        last = row["resolution"]
        shape, plan = row["shape"], row["plan"]
        sizes = (shape["batch"] * shape["heads"], shape["queries"], shape["keys"], shape["head_dim"])
        ours = ("too little", "-")
        if plan is not None:
            of = "rows" if plan["axis"] == "query" else "heads"
            ours = (_size(plan["peak_bytes"]), f"{plan['steps']} x {plan['slice_size']} {of}")
        peaks = (_size(peak) for peak in row["peaks"].values())
        table.add_row(str(last), str(row["layers"]), "x".join(map(str, sizes)), *peaks, *ours)
    return table


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f}M" if count < 2**30 else f"{count / 2**30:,.1f}G"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "slicemod plan",
        description="Plans the attention of a UNet without its weights and without the device.",
        epilog="Sizes are batch x heads, queries, keys, head dim; M and G are MiB and GiB. Peaks are those of "
        "attention alone, beyond its inputs and outputs; the fused kernel's are measured on the CPU and estimated "
        "elsewhere.",
    )
    parser.add_argument("model", help=f"{', '.join(NAMED_UNETS)}, a YAML of configs/, or a diffusers folder")
    parser.add_argument("--resolution", type=int, nargs="+", default=[512, 768, 1024], help="edges in pixels")
    parser.add_argument("--memory", default="8GiB", help="what is free, such as 8GiB or auto (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu", "mps"), help="default: %(default)s")
    parser.add_argument("--dtype", default="float16", choices=tuple(_ITEMSIZES), help="default: %(default)s")
    parser.add_argument("--policy", default="heuristic", choices=tuple(POLICIES), help="default: %(default)s")
    parser.add_argument(
        "--batch", type=int, default=2, help="items in the UNet's batch; guidance takes two an image (default: 2)"
    )
    parser.add_argument("--train", action="store_true", help="count the backward pass")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser
