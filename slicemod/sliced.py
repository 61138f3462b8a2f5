"""`sliced_attention`: the attention function, and the custom operator that keeps its slices in order.

A loop of slices that the compiler can see is unrolled and reordered, and its memory grows with the number of slices.
As one operator it is a single node of the graph: compile time does not depend on the number of slices, and their
order stays ours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from slicemod.attention_inputs import as_four_dims, autocast_inputs, check_inputs
from slicemod.cpu_kernels import NO_CPU_KERNELS, cpu_kernels
from slicemod.double_backward import differentiable_gradients
from slicemod.float32_flash import float32_flash
from slicemod.fused import flash_attention, fused_attention, fused_obstacle, is_fused, pytorchs_choice
from slicemod.kernels.native.binding import computes_scale
from slicemod.kernels.native.operators import attend_natively, prepared_inference
from slicemod.key_chunks import chunked_backward, chunked_forward
from slicemod.math_kernel import (
    UPCASTING_DEVICES,
    Call,
    attention_shape,
    attention_sizes,
    empty_gradients,
    empty_heads,
    kept_shape,
    math_backward,
    math_forward,
)
from slicemod.operator import operator
from slicemod.out_of_memory import with_smaller_slices
from slicemod.plan import SlicePlan
from slicemod.slice_config import CallPlans, SliceConfig
from slicemod.watched import constant_in_graph, is_watched


@operator("slicemod::attention")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    upcast: bool,
    keep_weights: bool,
    items: int,
    heads: int,
    rows: int,
    keys: int,
) -> tuple[Tensor, Tensor]:
    def run(call: Call) -> tuple[Tensor, Tensor]:
        if 0 < call.keys < key.shape[2]:
            return chunked_forward(query, key, value, mask, call)
        return math_forward(query, key, value, mask, call, keep_weights=keep_weights)

    call = Call(dropout_p, is_causal, scale, upcast, heads, rows, seed, items, keys)
    return with_smaller_slices(run, call, query.shape[2], query.device)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    *_, upcast, keep_weights, _items, _heads, _rows, _keys = settings
    dtype = torch.float32 if upcast and query.dtype.itemsize < 4 else query.dtype
    kept = query.new_empty(kept_shape(query, key) if keep_weights else (0,), dtype=dtype)
    return empty_heads(query, value.shape[3]), kept


@operator("slicemod::attention_backward")
def _attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    kept: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    upcast: bool,
    items: int,
    heads: int,
    rows: int,
    keys: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = (needs[0], needs[1], needs[2], needs[3])

    def run(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if 0 < call.keys < key.shape[2]:
            return chunked_backward(grad_output, query, key, value, mask, call, wanted)
        return math_backward(grad_output, query, key, value, mask, kept, call, wanted)

    call = Call(dropout_p, is_causal, scale, upcast, heads, rows, seed, items, keys)
    return with_smaller_slices(run, call, query.shape[2], query.device)


@_attention_backward.register_fake
def _(
    _grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_query, need_key, need_value, need_mask = settings[-1]
    return empty_gradients(query, key, value, mask, (need_query, need_key, need_value, need_mask))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, seed, *settings, _keep_weights, items, heads, rows, keys = inputs
    ctx.save_for_backward(query, key, value, mask, seed, output[1])
    ctx.settings = (*settings, items, heads, rows, keys)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or the kept weights would get a gradient of zeros, as large as they are


def _gradients(ctx: Any, grad_output: Tensor | None, _grad_kept: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:4]
    grads: Sequence[Tensor | None] = [None] * 4
    if grad_output is not None and torch.is_grad_enabled():  # backward(create_graph=True)
        query, key, value, mask, seed, _ = ctx.saved_tensors
        dropout_p, is_causal, scale, upcast, items, heads, rows, keys = ctx.settings
        call = Call(dropout_p, is_causal, scale, upcast, heads, rows, seed, items, keys)
        grads = differentiable_gradients(grad_output, query, key, value, mask, call, needs)
    elif grad_output is not None:
        grads = _attention_backward(grad_output, *ctx.saved_tensors, *ctx.settings, list(needs))
    wanted = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return (*wanted, *[None] * (len(ctx.settings) + 2))


_attention.register_autograd(_gradients, setup_context=_save_for_backward)


@constant_in_graph
def _decide(
    settings: tuple[Any, ...],
    sizes: tuple[Any, ...],
    device: str,
    training: bool,
    fused_obstacle: str | None,
    dtype: torch.dtype | None,
) -> SlicePlan:
    """The plan of a call; while a graph is traced this runs outside of it, and its answer is a constant in there."""
    return _plans(settings, sizes, device, training, fused_obstacle, dtype).now()


def _plans(
    settings: tuple[Any, ...],
    sizes: tuple[Any, ...],
    device: str,
    training: bool,
    fused_obstacle: str | None,
    dtype: torch.dtype | None,
) -> CallPlans:
    cpu = NO_CPU_KERNELS if dtype is None else cpu_kernels(dtype, torch.device(device))
    return _checked_config(*settings).plans(
        attention_shape(sizes),
        torch.device(device),
        training=training,
        fused_obstacle=fused_obstacle,
        cpu=cpu,
    )


_checked_config = lru_cache(typed=True)(SliceConfig)  # a budget of 1 byte is not one of 1.0, all there is


def _question(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    obstacle: str | None,
    settings: tuple[Any, ...],
) -> tuple[Any, ...]:
    """The arguments of `_decide` for 4-D inputs, of which only sizes and types are looked at."""
    upcast = query.device.type in UPCASTING_DEVICES and query.element_size() < 4
    sizes = attention_sizes(query, key, value, mask, dropout_p=dropout_p, is_causal=is_causal, upcast=upcast)
    # torch.func.grad takes no operator of ours, but PyTorch's.
    transformed = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    dtype = query.dtype if not transformed and computes_scale(scale) else None
    return settings, sizes, str(query.device), _needs_grad(query, key, value, mask), obstacle, dtype


class _Known(NamedTuple):
    """What is known of a call.

    Attributes:
        plans: its plans.
        run: what the best of them does with query, key and value, without looking at them again; None where it has to.
    """

    plans: CallPlans
    run: Callable[[Tensor, Tensor, Tensor], Tensor] | None


# Calls that were checked and planned before, by all that this depends on but for the memory that is free. What a
# processor has is no part of it, as that stays while the process runs. A UNet has some dozens of calls.
_known_calls: dict[tuple[Any, ...], _Known] = {}
_MOST_KNOWN_CALLS = 4096


def _known_as(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    slicing: SliceConfig | Mapping[str, Any] | None,
) -> tuple[Any, ...] | None:
    """What a call without dropout is known by; None for one that is not to be remembered.

    Which kernel PyTorch takes on CUDA depends on its settings too, so that it is asked each time. On other devices
    nothing is remembered.
    """
    if is_watched(query, key, value):
        return None
    place: tuple[int, int] | None = None
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        index = query.get_device()
        if not query.is_cuda or key.get_device() != index or value.get_device() != index:
            return None
        # PyTorch has no answer to calls that it cannot fuse, then.
        if not torch.backends.cuda.math_sdp_enabled():  # type: ignore[no-untyped-call]
            return None
        place = index, pytorchs_choice(query, key, value, mask, 0.0, is_causal, scale, enable_gqa)
    if forward_ad._current_level >= 0 or not computes_scale(scale):
        return None
    if mask is not None and not (type(mask) is Tensor and mask.device == query.device and mask.dim() == 4):
        return None
    if type(slicing) is not SliceConfig:
        slicing = _DEFAULT if slicing is None else SliceConfig.of(slicing)
    return (
        *(query.shape, key.shape, value.shape),
        *(query.stride(), key.stride(), value.stride()),
        *(query.dtype, key.dtype, value.dtype),
        torch.is_grad_enabled() and (query.requires_grad, key.requires_grad, value.requires_grad),
        None if mask is None else (mask.shape, mask.dtype, mask.requires_grad),
        *(is_causal, enable_gqa, scale, torch.get_num_threads(), place, slicing),
    )


_DEFAULT = SliceConfig()


def _known(
    plans: CallPlans,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> _Known:
    best, run = plans.best, None
    if best is not None and best.kernel == "native" and not _needs_grad(query, key, value, None):
        run = prepared_inference(query, key, value, _scale_of(query, scale))
    elif best is not None and best.kernel == "fused" and not best.upcast and mask is None and not enable_gqa:
        if query.is_cpu:
            run = partial(flash_attention, is_causal=is_causal, scale=scale)
        elif is_fused(pytorchs_choice(query, key, value, None, 0.0, is_causal, scale, enable_gqa), query):
            run = partial(F.scaled_dot_product_attention, is_causal=is_causal, scale=scale)
    return _Known(plans, run)


def _remember(call: tuple[Any, ...], known: _Known) -> None:
    if len(_known_calls) >= _MOST_KNOWN_CALLS:
        _known_calls.clear()
    _known_calls[call] = known


def _settings(slicing: SliceConfig | Mapping[str, Any] | None) -> tuple[Any, ...]:
    """The fields of a config one by one, which a traced graph takes as constants, where it would not take a dict."""
    if isinstance(slicing, Mapping):
        return _settings_of_items(tuple(slicing.items()))
    slicing = SliceConfig.of(slicing)
    return slicing.budget, slicing.policy, slicing.kernel, slicing.steps, slicing.checkpoint, slicing.upcast


@constant_in_graph
def _settings_of_items(items: tuple[tuple[str, Any], ...]) -> tuple[Any, ...]:
    return _settings(SliceConfig.of(dict(items)))


def _needs_grad(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    any_of_them = query.requires_grad or key.requires_grad or value.requires_grad
    return torch.is_grad_enabled() and (any_of_them or (mask is not None and mask.requires_grad))


def sliced_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    slicing: SliceConfig | Mapping[str, Any] | None = None,
    plan: SlicePlan | None = None,
) -> Tensor:
    """`F.scaled_dot_product_attention`, computed in slices that fit a memory budget.

    `softmax(scale * query key^T + attn_mask) value`, with `attn_mask` -inf where a bool mask is False. The result
    is that of full attention, whatever the number of slices.

    Args:
        query: `(..., H, N, D)`, float32, bfloat16, float16 or float64; `(N, D)` and `(H, N, D)` do as well.
        key: `(..., H, M, D)`, same dtype and device.
        value: `(..., H, M, Dv)`, same dtype and device.
        attn_mask: broadcastable to `(..., H, N, M)`; bool, True where a query may look, or floating point, added to
            the scores. A row without any key gives zeros. A floating-point mask may need a gradient.
        dropout_p: probability of dropping an attention weight. Applied whenever it is above 0, as in SDPA.
        is_causal: query `i` sees keys `0..i`. Not together with `attn_mask`.
        scale: factor of the scores, `1 / sqrt(D)` when left out.
        enable_gqa: key and value may have fewer heads than query, a divisor of `H`.
        slicing: a `SliceConfig`, or a dict of its fields.
        plan: follow this plan, made for these sizes, instead of making one; not together with `slicing`.

    Under autocast query, key, value and a floating-point mask are cast to the autocast dtype, as by SDPA. Half
    precision is computed in float32 tiles on CPU and CUDA, and on other devices with `upcast`; a `plan` says itself.

    Returns:
        `(..., H, N, Dv)` in the dtype of `query`, laid out as `(..., N, H, Dv)` where it is 4-D.

    Raises:
        NotEnoughMemoryError: no plan fits the budget.
        ValueError: sizes, dtypes, devices or settings that do not go together.

    >>> query, key, value = torch.randn(3, 2, 5, 7, 4).unbind()
    >>> sliced_attention(query, key, value, slicing={"kernel": "math", "steps": 3}).shape
    torch.Size([2, 5, 7, 4])
    """
    return planned_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, slicing=slicing, plan=plan
    )[0]


def planned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    slicing: SliceConfig | Mapping[str, Any] | None = None,
    plan: SlicePlan | None = None,
) -> tuple[Tensor, SlicePlan | None]:
    """`sliced_attention` and the plan it followed; None where there was nothing to attend to."""
    if plan is not None and (slicing is not None or not isinstance(plan, SlicePlan)):
        raise ValueError(
            f"plan: expected a SlicePlan and no slicing beside it; got {type(plan).__name__}"
            f"{' and slicing' if slicing is not None else ''}. Pass the one or the other."
        )
    query, key, value, attn_mask = autocast_inputs(query, key, value, attn_mask)
    call = None
    if plan is None and dropout_p == 0:
        call = _known_as(query, key, value, attn_mask, is_causal, scale, enable_gqa, slicing)
        if (known := None if call is None else _known_calls.get(call)) is not None:
            plan = known.plans.now()
            if known.run is not None and plan is known.plans.best:
                return known.run(query, key, value), plan
            return _follow(plan, query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa), plan
    settings = _settings(slicing)
    shapes = query.shape, key.shape, value.shape
    check_inputs(query, key, value, attn_mask, dropout_p, is_causal)
    # Asked of the inputs as they came: where SDPA would not fuse, its accuracy is that of the unfused kernel.
    obstacle = fused_obstacle(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    lead = query.shape[:-2]
    query, key, value, mask = as_four_dims(query, key, value, attn_mask, enable_gqa)
    batch, heads, queries, head_dim = query.shape
    if 0 in (batch, heads, queries, key.shape[2]):
        output = (query @ key.new_zeros(1, 1, head_dim, 1)) * value.new_zeros(value.shape[3])  # (B, H, N, Dv)
        return output.reshape(*lead, queries, value.shape[3]), None
    if plan is None:
        question = _question(query, key, value, mask, dropout_p, is_causal, scale, obstacle, settings)
        plan = _decide(*question)
        if call is not None and shapes == (query.shape, key.shape, value.shape):  # not ones to be viewed as 4-D
            plans = _plans(*question)
            _remember(call, _known(plans, query, key, value, mask, is_causal, scale, enable_gqa))
    elif plan.kernel == "native":
        _check_native(query, key, mask, dropout_p, is_causal, scale)
    output = _follow(plan, query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)
    return output if len(lead) == 2 else output.reshape(*lead, queries, value.shape[3]), plan


def _check_native(
    query: Tensor, key: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None
) -> None:
    """The native kernel has no place for these arguments, and a plan that came from elsewhere may meet them."""
    others = {
        "a mask": mask is not None,
        "is_causal": is_causal,
        "dropout": dropout_p > 0,
        f"a scale of {scale}": not computes_scale(scale),
        "fewer heads of keys than of queries": key.shape[1] != query.shape[1],
        "float64": query.dtype == torch.float64,
    }
    found = [name for name, is_there in others.items() if is_there]
    if found:
        raise ValueError(
            f"plan: expected one made for this call; got one of the native kernel, which does not compute "
            f"{', '.join(found)}. Leave plan out, or make one for this call."
        )


def _scale_of(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(max(query.shape[3], 1)) if scale is None else scale


def _follow(
    plan: SlicePlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Attention of 4-D inputs by the plan's kernel."""
    if plan.kernel == "fused" and not plan.upcast:
        return fused_attention(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)
    scale = _scale_of(query, scale)
    training = _needs_grad(query, key, value, mask)
    output: Tensor
    if plan.kernel == "fused":
        output, _ = float32_flash(query, key, value, mask, is_causal, scale, plan.heads, training)
    elif plan.kernel == "native":
        output = attend_natively(query, key, value, scale, training)
    else:
        seed = torch.randint(2**63 - 1, ()) if dropout_p > 0 else None
        keep_weights = training and not plan.checkpoint and not plan.keys
        settings = dropout_p, is_causal, scale, plan.upcast, keep_weights
        output, _ = _attention(query, key, value, mask, seed, *settings, plan.items, plan.heads, plan.rows, plan.keys)
    return output
