"""Results as tables: for the terminal, and in Markdown for README and docs."""

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


HEADLINE_PEERS = ("sdpa", "full", "diffusers-sliced", "slicemod", "slicemod-exact")
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
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = machine["processor"] if machine["device"] == "cpu" else f"{machine['device']}, {machine['processor']}"
    instructions = [machine["cpu_capability"], *machine.get("half_precision", [])]  # which older results lack
    if machine.get("native_obstacle"):
        instructions.append(f"no native kernel: {machine['native_obstacle']}")
    rates = {row.setting.dtype: row.product_rate for row in results.measurements}
    products = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items())
    return (
        f"{where} ({', '.join(instructions)}), {machine['threads']} threads on {machine['cores']} cores, {versions}, "
        f"{machine['date']}. A large matrix product runs at {products}."
    )


def markdown_tables(results: Results) -> str:
    """Every comparison as a Markdown table under its name, and what was left out; folded away on a page."""
    blocks = [
        f"**{work}: {setting}**\n\n{_markdown(COLUMNS, [_cells(row) for row in rows])}"
        for work, setting, rows in results.comparisons()
    ]
    if results.left_out:
        blocks.append("Left out:\n\n" + "\n".join(f"- {line}" for line in left_out_lines(results.left_out)))
    return "\n\n".join(["<details>\n<summary>Every figure of this run</summary>", *blocks, "</details>"])


def markdown_summary(results: Results) -> str:
    """A table for each series at its largest size, a row for each peer, a column for each setting."""
    return "\n\n".join(f"### {work}\n\n{_settings_side_by_side(rows)}" for work, rows in _largest_works(results))


def markdown_headline(results: Results) -> str:
    """The first table of `markdown_summary`, with the rows of `HEADLINE_PEERS`: small enough for README."""
    _, rows = next(_largest_works(results))
    return _settings_side_by_side([row for row in rows if row.peer in HEADLINE_PEERS])


def _largest_works(results: Results) -> Iterator[tuple[str, list[Measurement]]]:
    for work, rows in groupby(largest_sizes(results.measurements), lambda row: row.work):
        yield work, list(rows)


def _settings_side_by_side(rows: Sequence[Measurement]) -> str:
    settings = list(dict.fromkeys(row.setting for row in rows))
    lines = []
    for peer, found in by_peer(rows):
        cells = {
            row.setting: f"{_time(row.seconds)} ({row.ratio:.2f})<br>{size_text(row.peak_bytes)}".replace(" ", "&nbsp;")
            for row in found
        }
        name = f"**{peer}**" if peer.startswith("slicemod") else peer
        lines.append((name, *(cells.get(setting, "-") for setting in settings)))
    return _markdown(("attention", *map(str, settings)), lines)


def markdown_growth(results: Results) -> str:
    """`growth_tables` in Markdown."""
    return "\n\n".join(f"### {title}\n\n{_markdown(GROWTH_COLUMNS, rows)}" for title, rows in _growths(results))


def _growths(results: Results) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Title and rows for each setting."""
    in_tokens = [row for row in results.measurements if row.unit == "tokens"]
    for setting, found in groupby(sorted(in_tokens, key=lambda row: str(row.setting)), lambda row: row.setting):
        rows = list(found)
        yield f"{rows[0].series}: {setting}", [cells for _, same in by_peer(rows) for cells in _growth_of(same)]


def _growth_of(rows: Sequence[Measurement]) -> Iterator[tuple[str, ...]]:
    """A row for each number of tokens of one peer."""
    middle = statistics.median(row.seconds / row.size**2 for row in rows)
    for row in rows:
        pace = row.seconds / row.size**2
        share, beyond = f"{row.rate_share:.0%}", size_text(row.peak_bytes - row.output_bytes)
        yield (
            row.peer, f"{row.size:,}", _time(row.seconds), f"{pace * 1e9:.2f} ns", f"{pace / middle:.2f}", share, beyond
        )  # fmt: skip


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


def _cells(row: Measurement) -> tuple[str, ...]:
    return (
        row.peer,
        _time(row.seconds),
        f"{row.ratio:.2f}",
        f"{row.spread[0]:.2f}-{row.spread[1]:.2f}",
        size_text(row.peak_bytes),
        f"{row.rate_share:.0%}",
        f"{row.error:.1e}",
    )


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:,.0f} µs"
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, min_width=88)
    for column in columns:
        table.add_column(column, justify="left" if column == "attention" else "right", no_wrap=True)
    return table


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join(head + [f"| {' | '.join(row)} |" for row in rows])
