"""The yardstick of the tests: how far a result is from exact attention, and how far SDPA's is.

Every comparison is with `reference_attention` in float64. The error of a result is the Frobenius norm of its
difference; it may be twice that of `F.scaled_dot_product_attention` on the same inputs, 2.5 times for gradients in
half precision. A norm over some hundred elements is steady where the largest single difference is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.reference import reference_attention

Attention = Callable[..., Tensor]
Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Inputs:
    """The tensors of one attention call and its settings (`is_causal`, `scale`, `enable_gqa`)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def leaves(self, dtype: torch.dtype | None = None) -> Inputs:
        """Leaves over the same values, of the same strides; all need gradients, a mask only if this one does."""
        tensors = [tensor.detach() for tensor in (self.query, self.key, self.value)]
        mask = None if self.mask is None else self.mask.detach()
        if dtype is not None:
            tensors = [tensor.to(dtype) for tensor in tensors]
            mask = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else mask
        if mask is not None and self.mask is not None and self.mask.requires_grad:
            mask.requires_grad_()
        query, key, value = (tensor.requires_grad_() for tensor in tensors)
        return Inputs(query, key, value, mask, self.settings)

    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that need a gradient, by name."""
        named = {"query": self.query, "key": self.key, "value": self.value, "mask": self.mask}
        return {name: tensor for name, tensor in named.items() if tensor is not None and tensor.requires_grad}

    def run(self, attention: Attention, **more: Any) -> Tensor:
        """Call `attention` on these inputs."""
        return attention(self.query, self.key, self.value, self.mask, **self.settings, **more)


def layer_like(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random `(B, H, N, D)` with the strides that a layer's `b n (h d) -> b h n d` gives."""
    return torch.randn(batch, tokens, heads, width).to(dtype).transpose(1, 2)


def layer_inputs(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    heads: int = 3,
    queries: int = 61,
    keys: int = 53,
    width: int = 11,
    key_heads: int | None = None,
    mask: Tensor | None = None,
    **settings: Any,
) -> Inputs:
    """Inputs with a layer's strides and distinct prime sizes."""
    shared = heads if key_heads is None else key_heads
    query, key = layer_like(batch, heads, queries, width, dtype), layer_like(batch, shared, keys, width, dtype)
    value = layer_like(batch, shared, keys, width, dtype)
    if key_heads is not None:
        settings["enable_gqa"] = True
    return Inputs(query, key, value, mask, settings)


def results(attention: Attention, inputs: Inputs, grad_output: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of `attention`, by name."""
    output = inputs.run(attention)
    wanted = inputs.differentiable()
    grads = torch.autograd.grad(output, list(wanted.values()), grad_output.to(output.dtype))
    return {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_as_exact_as_sdpa(attention: Attention, inputs: Inputs, *, ulps: float = 0.5) -> None:
    """Output and gradients of `attention` are as near to exact attention as SDPA's, but for the factor allowed.

    `ulps` units in the last place of the exact result's norm are allowed on top: half of one is what rounding the
    exact result costs. Results of small tensors need a few, since SDPA may be right by luck there, and so do results
    in float64, of which the oracle is no more exact. A thousandth of one, of the largest result's norm, is allowed to
    gradients whose terms cancel to nothing.
    """
    dtype = inputs.query.dtype
    ulps = max(ulps, 4.0) if dtype == torch.float64 else ulps
    sizes = (*inputs.query.shape[:-1], inputs.value.shape[-1])
    grad_output = layer_like(*sizes, dtype) if len(sizes) == 4 else torch.randn(sizes).to(dtype)
    exact = results(reference_attention, inputs.leaves(torch.float64), grad_output)
    theirs = results(F.scaled_dot_product_attention, inputs.leaves(), grad_output)
    ours = results(attention, inputs.leaves(), grad_output)
    ulp = torch.finfo(dtype).eps
    largest = max(float(result.norm()) for result in exact.values())
    assert ours.keys() == exact.keys()
    for name, result in ours.items():
        assert result.dtype == dtype
        assert result.shape == exact[name].shape
        assert result.isfinite().all(), name
        factor = 2.5 if dtype.itemsize < 4 and name != "output" else 2.0
        scale = largest if ulps > 1 else float(exact[name].norm())
        allowed = factor * error(theirs[name], exact[name]) + ulp * (ulps * scale + 1e-3 * largest)
        assert error(result, exact[name]) <= allowed, name


def error(result: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference, in float64."""
    return float((result.detach().double() - exact.detach().double()).norm())


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Some gradients are zero but for rounding, so that the largest of all sets the scale."""
    scale = max(float(tensor.abs().max()) for tensor in theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 * scale)


def with_random_weights(model: Model) -> Model:
    """The model with none of the zeros that its authors start some layers with, which would hide what they get."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model
