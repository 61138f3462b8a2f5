"""A table from measurements: by a clock of the test's, which knows what is faster."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slicemod.bench.duel import Ratio
from slicemod.bench.tuned_calls import TunedCall, tuned_calls
from slicemod.bench.tuning import Tuning, corners
from slicemod.kernels.crossover_table import Corner
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.table_in_use import built_in_table

GROUPS = list(tuned_calls())
LIBRARY = native_library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"no native kernel: {native_obstacle()}")

SIZES = st.builds(Corner, *[st.integers(1, 4)] * 3)


def certain(median: float) -> Ratio:
    return Ratio(median, median - 0.001, median + 0.001)


@given(st.dictionaries(SIZES, st.booleans(), max_size=12))
def test_corners_keep_to_what_was_measured(measured: dict[Corner, bool]) -> None:
    found = corners(list(measured.items()))
    for size, is_faster in measured.items():
        chosen = any(size.reaches(corner) for corner in found)
        assert is_faster or not chosen
        slower_above = any(not other for larger, other in measured.items() if larger.reaches(size))
        assert chosen == (is_faster and not slower_above)
    assert not [(one, other) for one in found for other in found if one != other and one.reaches(other)]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"{group[0].calls.kernel} {group[0].calls}")
def test_a_group_is_all_that_rows_replace(group: list[TunedCall]) -> None:
    assert len({call.calls[:4] for call in group}) == 1
    widths = list(dict.fromkeys(call.calls.width for call in group))
    assert widths == sorted(widths, key=lambda width: width or 10**9)
    assert widths[-1] is None
    for call in group:
        assert call.calls.width is None or call.shape.head_dim <= call.calls.width


@needs_library
def test_a_tuned_table_says_what_the_clock_said() -> None:
    assert LIBRARY is not None
    least = {("native", False): 2**21, ("native", True): 2**23, ("fused-float32", False): 0, ("fused-float32", True): 0}

    def compare(call: TunedCall, kernel: str, rival: str) -> Ratio:
        assert kernel == call.calls.kernel
        return certain(0.7 if call.size.products >= least[kernel, call.calls.training] else 1.2)

    tuning = Tuning(built_in_table(LIBRARY), compare)
    measured = list(tuning.measure(GROUPS))
    assert {call.calls.kernel for call in measured} == {"native", "fused-float32"}
    for call in measured:
        chosen = tuning.table.is_faster(call.calls.kernel, call.spec)
        assert chosen == (call.size.products >= least[call.calls.kernel, call.calls.training])
    assert all(finding.is_decided for finding in tuning.findings)


@needs_library
def test_ties_noise_and_what_there_was_no_time_for_go_to_the_built_in_table() -> None:
    assert LIBRARY is not None
    built_in = built_in_table(LIBRARY)
    native = [group for group in GROUPS if group[0].calls.kernel == "native"]
    times = iter([0.0] * 30 + [2.0] * 10_000)
    for tuning in (
        Tuning(built_in, lambda *_: Ratio(0.99, 0.97, 1.01)),
        Tuning(built_in, lambda *_: Ratio(0.5, 0.1, 2.0)),
        Tuning(built_in, lambda *_: Ratio(1.5, 0.1, 2.0), until=1.0, clock=lambda: next(times)),
    ):
        assert len(list(tuning.measure(native))) == len(tuning.findings)
        assert not any(finding.is_decided for finding in tuning.findings)
        for finding in tuning.findings:
            call = finding.call
            assert finding.is_faster == built_in.is_faster("native", call.spec)
            assert tuning.table.is_faster("native", call.spec) <= finding.is_faster  # type: ignore[operator]
    assert sum(finding.ratio is None for finding in tuning.findings) == len(tuning.findings) - 30


@needs_library
def test_the_rival_is_what_runs_without_the_kernel() -> None:
    assert LIBRARY is not None
    rivals: dict[tuple[str, str], set[str]] = {}

    def compare(call: TunedCall, kernel: str, rival: str) -> Ratio:
        rivals.setdefault((kernel, call.calls.dtype), set()).add(rival)
        return certain(0.5 if call.calls.dtype == "float16" else 2.0)

    for _ in Tuning(built_in_table(LIBRARY), compare).measure(GROUPS):
        pass
    assert rivals["native", "float32"] <= {"fused", "math"}
    assert "fused-float32" in rivals["native", "float16"]  # which was measured to be faster there
    assert "fused-float32" not in rivals["native", "bfloat16"]
    assert rivals["fused-float32", "float16"] == {"fused"}


@pytest.mark.parametrize("extra", ["plain", "mask gradient", "dropout"])
def test_a_call_runs_as_it_is_told(extra: str) -> None:
    calls = [
        call
        for group in GROUPS
        for call in group
        if call.calls[:4] == ("native", "bfloat16", True, extra) and call.size.products < 2**21
    ]
    gradients = calls[0].run_by("math")()
    assert isinstance(gradients, tuple)
    assert len(gradients) == (4 if extra == "mask gradient" else 3)
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
    assert gradients[0].shape == (1, 8, calls[0].shape.queries, calls[0].shape.head_dim)
