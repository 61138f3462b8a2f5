"""A device that runs out in spite of the plan: smaller slices, said once, the same result."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slicemod import SliceConfig, SlicePlan, sliced_attention
from slicemod.kernels.retry import SmallerSlicesWarning, with_smaller_slices
from slicemod.kernels.sliced import workspace
from slicemod.kernels.sliced.loop import SlicedCall

CALL = SlicedCall(dropout_p=0.0, is_causal=False, scale=1.0, upcast=False, heads=6, rows=97, seed=None)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("nothing_said")


def _fails_above(most_elements: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Workspaces above so many elements run out of memory; what was asked for is listed."""
    asked: list[int] = []
    allocate: Callable[..., None] = workspace.Workspace.__init__

    def allocate_or_fail(self: object, sizes: dict[str, int], like: Tensor, dtype: torch.dtype) -> None:
        asked.append(sum(sizes.values()))
        if asked[-1] > most_elements:
            raise torch.OutOfMemoryError(f"tried to allocate {asked[-1]} elements")
        allocate(self, sizes, like, dtype)

    monkeypatch.setattr(workspace.Workspace, "__init__", allocate_or_fail)
    return asked


@pytest.mark.slow
def test_attention_goes_on_in_smaller_slices_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = inputs = [torch.randn(2, 3, 97, 11, requires_grad=True) for _ in range(3)]
    slicing = SliceConfig(kernel="math", steps=1)

    def run() -> list[Tensor]:
        output = sliced_attention(query, key, value, slicing=slicing)
        return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    wanted = run()
    asked = _fails_above(9_000, monkeypatch)
    with pytest.warns(SmallerSlicesWarning, match="97 rows by 6 heads and goes on with 49 rows by 6 heads"):
        found = run()
    for tensor, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(tensor, other)
    assert min(asked) <= 9_000 < max(asked)


def test_the_warning_is_given_once_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 2, 53, 7)
    _fails_above(2_000, monkeypatch)
    slicing = SliceConfig(kernel="math", steps=1)
    with pytest.warns(SmallerSlicesWarning):
        sliced_attention(query, query, query, slicing=slicing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sliced_attention(query, query, query, slicing=slicing)


@pytest.mark.slow
def test_one_row_of_one_head_is_where_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 3, 53, 7)
    asked = _fails_above(0, monkeypatch)
    with pytest.warns(SmallerSlicesWarning), pytest.raises(torch.OutOfMemoryError):
        sliced_attention(query, query, query, slicing=SliceConfig(kernel="math", steps=1))
    assert len(asked) == 1 + 6 + 2  # 53 rows halved to one in 6 tries, then 3 heads in 2


def test_chunks_of_keys_are_halved_last(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(1, 1, 2, 7), torch.randn(1, 1, 53, 7)
    plan = SlicePlan("query", 2, 2, 2**20, "math", "test", 1, 2, keys=31)
    asked = _fails_above(60, monkeypatch)
    with pytest.warns(SmallerSlicesWarning, match="2 rows by 1 heads by 31 keys and goes on with 1 rows by 1 heads"):
        found = sliced_attention(query, key, key, plan=plan)
    assert len(asked) == 3  # 2 rows by 31 keys, 1 row by 31, 1 row by 16
    torch.testing.assert_close(found, sliced_attention(query, key, key, slicing={"kernel": "fused"}))


@pytest.mark.parametrize("call", [replace(CALL, dropout_p=0.1), replace(CALL, rows=1, heads=1)])
def test_what_cannot_be_made_smaller_raises_at_once(call: SlicedCall) -> None:
    tried: list[SlicedCall] = []

    def run(call: SlicedCall) -> None:
        tried.append(call)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        with_smaller_slices(run, call, 97, CPU)
    assert len(tried) == 1


def test_other_errors_pass_through() -> None:
    def run(_: SlicedCall) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        with_smaller_slices(run, CALL, 97, CPU)
