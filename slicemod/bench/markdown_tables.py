"""Results in Markdown: the small tables and the sentences of README and docs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from slicemod.bench.comparing import Measurement
from slicemod.bench.peers import OURS, SDPA
from slicemod.bench.results import Results
from slicemod.bench.tables import by_peer, largest_sizes, machine_line, machine_name, named_works, versions
from slicemod.memory.sizes import size_text


def peers_table(results: Results) -> str:
    """The first series at its largest size: a row for each peer, a column for each setting."""
    rows = first_series(results)
    settings = list(dict.fromkeys(row.setting for row in rows))
    lines = []
    for peer, found in by_peer(rows):
        cells = {row.setting: _cell(row) for row in found}
        lines.append((f"**{peer}**" if peer == OURS else peer, *(cells.get(setting, "-") for setting in settings)))
    return _table((rows[0].work, *map(str, settings)), lines)


def works_table(results: Results) -> str:
    """Ours: a row for each series at its largest size, a column for each setting."""
    rows = [row for row in largest_sizes(results.measurements) if row.peer == OURS]
    settings = results.settings()
    lines = []
    size, names = named_works(rows)
    for work, name in names.items():
        cells = {row.setting: _cell(row) for row in rows if row.work == work}
        lines.append((name, *(cells.get(setting, "-") for setting in settings)))
    return _table((OURS + size, *map(str, settings)), lines)


def growth_table(results: Results) -> str:
    """Ours: three rows for each setting, a column for each number of tokens."""
    rows = [row for row in results.measurements if row.peer == OURS and row.unit == "tokens"]
    sizes = sorted({row.size for row in rows})
    lines = []
    for setting in results.settings():
        found = {row.size: row for row in rows if row.setting == setting}
        for name, text in _GROWTH:
            lines.append((f"{setting}: {name}", *(text(found[size]) if size in found else "-" for size in sizes)))
    return _table((rows[0].series, *(f"{size:,}" for size in sizes)), lines)


def span_sentence(results: Results) -> str:
    """From where to where the ratios of ours go, and which works are at the ends."""
    rows = [row for row in largest_sizes(results.measurements) if row.peer == OURS]
    peaks = [row.peak_bytes / base.peak_bytes for row in rows for base in _sdpas_of(row, results)]
    times = [row.ratio for row in rows]
    middle = f", {statistics.median(times):.2f} in the middle" if len(rows) > 2 else ""
    _, names = named_works(rows)
    ends = [
        f"{end}: {names[row.work]}, {row.setting}" if len(names) > 1 else f"{end}: {row.setting}"
        for end, row in (("Least time", rows[times.index(min(times))]), ("most", rows[times.index(max(times))]))
    ]
    where = f" {'; '.join(ends)}." if len(rows) > 1 else ""
    return f"**{_span(times)} of SDPA's time**{middle}, and {_span(peaks)} of its memory.{where}"


def growth_sentence(results: Results) -> str:
    """How flat ours is."""
    sentences = []
    for setting in results.settings():
        rows = [row for row in results.measurements if row.peer == OURS and row.setting == setting]
        sizes = [row.size for row in rows]
        paces = [row.pace / statistics.median(other.pace for other in rows) for row in rows]
        peaks = sorted(row.beyond_bytes for row in rows)
        memory = " to ".join(dict.fromkeys(size_text(peak) for peak in (peaks[0], peaks[-1])))
        where = f"In {setting.dtype}, from {min(sizes):,} to {max(sizes):,} tokens"
        sentences.append(f"{where}, the **time per N² is {_span(paces)} of its median**, and the memory {memory}.")
    return " ".join(sentences)


def runs_table(runs: Sequence[tuple[Path, Results]], folder: Path) -> str:
    """A row for each file of results: where, with what, and the first series of each; links go out from `folder`."""
    lines = []
    for path, results in runs:
        rows = first_series(results)
        found = ", ".join(f"{row.ratio:.2f} ({row.setting})" for row in rows if row.peer == OURS)
        lines.append((_link(path, folder), machine_name(results), versions(results), f"{rows[0].work}: {found}"))
    return _table(("run", "machine", "versions", "time to SDPA's of the largest work"), lines, align="---")


def machine_sentence(path: Path, results: Results, folder: Path) -> str:
    """`machine_line`, with a link to the run from `folder`."""
    return f"{_link(path, folder)}: {machine_line(results)}"


def first_series(results: Results) -> list[Measurement]:
    """Of the series that was measured first, what there is at its largest size."""
    rows = largest_sizes(results.measurements)
    return [row for row in rows if row.series == rows[0].series]


def _span(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))


def _sdpas_of(row: Measurement, results: Results) -> list[Measurement]:
    """SDPA on the same work in the same setting."""
    return [
        base
        for base in results.measurements
        if (base.work, base.setting, base.peer) == (row.work, row.setting, SDPA.name)
    ]


_GROWTH: tuple[tuple[str, Callable[[Measurement], str]], ...] = (
    ("to SDPA's time", lambda row: f"{row.ratio:.2f}"),
    ("time / N²", lambda row: f"{row.pace * 1e9:.2f}&nbsp;ns"),
    ("memory", lambda row: _unbroken(size_text(row.beyond_bytes))),
)


def _cell(row: Measurement) -> str:
    return _unbroken(f"{row.ratio:.2f} ({_three_digits(row.seconds)})<br>{size_text(row.peak_bytes)}")


def _three_digits(seconds: float) -> str:
    unit, value = (
        ("s", seconds) if seconds >= 1 else ("ms", seconds * 1e3) if seconds >= 1e-3 else ("µs", seconds * 1e6)
    )
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:#.3g} {unit}"


def _link(path: Path, folder: Path) -> str:
    return f"[{path.name}]({path.relative_to(folder).as_posix()})"


def _unbroken(text: str) -> str:
    return text.replace(" ", "&nbsp;")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    head = [f"| {' | '.join(columns)} |", "|---" + f"|{align}" * (len(columns) - 1) + "|"]
    return "\n".join(head + [f"| {' | '.join(row)} |" for row in rows])
