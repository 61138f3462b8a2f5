"""The predicate that says where a fused kernel runs, against PyTorch's own choice."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slicemod.call import Layout
from slicemod.functional import planned_attention, sliced_attention
from slicemod.kernels.fused import obstacles
from slicemod.kernels.fused.running import fused_attention, is_fused
from slicemod.kernels.kernel import Arguments
from slicemod.kernels.table_in_use import NO_TABLE, using_table
from slicemod.torch_internals import FakeTensor, FakeTensorMode
from tests.kernels.fused.asked import fused_obstacle
from tests.oracle import layer_inputs, layer_like

MATH_BACKEND = SDPBackend.MATH
MATH = MATH_BACKEND.value
HALF_AND_MORE = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pytorch_fuses(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> bool:
    choice = torch._fused_sdp_choice(query, key, value, mask, dropout_p, is_causal, enable_gqa=enable_gqa)
    return choice != MATH


@st.composite
def calls(draw: st.DrawFn) -> tuple[Any, ...]:
    """Query, key, value, mask, dropout_p, is_causal and enable_gqa of a call that SDPA accepts."""
    dtype = draw(st.sampled_from(HALF_AND_MORE))
    batch, heads, width = (
        draw(st.sampled_from([1, 2])),
        draw(st.sampled_from([1, 2, 6])),
        draw(st.sampled_from([1, 8, 11])),
    )
    queries, keys = draw(st.sampled_from([1, 3, 67])), draw(st.sampled_from([1, 5, 53]))
    enable_gqa = draw(st.booleans())
    key_heads = draw(st.sampled_from([1, heads])) if enable_gqa else heads
    value_width = draw(st.sampled_from([width, 7]))
    query = layer_like(batch, heads, queries, width, dtype)
    key, value = (
        layer_like(batch, key_heads, keys, width, dtype),
        layer_like(batch, key_heads, keys, value_width, dtype),
    )
    tensors = [query, key, value]
    which = draw(st.integers(0, 2))
    layout = draw(st.sampled_from(["layer", "contiguous", "column", "spaced", "broadcast", "3d"]))
    if layout == "contiguous":
        tensors = [tensor.contiguous() for tensor in tensors]
    elif layout == "column":  # the last dimension is the outer one
        tensors[which] = tensors[which].mT.contiguous().mT
    elif layout == "spaced":
        tensors[which] = tensors[which].repeat_interleave(2, -1)[..., ::2]
    elif layout == "broadcast":
        tensors[which] = tensors[which][..., :1, :].expand_as(tensors[which])
    elif layout == "3d":
        tensors, enable_gqa, batch = [tensor[0] for tensor in tensors], False, 1
        tensors[1:] = [tensor.expand(heads, -1, -1) for tensor in tensors[1:]]
    lead = (batch, heads) if layout != "3d" else (heads,)
    sizes = draw(
        st.sampled_from([None, (queries, keys), (1, keys), (queries, 1), (*lead, queries, keys), lead, "4d", "3d"])
    )
    mask: Tensor | None = None
    if sizes is not None:
        sizes = (
            {"4d": (1, 1, queries, keys), "3d": (1, queries, keys)}.get(sizes, sizes)
            if isinstance(sizes, str)
            else sizes
        )
        sizes = (*sizes, 1, keys) if sizes == lead else sizes
        if layout == "3d" and len(sizes) == 4:
            sizes = sizes[1:]
        kind = draw(st.sampled_from([torch.bool, dtype]))
        mask = torch.ones(sizes).to(kind)
        if kind != torch.bool and draw(st.booleans()):
            mask.requires_grad_()
    if draw(st.booleans()):
        tensors[draw(st.integers(0, 2))].requires_grad_()
    dropout_p = draw(st.sampled_from([0.0, 0.0, 0.3]))
    is_causal = mask is None and draw(st.booleans())
    return (*tensors, mask, dropout_p, is_causal, enable_gqa)


@given(calls(), st.booleans())
def test_the_predicate_agrees_with_pytorch(call: tuple[Any, ...], grad_enabled: bool) -> None:
    with torch.set_grad_enabled(grad_enabled):
        obstacle, fuses = fused_obstacle(*call), pytorch_fuses(*call)
    assert fuses or obstacle is not None, "promised a fused kernel where none runs"
    if call[0].dim() == 4:  # PyTorch versions differ in whether they fuse 3 dimensions; we never do
        assert obstacle is None or not fuses, obstacle


QUERY = layer_like(2, 6, 67, 11)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dropout_p": 0.3}, "no dropout"),
        ({"attn_mask": torch.zeros(67, 67, requires_grad=True)}, "gives the mask no gradient"),
        ({"attn_mask": torch.zeros(6, 67, 67)}, "a mask of 2 or 4 dimensions, got 3"),
        ({"attn_mask": torch.zeros(67, 67, dtype=torch.float64)}, "got one of another dtype"),
        ({"value": layer_like(2, 6, 67, 13)}, "values as wide as queries, got 13 and 11"),
        ({"key": QUERY.mT.contiguous().mT}, "the last dimension contiguous"),
        ({"query": QUERY[None]}, "query has 5 dimensions"),
        ({"key": QUERY[:1]}, "the same batch"),
        ({"key": QUERY[:, :1], "value": QUERY[:, :1]}, "the same heads"),
        ({"query": QUERY.to("meta")}, "not known .* 'meta'"),
    ],
)
def test_the_obstacle_is_said_in_words(changes: dict[str, Any], reason: str) -> None:
    call: dict[str, Any] = {"query": QUERY, "key": QUERY, "value": QUERY} | changes
    obstacle = fused_obstacle(**call)
    assert obstacle is not None
    assert re.search(reason, obstacle)


def test_fused_is_refused_with_the_obstacle() -> None:
    inputs = layer_inputs()
    with pytest.raises(ValueError, match="no dropout"):
        inputs.run(sliced_attention, dropout_p=0.3, slicing={"kernel": "fused"})


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", HALF_AND_MORE)
def test_fused_is_sdpa_itself(dtype: torch.dtype, is_causal: bool) -> None:
    inputs = layer_inputs(dtype, is_causal=is_causal)
    output, plan = planned_attention(
        inputs.query, inputs.key, inputs.value, is_causal=is_causal, slicing={"kernel": "fused"}
    )
    assert plan is not None
    assert (plan.kernel, plan.steps) == ("fused", 1)
    assert torch.equal(output, inputs.run(F.scaled_dot_product_attention))


def test_where_nothing_is_fused_there_is_an_error_and_no_fallback() -> None:
    query = layer_like(2, 3, 5, 7)
    with pytest.warns(UserWarning, match="kernel"), pytest.raises(RuntimeError, match="No available kernel"):
        fused_attention((query, query, query, None), Arguments(dropout_p=0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pytorch_s_switches_choose_no_other_kernel_and_are_left_as_they_are(dtype: torch.dtype) -> None:
    inputs = layer_inputs(dtype)

    def attention() -> Tensor:
        return inputs.run(sliced_attention, slicing={"kernel": "fused"})

    with sdpa_kernel(MATH_BACKEND):
        computed_unfused = inputs.run(F.scaled_dot_product_attention)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = inputs.run(F.scaled_dot_product_attention)
    assert not torch.equal(fused, computed_unfused)
    assert torch.equal(attention(), fused)
    with sdpa_kernel(MATH_BACKEND):  # seen at the next call
        assert torch.equal(attention(), fused)
        assert not torch._C._get_flash_sdp_enabled()
    assert torch.equal(attention(), fused)
    assert torch._C._get_flash_sdp_enabled()
    assert torch._C._get_math_sdp_enabled()


def test_auto_fuses_exactly_where_there_is_no_obstacle() -> None:
    inputs = layer_inputs()
    for mask, kernel in ((None, "fused"), (torch.zeros(61, 53, requires_grad=True), "math")):
        with using_table(NO_TABLE, "a test"):  # in which the native kernel never pays off
            plan = planned_attention(inputs.query, inputs.key, inputs.value, mask)[1]
        assert plan is not None
        assert plan.kernel == kernel


@pytest.mark.parametrize(
    ("query", "merged"),
    [
        (torch.empty(2, 67, 6, 11, device="meta").transpose(1, 2), True),  # as a layer's
        (torch.empty(2, 67, 3, 6, 11, device="meta")[:, :, 1].transpose(1, 2), True),  # a part of all projections
        (torch.empty(2, 6, 67, 11, device="meta"), False),
        (torch.empty(67, 2, 6, 11, device="meta").permute(1, 2, 0, 3), False),
        (torch.empty(2, 1, 67, 11, device="meta"), True),
        (torch.empty(2, 6, 1, 11, device="meta").expand(2, 6, 67, 11), False),
        (torch.empty(67, 6, 11, device="meta").transpose(0, 1), True),
    ],
)
def test_a_call_tells_whether_its_query_lies_as_a_layers_does(query: Tensor, merged: bool) -> None:
    assert Layout(*obstacles.layout_of((query, query, query, None), Arguments())).merged == merged


@pytest.mark.parametrize(
    ("key_heads", "mask", "dropout_p", "fused"),
    [(6, False, 0.0, True), (6, True, 0.0, False), (6, False, 0.3, False), (2, False, 0.0, False)],
)
def test_cudnns_attention_runs_where_its_bytes_are_known(
    key_heads: int, mask: bool, dropout_p: float, fused: bool
) -> None:
    def on_cuda(*sizes: int) -> Tensor:
        tensor: Tensor = FakeTensor(FakeTensorMode(), torch.empty(*sizes, device="meta"), torch.device("cuda"))
        return tensor

    query, key = on_cuda(2, 6, 67, 64), on_cuda(2, key_heads, 53, 64)
    inputs = query, key, key, on_cuda(1, 1, 67, 53) if mask else None
    assert is_fused(SDPBackend.CUDNN_ATTENTION.value, inputs, Arguments(dropout_p)) == fused  # on the assumed card
    assert is_fused(SDPBackend.FLASH_ATTENTION.value, inputs, Arguments(dropout_p))
    assert not is_fused(MATH, inputs, Arguments(dropout_p))


@pytest.mark.parametrize("grad_enabled", [True, False])
@pytest.mark.parametrize("width", [16, 11])
def test_a_traced_call_asks_what_cuda_fuses_outside_of_the_graph(
    width: int, grad_enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def answer(params: Any) -> bool:
        query = params.query
        asked.append((query.shape, query.stride(), query.dtype, query.requires_grad, torch.is_grad_enabled()))
        return width == 16

    for question in ("can_use_flash_attention", "can_use_efficient_attention", "can_use_cudnn_attention"):
        monkeypatch.setattr(torch.backends.cuda, question, answer)
    query = layer_like(2, 6, 67, width).to("meta").requires_grad_()

    def attend(query: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        return query * 2, obstacles.kernels_on_cuda((query, query, query, None), Arguments())

    with torch.set_grad_enabled(grad_enabled):
        _, runs = torch.compile(attend, fullgraph=True, backend="eager", dynamic=True)(query)
    assert runs == (("flash", "efficient") if width == 16 else ())  # a graph runs no cuDNN
    assert set(asked) == {(query.shape, query.stride(), torch.float32, True, grad_enabled)}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 11, 64, 300])
def test_the_predicate_agrees_with_pytorch_on_cuda(dtype: torch.dtype, width: int) -> None:
    query = layer_like(2, 6, 67, width, dtype).cuda()
    for mask in (None, torch.ones(67, 67, dtype=torch.bool, device="cuda")):
        for dropout_p in (0.0, 0.3):
            call = (query, query, query, mask, dropout_p, False, False)
            assert (fused_obstacle(*call) is None) == pytorch_fuses(*call)
