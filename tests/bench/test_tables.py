"""Tables for the terminal show the figures that were measured."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from slicemod.bench.comparing import LeftOut
from slicemod.bench.tables import (
    comparison_tables,
    growth_tables,
    left_out_lines,
    machine_line,
)
from tests.bench.tiny import INFERENCE, made_up_results


def test_every_measurement_has_its_row() -> None:
    console = Console(width=120, file=StringIO(), record=True)
    for table in comparison_tables(made_up_results()):
        console.print(table)
    printed = console.export_text()
    assert printed.count("slicemod") == 2 + 3
    assert "layer, 512 px: float32, inference" in printed
    assert "51.20 s" in printed  # SDPA's
    assert "1.0e-07" in printed


def test_the_growth_table_is_relative_to_the_median_pace() -> None:
    console = Console(width=120, file=StringIO(), record=True)
    for table in growth_tables(made_up_results()):
        console.print(table)
    rows = [line.split() for line in console.export_text().splitlines() if line.strip().startswith("sdpa")]
    assert [(row[1], *row[4:7]) for row in rows] == [
        ("1,024", "1.00", "ns", "1.00"), ("2,048", "1.10", "ns", "1.10"), ("4,096", "0.90", "ns", "0.90")
    ]  # fmt: skip


def test_reasons_are_said_once() -> None:
    twice = [LeftOut(f"layer, {size} px", INFERENCE, "xformers", "is not installed") for size in (256, 512)]
    assert left_out_lines(twice) == ["xformers: is not installed (2 times)"]


def test_the_machine_is_named() -> None:
    line = machine_line(made_up_results())
    assert (
        "Some CPU (AVX512, avx512_bf16, amx_bf16), 2 threads on 3 cores; slicemod 0.1, torch 2.14, 2026-01-01" in line
    )
    assert "200 GFLOP/s in float32" in line


def test_the_table_that_kernels_are_chosen_by_is_named() -> None:
    results = made_up_results()
    results.machine["kernels_by"] = "built-in table"
    assert "torch 2.14, kernels by the built-in table, 2026-01-01" in machine_line(results)


def test_a_machine_without_the_native_kernel_says_why() -> None:
    results = made_up_results()
    results.machine["native_obstacle"] = "SLICEMOD_NATIVE is 0"
    assert "amx_bf16, no native kernel: SLICEMOD_NATIVE is 0)" in machine_line(results)
