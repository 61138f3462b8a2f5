"""`slicemod bench`: ours against its peers, layer by layer, on the reader's own machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import slicemod
from slicemod.arguments import ArgumentParser
from slicemod.bench.comparing import Measurement, compare, product_rate
from slicemod.bench.peers import QUICK_WORKLOADS, WORKLOADS
from slicemod.user_error import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(arguments: Sequence[str]) -> int:
    """Measures and prints; `arguments[0]` is the command's name."""
    options = _parser().parse_args(arguments[1:])
    if options.rounds < 1:
        raise UserError(f"--rounds: expected 1 or more; got {options.rounds}.")
    out = None if options.json is None else Path(options.json)
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--json: {out.parent} is no folder; expected one to write {out.name} into. Make it first.")
    rate = product_rate(_DTYPES[options.dtype])
    machine = _machine(options.dtype, rate)
    console = Console(width=max(Console().width, 100))
    measured: list[Measurement] = []
    try:
        _measure(options, rate, measured, console)
    except KeyboardInterrupt:
        console.print("interrupted: what was measured so far follows")
    for table in _tables(measured):
        console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), style="dim")
    if out is not None:
        out.write_text(json.dumps({"machine": machine, "measurements": [asdict(row) for row in measured]}, indent=2))
        console.print(f"written to {out}")
    return 0


def _measure(options: Any, rate: float, measured: list[Measurement], console: Console) -> None:
    workloads = QUICK_WORKLOADS if options.quick else WORKLOADS
    modes = [mode for mode in (False, True) if options.mode in ("both", "train" if mode else "inference")]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(workloads) * len(modes) * (options.rounds + 1))
        for work in workloads:
            for training in modes:
                dtype = _DTYPES[options.dtype]
                for result in compare(work, dtype, training=training, rounds=options.rounds, rate=rate):
                    if isinstance(result, Measurement):
                        measured.append(result)
                    else:
                        progress.update(task, advance=1, description=result)


def _machine(dtype: str, rate: float) -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "slicemod": slicemod.__version__,
        "dtype": dtype,
        "large_product_gflops": round(rate / 1e9, 1),
    }


def _tables(measured: list[Measurement]) -> Iterator[Table]:
    """A table for each layer and mode."""
    for (workload, training), rows in groupby(measured, lambda row: (row.workload, row.training)):
        table = Table(
            title=f"{workload}, {'a training step' if training else 'inference'}",
            title_justify="left",
            box=SIMPLE,
            min_width=88,
        )
        table.add_column("attention")
        for column in ("time", "to SDPA", "quartiles", "peak", "of product rate", "error"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(
                row.peer,
                f"{row.seconds * 1e3:.1f} ms",
                f"{row.ratio:.2f}",
                f"{row.spread[0]:.2f}-{row.spread[1]:.2f}",
                f"{row.peak_bytes / 2**20:.1f} MiB",
                f"{row.rate_share:.0%}",
                f"{row.error:.1e}",
            )
        yield table


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "slicemod bench",
        description="Times cross-attention layers of Stable Diffusion on this machine's CPU, ours and its peers', in "
        "interleaved rounds, and measures their peak memory.",
        epilog="A ratio is the median over the rounds of a layer's time by that of SDPA in the same round. A peer "
        "whose error against float64 is over 4 times SDPA's is left out.",
    )
    parser.add_argument("--dtype", default="float32", choices=tuple(_DTYPES), help="default: %(default)s")
    parser.add_argument("--mode", default="both", choices=("inference", "train", "both"), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two small layers only")
    parser.add_argument("--json", metavar="FILE", help="also write the measurements here")
    return parser
