"""`slicemod kernels`: which kernels a machine has, which one each layer of a model takes, and why no better one."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import torch

from slicemod.kernels.native.build import build
from slicemod.kernels.table_in_use import BUILT_IN, NO_TABLE, TableInUse, table_in_use
from slicemod.memory.sizes import size_text
from slicemod.planning.kernel_choices import choices, kernels_on
from slicemod.planning.kernels_options import parser
from slicemod.planning.kernels_report import (
    Reasons,
    choice_as_json,
    choices_table,
    kernels_table,
    presence_as_json,
    table_as_json,
)
from slicemod.planning.memory_given import bytes_given, is_here
from slicemod.planning.model_layers import layers_of
from slicemod.planning.resolutions import check_resolutions
from slicemod.printing import print_json, wide_console
from slicemod.user_error import FieldError, UserError

NOTHING_MEASURED = TableInUse(NO_TABLE, "nothing was measured")


def run(arguments: Sequence[str]) -> int:
    """Prints the kernels and the choices; `arguments[0]` is the command's name."""
    try:
        return _run(parser().parse_args(arguments[1:]))
    except FieldError as error:
        raise error.of_option({}) from error


def _run(options: Namespace) -> int:
    if options.build:
        return _build(as_json=options.json)
    device = _default_device() if options.device is None else torch.device(options.device)
    dtype = options.dtype or ("float32" if device.type == "cpu" else "float16")
    models = {model: layers_of(model) for model in options.model}
    images: list[tuple[str, int]] = []
    for model, known in models.items():
        resolutions = [known.pixels] if options.resolution is None else options.resolution
        check_resolutions(resolutions, known.step)
        images += [(model, pixels) for pixels in resolutions]
    free = bytes_given("budget", options.budget, device)
    present = list(kernels_on(device))
    chosen = {
        (model, pixels): list(choices(models[model], pixels, device, getattr(torch, dtype), free))
        for model, pixels in images
    }
    table = table_in_use() if device.type == "cpu" else NOTHING_MEASURED
    if options.json:
        told = [
            {"model": model, "pixels": pixels, "layers": [choice_as_json(choice) for choice in found]}
            for (model, pixels), found in chosen.items()
        ]
        about = {
            "device": device.type,
            "is_here": is_here(device),
            "dtype": dtype,
            "budget": free,
            "table": table_as_json(table),
        }
        return print_json(about | {"kernels": [presence_as_json(kernel) for kernel in present], "models": told})
    console = wide_console()
    where = device.type if is_here(device) else f"{device.type} (not here, planned for)"
    console.print(kernels_table(f"kernels on {where}, best first", present))
    reasons = Reasons()
    for (model, pixels), found in chosen.items():
        title = f"{model} at {pixels} x {pixels}, {dtype}, a budget of {size_text(free)} for each call"
        console.print(choices_table(title, found, reasons))
    for line in reasons.lines():
        console.print(line, highlight=False)
    if table.table.rows:
        name = "the built-in table" if table.source == BUILT_IN else f"the table {table.source}"
        console.print(f"which kernel is faster is from {name}: {table.table}", highlight=False, soft_wrap=True)
    return 0


def _build(*, as_json: bool) -> int:
    try:
        path = str(build())
    except RuntimeError as error:
        raise UserError(f"--build: {error}") from error
    if as_json:
        return print_json({"native": path})
    print(f"the native kernel is in {path}")
    return 0


def _default_device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found
