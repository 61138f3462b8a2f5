"""Which table kernels are chosen by, and that every choice sees a new one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from slicemod.call import AttentionShape, CallSpec
from slicemod.choose import answers, choose
from slicemod.config import SliceConfig
from slicemod.functional import planned_attention
from slicemod.kernels.crossover_table import EXTRAS, Corner, CrossoverTable, CrossoverTableError, Row
from slicemod.kernels.native.binding import FLOAT_MODE, TILED_MODE, NativeLibrary
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.table_in_use import (
    NO_TABLE,
    built_in_table,
    find_table,
    given_table,
    measured_file,
    table_for,
    table_in_use,
    using_table,
    vectors_of,
)

CPU = torch.device("cpu")
DTYPES = "float32", "bfloat16", "float16"


class Library:
    """What a table is looked up by."""

    def __init__(self, path: Path, lanes: int, mode: int) -> None:
        self.path, self.vector_lanes, self.modes = path, lanes, {torch.bfloat16: mode}


def library(folder: Path, lanes: int = 8, mode: int = FLOAT_MODE) -> NativeLibrary:
    return cast("NativeLibrary", Library(folder / "attention-5.so", lanes, mode))


def everywhere(table: CrossoverTable, *corners: Corner) -> CrossoverTable:
    """The table with the same corners in every row."""
    return replace(table, rows=tuple(Row(row.calls, corners) for row in table.rows))


@pytest.mark.parametrize(
    ("lanes", "mode", "vectors"),
    [(8, FLOAT_MODE, "AVX2"), (16, FLOAT_MODE, "AVX-512"), (16, TILED_MODE, "AMX")],
)
def test_every_kind_of_vectors_has_a_built_in_table_that_says_something_of_every_call(
    lanes: int, mode: int, vectors: str, tmp_path: Path
) -> None:
    found = find_table(library(tmp_path, lanes, mode), "", 2)
    assert found.source == "built-in"
    assert found.table.vectors == vectors
    for dtype in DTYPES:
        for training in (False, True):
            for extra in EXTRAS:
                widths = [
                    row.calls.width for row in found.table.rows if row.calls[:4] == ("native", dtype, training, extra)
                ]
                assert widths == sorted(widths, key=lambda width: width or 10**9)
                assert (None in widths) == (training or extra != "mask gradient")


@pytest.mark.parametrize(("lanes", "mode"), [(8, FLOAT_MODE), (16, FLOAT_MODE), (16, TILED_MODE)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_self_attention_is_native_and_a_few_tokens_are_not(
    lanes: int, mode: int, dtype: str, tmp_path: Path
) -> None:
    table = built_in_table(library(tmp_path, lanes, mode))
    for training in (False, True):
        for tokens, faster in ((4096, True), (7, False)):
            shape = AttentionShape(1, 8, tokens, tokens, 40, 4)
            assert table.is_faster("native", CallSpec(shape, getattr(torch, dtype), CPU, training)) is faster


def test_without_tiles_avx_512_trains_on_a_text_by_the_native_kernel(tmp_path: Path) -> None:
    shape = AttentionShape(1, 8, 1024, 77, 80, 4)
    for mode, faster in ((FLOAT_MODE, True), (TILED_MODE, False)):
        table = built_in_table(library(tmp_path, 16, mode))
        assert table.is_faster("native", CallSpec(shape, torch.float32, CPU, training=True)) is faster


def test_nothing_is_known_to_be_faster_on_arm(tmp_path: Path) -> None:
    found = find_table(library(tmp_path, lanes=4), "", 2)
    assert (found.source, found.table.vectors, found.table.rows) == ("built-in", "NEON", ())


def test_a_measured_table_is_found_for_its_library_and_threads_alone(tmp_path: Path) -> None:
    own = library(tmp_path)
    measured = replace(built_in_table(own), processor="this one")
    measured_file(own, 3).write_text(measured.as_json())
    assert find_table(own, "", 3) == (measured, str(measured_file(own, 3)))
    assert find_table(own, "", 2).source == "built-in"
    assert find_table(own, "built-in", 3).source == "built-in"


def test_a_pinned_table_goes_before_a_measured_one(tmp_path: Path) -> None:
    own = library(tmp_path)
    measured_file(own, 3).write_text("no table")
    pinned = tmp_path / "pinned.json"
    pinned.write_text(replace(built_in_table(own), processor="another").as_json())
    assert find_table(own, str(pinned), 3).table.processor == "another"
    with pytest.raises(CrossoverTableError, match="expected a table as `slicemod tune` writes it"):
        find_table(own, "", 3)


def test_a_table_for_other_vectors_is_refused(tmp_path: Path) -> None:
    pinned = tmp_path / "pinned.json"
    pinned.write_text(built_in_table(library(tmp_path, 16, TILED_MODE)).as_json())
    with pytest.raises(
        CrossoverTableError, match=r"for AVX2, which this CPU multiplies by; got one for AMX\. Set SLICE"
    ):
        find_table(library(tmp_path), str(pinned), 1)


def test_no_library_is_needed_for_calls_on_gpus() -> None:
    assert table_for(torch.device("cuda")) is NO_TABLE


@pytest.mark.skipif(native_library() is None, reason=f"no native kernel: {native_obstacle()}")
def test_a_kernel_that_was_never_measured_is_not_said_to_be_slower(tmp_path: Path) -> None:
    call = CallSpec(AttentionShape(1, 2, 61, 53, 11, 4), torch.float32, CPU)
    on_arm = built_in_table(library(tmp_path, lanes=4))
    for table, said in ((on_arm, "not known to be faster"), (everywhere(built_in_table(library(tmp_path))), "slower")):
        with using_table(table, "a test"):
            passed_over = {answer.kernel: answer.passed_over for answer in answers(call, SliceConfig(), 2**30)}
        assert said in str(passed_over["native"])


@pytest.mark.skipif(native_library() is None, reason=f"no native kernel: {native_obstacle()}")
def test_every_choice_sees_the_new_table() -> None:
    own = native_library()
    assert own is not None
    always = everywhere(built_in_table(own), Corner(1, 1, 0))
    never = everywhere(built_in_table(own))
    call = CallSpec(AttentionShape(1, 2, 61, 53, 11, 4), torch.float32, CPU)
    query, key = torch.randn(1, 2, 61, 11), torch.randn(1, 2, 53, 11)
    before = table_in_use()
    for table, kernel in ((always, "native"), (never, "fused"), (always, "native")):
        with using_table(table, "a test"):
            assert table_in_use() == (table, "a test")
            assert choose(call, SliceConfig(), 2**30).kernel == kernel
            assert [answer.kernel for answer in answers(call, SliceConfig(), 2**30) if not answer.passed_over] == [
                kernel
            ]
            for _ in range(2):  # the second time it is a known call
                _, plan = planned_attention(query, key, key)
                assert plan is not None
                assert plan.kernel == kernel
    assert table_in_use() == before
    assert given_table() is None
    assert vectors_of(own) == before.table.vectors
