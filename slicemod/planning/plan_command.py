"""`slicemod plan`: whether a UNet's step fits a device, in how many slices, and up to which resolution."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from slicemod.config import SliceConfig
from slicemod.planning.denoisers import find_denoiser
from slicemod.planning.memory_given import bytes_given
from slicemod.planning.plan_options import parser
from slicemod.planning.plan_report import as_json, attention_table, remarks, step_table
from slicemod.planning.resolutions import check_resolutions
from slicemod.planning.step_peaks import StepPlanner
from slicemod.planning.unet_step import StepKind
from slicemod.user_error import UserError

_PICTURES = (".png", ".svg", ".pdf")


def run(arguments: Sequence[str]) -> int:
    """Prints the plans; `arguments[0]` is the command's name."""
    options = parser().parse_args(arguments[1:])
    source = find_denoiser(options.model, options.frames)
    check_resolutions(options.resolution, source.resolution_step)
    batch = (1 if options.train else source.guidance_batch) if options.batch is None else options.batch
    if batch < 1:
        raise UserError(f"--batch: expected 1 or more items; got {batch}.")
    if options.checkpoint_blocks and not options.train:
        raise UserError("--checkpoint-blocks: expected together with --train; got it alone. Add --train or leave it.")
    _check_picture(options.plot)
    memory = bytes_given("--memory", options.memory, torch.device(options.device))
    kind = StepKind(getattr(torch, options.dtype), batch, options.device, options.train, options.checkpoint_blocks)
    try:
        slicing = SliceConfig(policy=options.policy, kernel=options.kernel)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    task = f"training{', blocks checkpointed' if options.checkpoint_blocks else ''}" if options.train else "inference"
    title = (
        f"{options.model}, {task}, batch {batch}, {options.dtype}, on {options.device} (simulated); "
        f"slicemod: policy {options.policy}, kernel {options.kernel}"
    )

    with Console(stderr=True).status("") as status:
        planner = StepPlanner(source, kind, memory, slicing, status.update)
        status.update("looking for the largest resolutions")
        plans = [planner.plan(pixels) for pixels in options.resolution]
        limits = {way: planner.largest(way) for way in planner.ways}
        if options.plot is not None:
            status.update(f"drawing {options.plot}")
            from slicemod.planning.plan_plot import plot_peaks

            plot_peaks(planner, options.plot, title)
    if options.json:
        about = {"model": options.model, "device": options.device, "dtype": options.dtype, "batch": batch}
        about |= {"training": options.train, "policy": options.policy, "kernel": options.kernel, "memory": memory}
        json.dump(
            about | {"resolutions": [as_json(plan) for plan in plans], "largest_resolution": limits},
            sys.stdout,
            indent=2,
        )
        print()
        return 0
    console = Console(width=max(Console().width, 110))
    console.print(f"{title}\n", highlight=False)
    layers_of = [(str(plan.pixels), plan.layers) for plan in plans]
    console.print(attention_table("attention layers, by slicemod", "pixels", layers_of))
    console.print(step_table(planner, plans))
    for remark in remarks(planner, plans):
        console.print(remark, highlight=False)
    return 0


def _check_picture(path: Path | None) -> None:
    if path is not None and (path.suffix not in _PICTURES or not path.parent.is_dir()):
        raise UserError(
            f"--plot: expected a file in an existing folder, its name ending in {', '.join(_PICTURES)}; got "
            f"{str(path)!r}. Correct the name or make the folder."
        )
