"""`slicemod plan`: whether a picture fits a device, which part limits it, and up to which resolution."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from slicemod.arguments import require_folder_of
from slicemod.call import dtype_name
from slicemod.config import SliceConfig
from slicemod.planning.denoisers import find_denoiser
from slicemod.planning.memory_given import bytes_given
from slicemod.planning.picture import picture_planner
from slicemod.planning.picture_kind import PictureKind
from slicemod.planning.picture_model import find_picture_model
from slicemod.planning.picture_parts import left_whole, sliced_parts
from slicemod.planning.picture_report import largest_as_json, largest_table, names_of_ways, parts_table, whole_as_json
from slicemod.planning.picture_report import remarks as whole_remarks
from slicemod.planning.plan_options import parser
from slicemod.planning.plan_report import as_json, attention_table, remarks, step_table
from slicemod.planning.resolutions import check_resolutions
from slicemod.planning.step_peaks import StepPlanner
from slicemod.planning.step_source import StepSource
from slicemod.planning.unet_step import StepKind
from slicemod.printing import print_json, wide_console
from slicemod.user_error import FieldError, UserError

_PICTURES = (".png", ".svg", ".pdf")


_OPTIONS = {"cached": "--uncached", "checkpoint": "--checkpoint-layers"}  # where an option is not named as its field


def run(arguments: Sequence[str]) -> int:
    """Prints the plans; `arguments[0]` is the command's name."""
    try:
        return _run(parser().parse_args(arguments[1:]))
    except FieldError as error:
        raise error.of_option(_OPTIONS) from error


def _run(options: Namespace) -> int:
    kind = PictureKind(
        options.dtype,
        options.device,
        options.batch,
        train=options.train,
        cached=not options.uncached,
        checkpoint_blocks=options.checkpoint_blocks,
        offload=options.offload,
        feed_forward=options.feed_forward,
        prepared=options.prepared,
    )
    if options.checkpoint_layers and not options.train:
        raise FieldError("checkpoint: expected together with train; got it alone. Add train or leave it.")
    _check_picture(options.plot)
    try:
        slicing = SliceConfig(
            policy=options.policy,
            kernel=options.kernel,
            checkpoint="layer" if options.checkpoint_layers else True,
        )
    except ValueError as error:
        raise UserError(f"--{error}") from error
    memory = bytes_given("memory", options.memory, torch.device(options.device))
    if options.part == "whole":
        return _plan_whole(options, kind, slicing, memory)
    return _plan_step(options, kind, slicing, memory)


def _plan_whole(options: Namespace, kind: PictureKind, slicing: SliceConfig, memory: int) -> int:
    model = find_picture_model(options.model, options.frames)
    check_resolutions(options.resolution, model.denoiser.resolution_step)
    step = kind.step(model.denoiser)
    title = _title(options, step, model.denoiser, "the whole of ")
    names = names_of_ways(sliced_parts(model, kind, slicing))
    with Console(stderr=True).status("") as status:
        planner = picture_planner(model, kind, memory, slicing, status.update)
        status.update("looking for the largest images")
        plans = [planner.plan(pixels) for pixels in options.resolution]
        largest = [planner.largest(way) for way in planner.ways]
        if options.plot is not None:
            status.update(f"drawing {options.plot}")
            from slicemod.planning.picture_plot import plot_largest

            plot_largest(planner, names, options.plot, title.partition(";")[0].capitalize())
    if options.json:
        found = {"resolutions": [whole_as_json(plan) for plan in plans], "largest_image": largest_as_json(largest)}
        return print_json(_about(options, step, memory) | found | {"left_out": list(model.left_out)})
    console = wide_console()
    console.print(f"{title}\n", highlight=False)
    console.print(largest_table(planner, names, largest))
    console.print(parts_table(planner, plans))
    for remark in (*whole_remarks(planner, model.left_out), *left_whole(model)):
        console.print(remark, highlight=False)
    return 0


def _plan_step(options: Namespace, kind: PictureKind, slicing: SliceConfig, memory: int) -> int:
    source = find_denoiser(options.model, options.frames)
    check_resolutions(options.resolution, source.resolution_step)
    step = kind.step(source)
    title = _title(options, step, source)
    with Console(stderr=True).status("") as status:
        planner = StepPlanner(source, step, memory, slicing, status.update, swapped=kind.feed_forward)
        status.update("looking for the largest resolutions")
        plans = [planner.plan(pixels) for pixels in options.resolution]
        limits = {way: planner.largest(way) for way in planner.ways}
        if options.plot is not None:
            status.update(f"drawing {options.plot}")
            from slicemod.planning.plan_plot import plot_peaks

            plot_peaks(planner, options.plot, title)
    if options.json:
        found = {"resolutions": [as_json(plan) for plan in plans], "largest_resolution": limits}
        return print_json(_about(options, step, memory) | found)
    console = wide_console()
    console.print(f"{title}\n", highlight=False)
    layers_of = [(str(plan.pixels), plan.layers) for plan in plans]
    console.print(attention_table("attention layers, by slicemod", "pixels", layers_of))
    console.print(step_table(planner, plans))
    for remark in remarks(planner, plans):
        console.print(remark, highlight=False)
    return 0


def _title(options: Namespace, step: StepKind, source: StepSource, what: str = "") -> str:
    blocks = ", blocks checkpointed" if step.checkpoint_blocks else ""
    layers = ", layers checkpointed" if options.checkpoint_layers else ""
    feed_forward = ", feed-forwards in slices" if options.feed_forward else ""
    cached = ", latents and text not cached" if options.uncached else ""
    task = f"training{blocks}{cached}" if step.training else "inference"
    video = f", {source.frames} frames" if source.frames > 1 else ""
    offload = f", offload {options.offload}" if options.offload != "none" else ""
    prepared = ", prepared" if step.prepared else ""
    return (
        f"{what}{options.model}, {task}, batch {step.batch}{video}, {dtype_name(step.dtype)}, on {step.device_type} "
        f"(simulated){prepared}{offload}; slicemod: policy {options.policy}, kernel {options.kernel}{layers}"
        f"{feed_forward}"
    )


def _about(options: Namespace, step: StepKind, memory: int) -> dict[str, Any]:
    about = {"model": options.model, "part": options.part, "device": step.device_type, "dtype": dtype_name(step.dtype)}
    about |= {"batch": step.batch, "training": step.training, "offload": options.offload}
    about |= {"prepared": step.prepared}
    return about | {"policy": options.policy, "kernel": options.kernel, "memory": memory}


def _check_picture(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix not in _PICTURES:
        raise UserError(f"--plot: expected a name that ends in {', '.join(_PICTURES)}; got {path}. Correct it.")
    require_folder_of(path, "--plot")
