"""`slicemod tune`: from which sizes on each kernel pays off on this machine."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from slicemod.arguments import require_folder_of
from slicemod.bench.machine import processor_name
from slicemod.bench.tune_options import parser
from slicemod.bench.tuned_calls import tuned_calls
from slicemod.bench.tuning import Compare, Finding, Tuning, compare_on_this_machine
from slicemod.kernels.crossover_table import Corner, CrossoverTable
from slicemod.kernels.native.binding import NativeLibrary
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.table_in_use import TABLE_VARIABLE, built_in_table, measured_file
from slicemod.printing import print_json, wide_console
from slicemod.user_error import UserError
from slicemod.whole_file import replacing

LEAST_DECIDED = 0.5  # of the calls; with fewer, the machine was busy with something else


def run(arguments: Sequence[str], compare: Compare = compare_on_this_machine) -> int:
    """Measures, prints and keeps the table, or removes it.

    Args:
        arguments: the command's name and its options.
        compare: measures a call.

    Raises:
        UserError: there is nothing to measure, the machine is too busy, or the table cannot be written.
    """
    options = parser().parse_args(arguments[1:])
    if options.seconds <= 0:
        raise UserError(f"--seconds: expected more than 0; got {options.seconds:g}.")
    library = native_library()
    if library is None:
        raise UserError(f"expected a machine with the native kernel, to choose between kernels; {native_obstacle()}.")
    path = measured_file(library, torch.get_num_threads()) if options.output is None else Path(options.output)
    require_folder_of(path, "--output")
    if options.reset:
        return _reset(path, as_json=options.json)
    tuning = Tuning(built_in_table(library), compare, time.monotonic() + options.seconds)
    _measure(tuning)
    decided = sum(finding.is_decided for finding in tuning.findings)
    if decided < LEAST_DECIDED * len(tuning.findings):
        raise UserError(
            f"expected an idle machine; only {decided} of {len(tuning.findings)} measurements are certain, and nothing "
            "is kept. Stop what else is running, or give more --seconds, and try again."
        )
    table = _signed(tuning.table, library)
    with replacing(path) as written:  # another process may be reading it
        written.write_text(table.as_json(), encoding="utf-8")
    _print(table, path, tuning.findings, options)
    return 0


def _measure(tuning: Tuning) -> None:
    groups = list(tuned_calls())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sum(map(len, groups)))
        for call in tuning.measure(groups):
            progress.update(task, advance=1, description=f"{call.calls.kernel}: {call.calls}")


def _signed(table: CrossoverTable, library: NativeLibrary) -> CrossoverTable:
    """The table with what it was measured on."""
    return replace(
        table,
        processor=processor_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        native=library.path.stem,
        measured=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


def _reset(path: Path, *, as_json: bool) -> int:
    existed = path.exists()
    path.unlink(missing_ok=True)
    if as_json:
        print_json({"removed": str(path) if existed else None})
    else:
        print(f"removed {path}; the built-in table serves" if existed else "the built-in table serves already")
    return 0


def _print(table: CrossoverTable, path: Path, findings: Sequence[Finding], options: Any) -> None:
    if options.json:
        measured = [
            {
                **finding.call.calls._asdict(),
                **finding.call.size._asdict(),
                "rival": finding.rival,
                "ratio": None if finding.ratio is None else finding.ratio._asdict(),
                "is_decided": finding.is_decided,
                "is_faster": finding.is_faster,
            }
            for finding in findings
        ]
        print_json({"path": str(path), "table": table.as_dict(), "measured": measured})
        return
    console = wide_console(130)
    console.print(findings_table(table, findings))
    undecided = sum(not finding.is_decided for finding in findings)
    lines = [f"{undecided} of {len(findings)} measurements are undecided; the built-in table has decided those"]
    lines.append(f"written to {path}")
    if options.output is None:
        lines.append("`auto` chooses by it from the next process on; `slicemod tune --reset` removes it")
        if pinned := os.environ.get(TABLE_VARIABLE):
            lines.append(f"but here {TABLE_VARIABLE}={pinned} pins another table")
    else:
        lines.append(f"{TABLE_VARIABLE}={path} has `auto` choose by it")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def findings_table(table: CrossoverTable, findings: Sequence[Finding]) -> Table:
    """A row for each class of calls that was measured: from where on, and the ratios of the calls from there on."""
    title = f"{table}\nfaster from: queries x keys, products of batch, heads, queries, keys and channels"
    shown = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("kernel", "calls", "faster from", "its time there"):
        shown.add_column(column, no_wrap=True)
    rows = {row.calls: row.faster_from for row in table.rows}
    for calls in dict.fromkeys(finding.call.calls for finding in findings):
        reached = [
            finding
            for finding in findings
            if finding.call.calls == calls and any(finding.call.size.reaches(corner) for corner in rows[calls])
        ]
        ratios = [finding.ratio.median for finding in reached if finding.ratio is not None]
        rivals = ", ".join(dict.fromkeys(finding.rival for finding in reached))
        told = f"{min(ratios):.2f} to {max(ratios):.2f} of {rivals}" if ratios else "-"
        shown.add_row(calls.kernel, str(calls), "\n".join(map(_corner_text, rows[calls])) or "never", told)
    return shown


def _corner_text(corner: Corner) -> str:
    products, unit = corner.products, ""
    for larger in ("k", "M", "G"):
        if products < 1000:
            break
        products, unit = round(products / 1000), larger
    return f"{corner.queries} x {corner.keys}, {products}{unit}"
