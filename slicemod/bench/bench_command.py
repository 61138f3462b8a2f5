"""`slicemod bench`: ours against its peers, on the reader's own machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from slicemod.arguments import require_folder_of
from slicemod.bench.bench_options import parser
from slicemod.bench.calls import plain_call
from slicemod.bench.comparing import Comparison, Setting
from slicemod.bench.machine import describe_machine
from slicemod.bench.markdown_blocks import render
from slicemod.bench.peers import Peer, find_peers
from slicemod.bench.pictures import save_pictures
from slicemod.bench.results import Results, load_results
from slicemod.bench.tables import comparison_tables, growth_tables, left_out_lines, machine_line
from slicemod.bench.work import Work
from slicemod.bench.workloads import find_works
from slicemod.memory.budget import Budget
from slicemod.printing import wide_console
from slicemod.user_error import UserError

QUICK_PEERS = ("sdpa", "sdpa-math", "full", "diffusers*", "ldm", "memory-*", "slicemod", "slicemod-exact")
GROWTH_PEERS = ("sdpa", "slicemod", "slicemod-exact")
GROWTH_HEADS, GROWTH_HEAD_DIM = 2, 40  # of Stable Diffusion 1.5, with a quarter of its heads in a quarter of the time
QUICK_SECONDS = 100.0  # after which no comparison and no further round begins


def run(arguments: Sequence[str]) -> int:
    """Measures and prints, or prints what was measured; `arguments[0]` is the command's name."""
    options = parser().parse_args(arguments[1:])
    console = wide_console()
    if options.render:
        for path in (path for page in options.render for path in render(Path(page))):
            console.print(f"written to {path}", highlight=False)
        return 0
    if options.from_file is not None:
        results = load_results(Path(options.from_file))
    else:
        results = _measure(options, list(arguments[1:]), console)
    in_tokens = any(row.unit == "tokens" for row in results.measurements)
    for table in growth_tables(results) if in_tokens else comparison_tables(results):
        console.print(table)
    for line in left_out_lines(results.left_out):
        console.print(f"left out: {line}", style="dim", highlight=False)
    console.print(machine_line(results), style="dim", highlight=False)
    pictures = [] if options.plots is None else save_pictures(results, Path(options.plots))
    for path in [*pictures, *([options.json] if options.json else [])]:
        console.print(f"written to {path}", highlight=False)
    return 0


def _measure(options: Any, command: list[str], console: Console) -> Results:
    """Runs every comparison; after Ctrl-C what there is."""
    _check(options)
    device = torch.device(options.device)
    peers = _peers(options)
    works = _works(options)
    modes = options.mode or (["inference"] if options.growth else ["inference", "training"])
    settings = [Setting(dtype, mode, compiled=options.compile) for dtype in options.dtype for mode in modes]
    results = Results(command, describe_machine(device))
    until = time.monotonic() + (QUICK_SECONDS if options.quick else 60 * options.minutes)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    plan = [
        [(work, setting)] for work in works for setting in settings
        if setting.mode == "training" or not work.training_only
    ]  # fmt: skip
    if options.growth:  # sizes are compared there, and a machine's pace changes from one minute to the next
        plan = [[(work, setting) for work in works] for setting in settings]
    each = len(peers) + options.rounds
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(map(len, plan)) * each)
        begun = 0
        try:
            for together in plan:
                progress.update(task, completed=begun * each)
                begun += len(together)
                if time.monotonic() > until:
                    for work, setting in together:
                        console.print(f"out of time: {work.name} ({setting}) was not begun", highlight=False)
                    continue
                comparisons = [Comparison(work, peers, setting, device) for work, setting in together]
                _compare(comparisons, options, until, results, progress)
        except KeyboardInterrupt:
            console.print("interrupted: what was measured so far follows", highlight=False)
    return results


def _compare(
    comparisons: Sequence[Comparison], options: Any, until: float, results: Results, progress: Progress
) -> None:
    """Comparisons, a round of each in turn, into `results` and its file; so the rounds that were done before Ctrl-C."""
    task = progress.task_ids[0]
    names = [f"{comparison.work.name} ({comparison.setting})" for comparison in comparisons]
    try:
        for comparison, name in zip(comparisons, names, strict=True):
            for peer in comparison.prepare():
                progress.update(task, advance=1, description=f"{name}: checking {peer}")
        rounds = [comparison.rounds(options.rounds, until) for comparison in comparisons]
        for _ in range(options.rounds):
            for of_comparison, name in zip(rounds, names, strict=True):
                for turn in islice(of_comparison, 1):
                    progress.update(task, advance=1, description=f"{name}: round {turn} of {options.rounds}")
    finally:
        for comparison in comparisons:
            results.measurements += comparison.measurements()
            results.left_out += comparison.left_out
        if options.json is not None:
            results.save(Path(options.json))


def _peers(options: Any) -> list[Peer]:
    given = options.peers or (QUICK_PEERS if options.quick else GROWTH_PEERS if options.growth else ("*",))
    return find_peers(list(given), options.budget)


def _works(options: Any) -> list[Work]:
    if options.growth:
        return [plain_call(tokens, GROWTH_HEADS, GROWTH_HEAD_DIM) for tokens in options.tokens]
    if options.quick:  # the largest comes last, where time may be up
        return find_works(["sd15-layers"], [512], batch=1, largest=3)[::-1]
    return find_works(
        options.work,
        options.resolution,
        batch=options.batch,
        largest=options.largest,
        checkpoint_blocks=options.checkpoint_blocks,
    )


def _check(options: Any) -> None:
    for name in ("rounds", "batch", "largest"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: expected 1 or more; got {getattr(options, name)}.")
    if options.minutes <= 0:
        raise UserError(f"--minutes: expected more than 0; got {options.minutes:g}.")
    if options.json is not None:
        require_folder_of(Path(options.json), "--json")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: expected a device that PyTorch sees; it sees no CUDA GPU. Take cpu.")
    try:
        Budget.parse(options.budget)
    except ValueError as error:
        raise UserError(f"--budget: {error}") from error
