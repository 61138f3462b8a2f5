"""Tables show the figures that were measured, and Markdown blocks hold the same."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from slicemod.bench.comparing import LeftOut, Setting
from slicemod.bench.markdown_blocks import FORMS, fill_blocks, named_results
from slicemod.bench.tables import (
    comparison_tables,
    growth_tables,
    left_out_lines,
    machine_line,
    markdown_growth,
    markdown_headline,
    markdown_summary,
    markdown_tables,
)
from slicemod.user_error import UserError
from tests.bench.tiny import INFERENCE, made_up_results


def test_every_measurement_has_its_row() -> None:
    console = Console(width=120, file=StringIO(), record=True)
    for table in comparison_tables(made_up_results()):
        console.print(table)
    printed = console.export_text()
    assert printed.count("slicemod") == 2
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


def test_growth_is_told_apart_by_setting() -> None:
    results = made_up_results()
    half = Setting("bfloat16", "inference")
    results.measurements += [replace(row, setting=half, seconds=2 * row.seconds) for row in results.measurements]
    tables = [table.split("|---", 1)[1] for table in markdown_growth(results).split("### ")[1:]]
    paces = [re.findall(r"[\d.]+ ns \| [\d.]+", table) for table in tables]
    assert paces[0] == ["2.00 ns | 1.00", "2.20 ns | 1.10", "1.80 ns | 0.90"]
    assert paces[1] == ["1.00 ns | 1.00", "1.10 ns | 1.10", "0.90 ns | 0.90"]


def test_the_summary_has_a_row_for_each_peer_at_the_largest_size() -> None:
    layer, calls = markdown_summary(made_up_results()).split("### ")[1:]
    assert layer.splitlines()[0] == "layer, 512 px"
    assert layer.replace("&nbsp;", " ").splitlines()[2:] == [
        "| attention | float32, inference |", "|---|---:|", "| sdpa | 51.20 s (512.00)<br>4.4 MiB |",
        "| **slicemod** | 46.08 s (460.80)<br>3.4 MiB |", "| full | 153.60 s (1536.00)<br>43.9 MiB |", "",
    ]  # fmt: skip
    assert calls.splitlines()[0] == "attention, 4096 tokens"


def test_the_headline_has_a_column_for_each_setting() -> None:
    results = made_up_results()
    half = [
        replace(row, setting=Setting("bfloat16", "inference")) for row in results.measurements if row.peer != "full"
    ]
    results.measurements = sorted(results.measurements + half, key=lambda row: (row.unit == "tokens", row.size))
    lines = markdown_headline(results).splitlines()
    assert lines[0] == "| attention | float32, inference | bfloat16, inference |"
    assert [line.split(" | ")[-1] for line in lines[2:]] == [
        "51.20&nbsp;s&nbsp;(512.00)<br>4.4&nbsp;MiB |",
        "46.08&nbsp;s&nbsp;(460.80)<br>3.4&nbsp;MiB |",
        "- |",
    ]


def test_the_headline_is_small() -> None:
    results = made_up_results()
    results.measurements = [
        replace(row, peer="ldm") if row.peer == "full" else row for row in results.measurements if row.unit != "tokens"
    ]
    rows = markdown_headline(results).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| sdpa", "| **slicemod**"]


def test_all_tables_come_in_markdown_with_what_was_left_out() -> None:
    text = markdown_tables(made_up_results())
    assert text.count("**layer") == 2
    assert "- xformers: is not installed" in text
    assert text.startswith("<details>")
    assert text.endswith("</details>")
    assert "0.90 ns" in markdown_growth(made_up_results())


def test_reasons_are_said_once() -> None:
    twice = [LeftOut(f"layer, {size} px", INFERENCE, "xformers", "is not installed") for size in (256, 512)]
    assert left_out_lines(twice) == ["xformers: is not installed (2 times)"]


def test_the_machine_is_named() -> None:
    line = machine_line(made_up_results())
    assert "Some CPU (AVX512, avx512_bf16, amx_bf16), 2 threads on 3 cores" in line
    assert "200 GFLOP/s in float32" in line


def test_a_machine_without_the_native_kernel_says_why() -> None:
    results = made_up_results()
    results.machine["native_obstacle"] = "SLICEMOD_NATIVE is 0"
    assert "amx_bf16, no native kernel: SLICEMOD_NATIVE is 0)" in machine_line(results)


def test_blocks_of_a_page_are_filled_and_nothing_else_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n\n<!-- slicemod bench one.json summary -->\nold\n<!-- end -->\n\nbetween\n\n"
        "<!-- slicemod bench one.json trade -->\n<!-- end -->\n"
        "<!-- slicemod bench two.json machine -->\nkept\n<!-- end -->\n"
    )
    pictures = [tmp_path / "images" / f"{kind}-float32.png" for kind in ("trade", "resolution")]
    filled = fill_blocks(page, "one.json", made_up_results(), pictures)
    assert FORMS["summary"](made_up_results()) in filled
    assert "old" not in filled
    assert "![trade float32](images/trade-float32.png)" in filled
    assert "resolution-float32.png" not in filled
    assert "machine -->\nkept\n" in filled
    assert filled.startswith("before\n\n<!-- slicemod bench one.json summary -->\n")
    page.write_text(filled)
    assert fill_blocks(page, "one.json", made_up_results(), pictures) == filled
    assert named_results(filled) == {"one.json", "two.json"}


def test_a_page_without_such_a_block_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(UserError, match=r"page\.md: expected a block"):
        fill_blocks(page, "one.json", made_up_results(), [])
    page.write_text("<!-- slicemod bench one.json chart -->\n<!-- end -->")
    with pytest.raises(UserError, match="'chart'"):
        fill_blocks(page, "one.json", made_up_results(), [])
