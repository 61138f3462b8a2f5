"""Tables and sentences of the pages hold the figures that were measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from slicemod.bench.comparing import Setting
from slicemod.bench.markdown_tables import (
    growth_sentence,
    growth_table,
    machine_sentence,
    peers_table,
    runs_table,
    span_sentence,
    works_table,
)
from slicemod.bench.results import Results
from slicemod.bench.tables import machine_line
from tests.bench.tiny import TRAINING, made_up_results


def with_training() -> Results:
    """The made-up layer in training as well, twice as fast by its ratio, and without the peer `full`."""
    results = made_up_results()
    results.measurements = [row for row in results.measurements if row.unit == "px"]
    results.measurements += [
        replace(row, setting=TRAINING, ratio=row.ratio / 2) for row in results.measurements if row.peer != "full"
    ]
    return results


def test_peers_have_a_row_each_and_settings_a_column() -> None:
    assert peers_table(with_training()).splitlines() == [
        "| layer, 512 px | float32, inference | float32, training |",
        "|---|---:|---:|",
        "| sdpa | 512.00&nbsp;(51.2&nbsp;s)<br>4.4&nbsp;MiB | 256.00&nbsp;(51.2&nbsp;s)<br>4.4&nbsp;MiB |",
        "| **slicemod** | 460.80&nbsp;(46.1&nbsp;s)<br>3.4&nbsp;MiB | 230.40&nbsp;(46.1&nbsp;s)<br>3.4&nbsp;MiB |",
        "| full | 1536.00&nbsp;(154&nbsp;s)<br>43.9&nbsp;MiB | - |",
    ]


def test_works_have_a_row_each_with_the_figures_of_ours() -> None:
    results = with_training()
    results.measurements += [replace(row, series="other") for row in results.measurements if row.setting != TRAINING]
    assert works_table(results).splitlines() == [
        "| slicemod, 512 px | float32, inference | float32, training |",
        "|---|---:|---:|",
        "| layer | 460.80&nbsp;(46.1&nbsp;s)<br>3.4&nbsp;MiB | 230.40&nbsp;(46.1&nbsp;s)<br>3.4&nbsp;MiB |",
        "| other | 460.80&nbsp;(46.1&nbsp;s)<br>3.4&nbsp;MiB | - |",
    ]


def test_a_span_goes_from_the_least_to_the_most_ratio() -> None:
    results = with_training()
    assert span_sentence(results) == (
        "**230.40 to 460.80 of SDPA's time**, and 0.78 of its memory. "
        "Least time: float32, training; most: float32, inference."
    )
    results.measurements += [replace(row, series="other", ratio=1.0) for row in results.measurements]
    assert span_sentence(results) == (
        "**1.00 to 460.80 of SDPA's time**, 115.70 in the middle, and 0.78 of its memory. "
        "Least time: other, float32, inference; most: layer, float32, inference."
    )
    results.measurements = results.measurements[:3]
    assert span_sentence(results) == "**230.40 of SDPA's time**, and 0.78 of its memory."


def test_times_have_three_digits() -> None:
    results = made_up_results()
    for seconds, text in (
        (123.4, "123&nbsp;s"),
        (1.0, "1.00&nbsp;s"),
        (0.0123, "12.3&nbsp;ms"),
        (9.1e-5, "91.0&nbsp;µs"),
    ):
        results.measurements = [replace(row, seconds=seconds) for row in results.measurements[:3]]
        assert f"({text})" in peers_table(results)


def test_growth_is_told_for_each_setting() -> None:
    results = made_up_results()
    results.measurements = [row for row in results.measurements if row.unit == "tokens"]
    half = Setting("bfloat16", "inference")
    results.measurements += [replace(row, setting=half, seconds=2 * row.seconds) for row in results.measurements]
    rows = growth_table(results).splitlines()
    assert rows[0] == "| attention | 1,024 | 2,048 | 4,096 |"
    assert rows[3] == "| float32, inference: time / N² | 1.00&nbsp;ns | 1.10&nbsp;ns | 0.90&nbsp;ns |"
    assert rows[6] == "| bfloat16, inference: time / N² | 2.00&nbsp;ns | 2.20&nbsp;ns | 1.80&nbsp;ns |"
    assert rows[7] == "| bfloat16, inference: memory | 6.8&nbsp;KiB | 6.8&nbsp;KiB | 6.8&nbsp;KiB |"
    assert growth_sentence(results).startswith(
        "In float32, from 1,024 to 4,096 tokens, the **time per N² is 0.90 to 1.10 of its median**, "
        "and the memory 6.8 KiB. "
        "In bfloat16, from 1,024 to 4,096 tokens, the "
    )


def test_every_run_names_its_machine_and_its_file() -> None:
    folder = Path("docs")
    path, results = folder / "runs" / "one.json", with_training()
    (row,) = runs_table([(path, results)], folder).splitlines()[2:]
    assert row == (
        "| [one.json](runs/one.json) | Some CPU (AVX512, avx512_bf16, amx_bf16), 2 threads on 3 cores "
        "| slicemod 0.1, torch 2.14, 2026-01-01 "
        "| layer, 512 px: 460.80 (float32, inference), 230.40 (float32, training) |"
    )
    assert machine_sentence(path, results, folder) == f"[one.json](runs/one.json): {machine_line(results)}"
