"""A table of sizes: the choice by it is monotone, it survives its file, and what is no table is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slicemod.call import AttentionShape, CallSpec, MaskShape
from slicemod.kernels.crossover_table import (
    EXTRAS,
    CallClass,
    Corner,
    CrossoverTable,
    CrossoverTableError,
    Row,
    extra_of,
    read_table,
    table_of,
)

CPU = torch.device("cpu")
SIZES = st.integers(1, 2000)
CORNERS = st.builds(Corner, SIZES, SIZES, st.integers(0, 10**8))


def table(*rows: Row) -> CrossoverTable:
    return CrossoverTable("AVX-512", "a CPU", 3, "2.14.1", "attention-0", "2026-11-28", rows)


def row(*corners: Corner, width: int | None = None, extra: str = "plain", training: bool = False) -> Row:
    return Row(CallClass("native", "float32", training, extra, width), corners)


def call_of(queries: int, keys: int, width: int = 11, batch: int = 2) -> CallSpec:
    return CallSpec(AttentionShape(batch, 3, queries, keys, width, 4), torch.float32, CPU)


@given(st.lists(CORNERS, max_size=4), SIZES, SIZES, st.integers(1, 50), st.tuples(*[st.integers(0, 100)] * 3))
def test_what_pays_off_pays_off_for_every_larger_call(
    corners: list[Corner], queries: int, keys: int, batch: int, more: tuple[int, int, int]
) -> None:
    measured = table(row(*corners))
    smaller = measured.is_faster("native", call_of(queries, keys, batch=batch))
    larger = measured.is_faster("native", call_of(queries + more[0], keys + more[1], batch=batch + more[2]))
    assert smaller is not None
    assert larger is not None
    assert larger >= smaller


def test_a_call_has_to_reach_a_corner_in_queries_keys_and_products() -> None:
    measured = table(row(Corner(61, 53, 2 * 3 * 61 * 53 * 11), Corner(7, 1009, 0)))
    for queries, keys, faster in ((61, 53, True), (59, 59, False), (67, 47, False), (7, 1009, True), (5, 1009, False)):
        assert measured.is_faster("native", call_of(queries, keys)) == faster
    assert not measured.is_faster("native", call_of(61, 53, batch=1))


def test_the_first_row_that_is_wide_enough_counts() -> None:
    measured = table(row(Corner(61, 1, 0), width=40), row(Corner(67, 1, 0), width=80))
    assert measured.is_faster("native", call_of(61, 53, 40))
    assert not measured.is_faster("native", call_of(61, 53, 41))
    assert measured.is_faster("native", call_of(67, 53, 80))
    assert measured.is_faster("native", call_of(67, 53, 83)) is None
    wide_values = CallSpec(AttentionShape(1, 3, 67, 53, 11, 4, value_dim=83), torch.float32, CPU)
    assert measured.is_faster("native", wide_values) is None
    assert measured.is_faster("triton", call_of(67, 53, 40)) is None
    assert measured.is_faster("native", replace(call_of(67, 53, 40), training=True)) is None


def test_a_call_counts_by_what_costs_most() -> None:
    plain = AttentionShape(1, 2, 61, 53, 11, 4)
    masked = replace(plain, mask=MaskShape(1, 1, 61, 53))
    wanted = replace(plain, mask=MaskShape(1, 1, 61, 53, has_grad=True))
    assert [extra_of(shape) for shape in (plain, replace(plain, causal=True), masked, wanted)] == list(EXTRAS[:0:-1])
    assert extra_of(replace(wanted, dropout=True, causal=True)) == "dropout"


@given(
    st.lists(st.lists(CORNERS, max_size=3), max_size=3),
    st.sampled_from(EXTRAS),
    st.booleans(),
    st.sampled_from([80, None]),
)
def test_a_table_survives_its_file(rows: list[list[Corner]], extra: str, training: bool, width: int | None) -> None:
    made = table(*(row(*corners, width=width, extra=extra, training=training) for corners in rows))
    again = table_of(json.loads(made.as_json()), "text")
    assert again == made
    assert hash(again) == hash(made)
    assert table_of(made.as_dict(), "a dictionary") == made


def _without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(name)


def _with(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update({name: value})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_with("format", 2), r"expected a table of format 1; got format 2\. Run `slicemod tune`"),
        (_without("format"), "expected a table of format 1; got format None"),
        (_with("colour", "blue"), r"expected the fields format, vectors, .*, rows; got .*colour"),
        (_without("vectors"), "expected the fields format, vectors"),
        (_with("threads", "many"), "threads: expected int; got 'many'"),
        (_with("threads", True), "threads: expected int; got True"),
        (_with("rows", [{"kernel": "native"}]), r"row 1: expected the fields kernel, dtype, .* got kernel"),
        (lambda content: content["rows"][0].update(extra="salt"), "row 1: extra: expected one of dropout.* got 'salt'"),
        (lambda content: content["rows"][0].update(width=None, training=None), "training: expected bool; got None"),
        (
            lambda content: content["rows"][0].update(faster_from=[[1, 2, 3]]),
            "faster_from: expected the fields queries",
        ),
    ],
)
def test_what_is_no_table_of_this_version_is_refused(
    spoil: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    content = table(row(Corner(61, 53, 0), width=40)).as_dict()
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    read_table(path)
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CrossoverTableError, match=message) as refused:
        read_table(path)
    assert str(refused.value).startswith(str(path))
    assert "or remove the file" in str(refused.value)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"format": 1, "rows": [')
    for name in ("cut.json", "missing.json"):
        with pytest.raises(CrossoverTableError, match="expected a table as `slicemod tune` writes it"):
            read_table(tmp_path / name)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(CrossoverTableError, match="got list"):
        read_table(tmp_path / "list.json")
