"""Results as tables for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.box import SIMPLE
from rich.table import Table

from slicemod.bench.comparing import LeftOut, Measurement
from slicemod.bench.results import Results
from slicemod.memory.sizes import size_text

COLUMNS = ("attention", "time", "to SDPA", "quartiles", "peak", "of product", "error")


def comparison_tables(results: Results) -> Iterator[Table]:
    """A table for each work and setting, a row for each peer."""
    for work, setting, rows in results.comparisons():
        table = _table(f"{work}: {setting}", COLUMNS)
        for row in rows:
            table.add_row(*_cells(row), style="bold" if row.peer.startswith("slicemod") else "")
        yield table


def growth_tables(results: Results) -> Iterator[Table]:
    """Time per N^2 and peak beyond inputs and output against the number of tokens N, a table for each setting."""
    for title, rows in _growths(results):
        table = _table(title, GROWTH_COLUMNS)
        for cells in rows:
            table.add_row(*cells)
        yield table


GROWTH_COLUMNS = ("attention", "N", "time", "time / N²", "to median", "of product", "peak beyond in- and output")


def left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    """A line for each peer and reason, with the number of comparisons that it was left out of."""
    found: dict[tuple[str, str], list[LeftOut]] = {}
    for entry in left_out:
        found.setdefault((entry.peer, entry.reason), []).append(entry)
    return [
        f"{peer}: {reason}"
        + (f" ({entries[0].work}: {entries[0].setting})" if len(entries) == 1 else f" ({len(entries)} times)")
        for (peer, reason), entries in found.items()
    ]


def machine_line(results: Results) -> str:
    """The machine in a sentence."""
    rates = {row.setting.dtype: row.product_rate for row in results.measurements}
    products = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items())
    return f"{machine_name(results)}; {versions(results)}. A large matrix product runs at {products}."


def machine_name(results: Results) -> str:
    """Device or processor, its vector instructions, and how many of its cores were used."""
    machine = results.machine
    where = machine["processor"] if machine["device"] == "cpu" else f"{machine['device']}, {machine['processor']}"
    instructions = [machine["cpu_capability"], *machine.get("half_precision", [])]  # which older results lack
    if machine.get("native_obstacle"):
        instructions.append(f"no native kernel: {machine['native_obstacle']}")
    return f"{where} ({', '.join(instructions)}), {machine['threads']} threads on {machine['cores']} cores"


def versions(results: Results) -> str:
    """Of what the figures depend on, and the day."""
    found = results.machine["versions"]
    named = [f"{name} {found[name]}" for name in ("slicemod", "torch", "diffusers") if name in found]
    by = results.machine.get("kernels_by")  # which older results lack
    return ", ".join([*named, *([f"kernels by the {by}"] if by else []), results.machine["date"]])


def _growths(results: Results) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Title and rows for each setting."""
    in_tokens = [row for row in results.measurements if row.unit == "tokens"]
    for setting, found in groupby(sorted(in_tokens, key=lambda row: str(row.setting)), lambda row: row.setting):
        rows = list(found)
        yield f"{rows[0].series}: {setting}", [cells for _, same in by_peer(rows) for cells in _growth_of(same)]


def _growth_of(rows: Sequence[Measurement]) -> Iterator[tuple[str, ...]]:
    """A row for each number of tokens of one peer."""
    middle = statistics.median(row.pace for row in rows)
    for row in rows:
        share, beyond = f"{row.rate_share:.0%}", size_text(row.beyond_bytes)
        yield (
            row.peer,
            f"{row.size:,}",
            time_text(row.seconds),
            f"{row.pace * 1e9:.2f} ns",
            f"{row.pace / middle:.2f}",
            share,
            beyond,
        )


def by_peer(rows: Sequence[Measurement]) -> Iterator[tuple[str, list[Measurement]]]:
    """The measurements of each peer by size, for peers in the order in which they come."""
    order = list(dict.fromkeys(row.peer for row in rows))
    ordered = sorted(rows, key=lambda row: (order.index(row.peer), row.size))
    for peer, group in groupby(ordered, lambda row: row.peer):
        yield peer, list(group)


def largest_sizes(rows: Sequence[Measurement]) -> list[Measurement]:
    """The measurements at the largest size of each series."""
    largest = {row.series: row.size for row in sorted(rows, key=lambda row: row.size)}
    return [row for row in rows if row.size == largest[row.series]]


def named_works(rows: Sequence[Measurement]) -> tuple[str, dict[str, str]]:
    """What works are called beside each other: the size that all have, or nothing; and the rest of each one's name."""
    sizes = {f", {row.size} {row.unit}" for row in rows}
    common = sizes.pop() if len(sizes) == 1 else ""
    return common, {row.work: row.work.removesuffix(common) for row in rows}


def _cells(row: Measurement) -> tuple[str, ...]:
    return (
        row.peer,
        time_text(row.seconds),
        f"{row.ratio:.2f}",
        f"{row.spread[0]:.2f}-{row.spread[1]:.2f}",
        size_text(row.peak_bytes),
        f"{row.rate_share:.0%}",
        f"{row.error:.1e}",
    )


def time_text(seconds: float) -> str:
    """In microseconds, milliseconds or seconds."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:,.0f} µs"
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, min_width=88)
    for column in columns:
        table.add_column(column, justify="left" if column == "attention" else "right", no_wrap=True)
    return table
