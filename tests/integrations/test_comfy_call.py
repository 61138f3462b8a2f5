from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slicemod import NotEnoughMemoryError, sliced_sdpa
from slicemod.integrations.comfy_call import comfy_attention, sliced_or_own
from tests.integrations.comfyui.stand_in import attention_pytorch
from tests.pytorch_versions import enters_objects_in_graphs

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 29, 23, 7
SLICED = {"kernel": "math", "steps": 5}


def inputs(*, apart: bool, keys: int = KEYS, key_heads: int = HEADS) -> Any:
    """A list of query, key and value, with their heads apart or not."""
    torch.manual_seed(1)
    made = [(QUERIES, HEADS), (keys, key_heads), (keys, key_heads)]
    if apart:
        return [torch.randn(BATCH, heads, tokens, WIDTH) for tokens, heads in made]
    return [torch.randn(BATCH, tokens, heads * WIDTH) for tokens, heads in made]


def sliced(slicing: dict[str, Any], given: Any, **more: Any) -> tuple[Tensor, sliced_sdpa]:
    query, key, value = given
    slicer = sliced_sdpa(slicing)
    return comfy_attention(slicer, query, key, value, HEADS, **more), slicer


def both(given: Any, **more: Any) -> tuple[Tensor, Tensor]:
    """Slicemod's output and ComfyUI's, after checking that slicemod's was sliced."""
    ours, slicer = sliced(SLICED, given, **more)
    theirs = attention_pytorch(*given, HEADS, **more)
    assert slicer.report.kernels == {"math": 1}
    return ours, theirs


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
def test_heads_come_and_go_as_comfyui_says(skip_reshape: bool, skip_output_reshape: bool) -> None:
    ours, theirs = both(inputs(apart=skip_reshape), skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
    assert ours.shape == ((BATCH, HEADS, QUERIES, WIDTH) if skip_output_reshape else (BATCH, QUERIES, HEADS * WIDTH))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(QUERIES, KEYS), (BATCH, QUERIES, KEYS), (BATCH, 1, KEYS), (BATCH, HEADS, QUERIES, KEYS), (1, 1, QUERIES, KEYS)],
    ids=str,
)
def test_a_mask_is_added_with_two_three_or_four_dimensions(shape: tuple[int, ...], skip_reshape: bool) -> None:
    mask = torch.randn(shape)
    torch.testing.assert_close(*both(inputs(apart=skip_reshape), mask=mask, skip_reshape=skip_reshape))


@pytest.mark.parametrize("shape", [(QUERIES, KEYS), (BATCH, 1, KEYS), (BATCH, 1, 1, KEYS)], ids=str)
def test_a_bool_mask_is_true_where_a_query_may_look(shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    ours, theirs = both(inputs(apart=False), mask=mask)
    torch.testing.assert_close(ours, theirs)
    unmasked, _ = both(inputs(apart=False))
    assert not torch.allclose(ours, unmasked)


@pytest.mark.parametrize("apart", [False, True])
def test_heads_of_keys_are_shared_and_a_scale_is_kept(apart: bool) -> None:
    given = inputs(apart=apart, key_heads=1)
    torch.testing.assert_close(*both(given, skip_reshape=apart, enable_gqa=True, scale=0.31))


def test_a_value_with_its_heads_apart_is_taken_as_sd3_passes_it() -> None:
    query, key, value = inputs(apart=False)
    given = [query, key, value.view(BATCH, KEYS, HEADS, WIDTH)]
    ours, theirs = both(given)
    torch.testing.assert_close(ours, theirs)


def test_half_precision_stays_half_precision_with_scores_in_float32() -> None:
    given = [each.bfloat16() for each in inputs(apart=False)]
    ours, _ = sliced(SLICED, given, attn_precision=torch.float32)
    assert ours.dtype == torch.bfloat16
    exact = attention_pytorch(*(each.double() for each in given), HEADS)
    theirs = attention_pytorch(*given, HEADS)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@pytest.mark.parametrize("masks", [None, 1, 2**15 + 5], ids=str)
def test_a_batch_of_very_many_items_is_computed_in_several(masks: int | None) -> None:
    torch.manual_seed(1)
    given = [torch.randn(2**15 + 5, tokens, HEADS) for tokens in (3, 2, 2)]
    mask = None if masks is None else torch.randn(masks, 3, 2)
    ours, slicer = sliced({}, given, mask=mask)
    torch.testing.assert_close(ours, attention_pytorch(*given, HEADS, mask=mask))
    assert [shape.partition(" heads")[0] for shape in slicer.report.shapes] == ["32768 x 3", "5 x 3"]


def test_a_budget_holds() -> None:
    with pytest.raises(NotEnoughMemoryError):
        sliced({"kernel": "math", "budget": 64}, inputs(apart=False))


def test_a_keyword_that_slicemod_does_not_know_goes_to_the_programs_own_attention() -> None:
    seen: list[dict[str, Any]] = []

    def own(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs)
        out: Tensor = attention_pytorch(*args, **kwargs)
        return out

    slicer, given = sliced_sdpa(SLICED), (*inputs(apart=False), HEADS)
    hints = {"transformer_options": {}, "low_precision_attention": False, "_inside_attn_wrapper": True}
    sliced_or_own(slicer, own, given, hints)
    assert (seen, slicer.report.kernels) == ([], {"math": 1})
    sliced_or_own(slicer, own, given, {"window": 7})
    assert seen == [{"window": 7}]
    assert list(slicer.report.passed_on) == [
        "window: not known to slicemod, so the program's own attention took the call"
    ]


@enters_objects_in_graphs
def test_a_compiled_call_is_one_graph() -> None:
    slicer, given = sliced_sdpa(SLICED), inputs(apart=False)

    def call(*given: Tensor) -> Tensor:
        return sliced_or_own(slicer, attention_pytorch, (*given, HEADS), {"transformer_options": {}})

    torch.testing.assert_close(
        torch.compile(call, fullgraph=True, backend="eager")(*given), attention_pytorch(*given, HEADS)
    )
    assert sum(slicer.report.in_graphs.values()) == 1
