"""A call of attention as ComfyUI and Forge make it, by slicemod."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slicemod.sdpa_mode import sliced_sdpa
from slicemod.sdpa_report import note_passed_on

# PyTorch's kernels for NVIDIA do not take batches of any size. Attention over time has an item for each pixel.
_MOST_ITEMS = 2**15


def comfy_attention(  # noqa: PLR0913 - the signature of ComfyUI's attention functions
    slicer: sliced_sdpa,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What ComfyUI's `attention_pytorch` computes, sliced.

    Args:
        slicer: the settings; its report counts the call.
        q: `(B, N, H D)`, or with `skip_reshape` `(B, H, N, D)`.
        k: `(B, M, H D)` or `(B, M, H, D)`, or with `skip_reshape` `(B, H, M, D)`. With `enable_gqa` it may have fewer
            heads.
        v: like `k`. With `skip_reshape` it may have a width `Dv` of its own.
        heads: `H`, the heads of `q`.
        mask: `(N, M)`, `(B, N, M)` or `(B, H, N, M)`; each size may be 1. A bool mask is True where a query may look,
            any other is added to the scores.
        attn_precision: float32 asks for scores in float32. On CPUs and CUDA slicemod has them in float32 anyway.
            Elsewhere it casts the inputs.
        skip_reshape: the heads of the inputs are apart.
        skip_output_reshape: leave the heads of the output apart.
        scale: factor of the scores; `1 / sqrt(D)` when left out.
        enable_gqa: several heads of `q` share one of `k` and `v`.

    Returns:
        `(B, N, H Dv)`, or with `skip_output_reshape` `(B, H, N, Dv)`.

    Raises:
        NotEnoughMemoryError: no plan fits the budget.
    """
    if not skip_reshape:
        batch, head_dim = q.shape[0], q.shape[-1] // heads
        key_heads, value_heads = (each.shape[-1] // head_dim if enable_gqa else heads for each in (k, v))
        q, k, v = (  # SD3 passes a v whose heads are apart already
            each.reshape(batch, -1, each_heads, head_dim).transpose(1, 2)
            for each, each_heads in ((q, heads), (k, key_heads), (v, value_heads))
        )
    if mask is not None and mask.dim() == 3:
        mask = mask.unsqueeze(1)  # (B, 1, N, M)
    dtype = q.dtype
    if attn_precision == torch.float32 and q.device.type not in ("cpu", "cuda"):
        q, k, v = q.float(), k.float(), v.float()
    with slicer:
        out = _in_batches(q, k, v, mask, {"scale": scale, "enable_gqa": enable_gqa}).to(dtype)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def _in_batches(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, more: dict[str, Any]) -> Tensor:
    """Attention of `_MOST_ITEMS` at a time, as ComfyUI computes it; inputs and output with their heads apart."""
    batch, heads, queries, _ = q.shape
    if batch <= _MOST_ITEMS:
        return F.scaled_dot_product_attention(q, k, v, mask, **more)
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    for start in range(0, batch, _MOST_ITEMS):
        items = slice(start, start + _MOST_ITEMS)
        own_mask = mask[items] if mask is not None and mask.dim() == 4 and mask.shape[0] > 1 else mask
        out[items] = F.scaled_dot_product_attention(q[items], k[items], v[items], own_mask, **more)
    return out


_KNOWN = frozenset(inspect.signature(comfy_attention).parameters) - {"slicer"}
# Keywords that say nothing about the result.
_HINTS = frozenset({"transformer_options", "_inside_attn_wrapper", "low_precision_attention"})


def sliced_or_own(
    slicer: sliced_sdpa, own: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    """`comfy_attention`, or the program's own attention for a call with a keyword that slicemod does not know.

    The report of `slicer` names such keywords.
    """
    given = {name: value for name, value in kwargs.items() if name not in _HINTS}
    unknown = [name for name in given if name not in _KNOWN]
    if unknown:
        reason = f"{', '.join(unknown)}: not known to slicemod, so the program's own attention took the call"
        note_passed_on(slicer.report.number, reason)
        return own(*args, **kwargs)
    return comfy_attention(slicer, *args, **given)
