from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slicemod.integrations.comfyui.override import KEY, SlicedOverride
from tests.integrations.comfyui.stand_in import Container, attention_pytorch

HEADS = 3
SLICED = {"kernel": "math", "steps": 5}


def inputs() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, tokens, 21) for tokens in (29, 23, 23)]


def attention(override: Any, *given: Any, **more: Any) -> Tensor:
    out: Tensor = attention_pytorch(*given, HEADS, transformer_options={KEY: override}, **more)
    return out


def test_an_override_computes_what_comfyui_computes() -> None:
    override = SlicedOverride(SLICED)
    torch.testing.assert_close(attention(override, *inputs()), attention_pytorch(*inputs(), HEADS))
    assert override.report.kernels == {"math": 1}


def test_an_override_of_another_node_is_kept_around_ours() -> None:
    mask = torch.randn(29, 23)

    def masking(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Any:
        return func(q, k, v, heads, **{**kwargs, "mask": mask})

    override = SlicedOverride(SLICED, masking)
    torch.testing.assert_close(attention(override, *inputs()), attention_pytorch(*inputs(), HEADS, mask=mask))
    assert override.report.kernels == {"math": 1}


def test_an_override_that_computes_by_itself_stays_in_charge() -> None:
    override = SlicedOverride(SLICED, lambda _func, q, *_rest, **_more: q * 2)
    given = inputs()
    assert torch.equal(attention(override, *given), given[0] * 2)
    assert override.report.kernels == {}


def test_the_settings_of_a_second_node_take_the_place_of_the_firsts() -> None:
    def other(func: Any, *args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    first = SlicedOverride(SLICED, other)
    second = SlicedOverride({"kernel": "math", "steps": 3}, first)
    attention(second, *inputs())
    assert second.former is other
    assert (first.report.kernels, second.report.kernels) == ({}, {"math": 1})


def test_tensors_in_containers_are_taken_and_an_override_for_containers_is_kept() -> None:
    override = SlicedOverride(SLICED)
    boxed = [Container(each) for each in inputs()]
    torch.testing.assert_close(attention(override, *boxed), attention_pytorch(*inputs(), HEADS))
    assert all(box.tensor is None for box in boxed)

    def former(_func: Any, *_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("containers were taken out")

    former.container_function = lambda q, *_rest, **_more: q.take() * 3  # type: ignore[attr-defined]
    boxed = [Container(each) for each in inputs()]
    assert torch.equal(attention(SlicedOverride(SLICED, former), *boxed), inputs()[0] * 3)


def test_a_run_starts_a_new_list_of_calls() -> None:
    override = SlicedOverride(SLICED)
    attention(override, *inputs())
    attention(override, *inputs(), window=7)
    assert (len(override.report.calls), len(override.report.passed_on)) == (1, 1)
    override.start_run()
    assert (len(override.report.calls), len(override.report.passed_on)) == (0, 0)
