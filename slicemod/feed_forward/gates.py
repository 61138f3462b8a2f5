"""What stands between the two projections of a feed-forward, as plain values, with its derivative."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gate(NamedTuple):
    """An activation of what the first projection gave.

    Attributes:
        curve: "gelu", "tanh" (GELU by the hyperbolic tangent) or "silu".
        gated: one half of the channels is multiplied by the activation of the other half.
    """

    curve: str
    gated: bool

    def __call__(self, projected: Tensor) -> Tensor:
        """`(T, inner)` of `(T, inner)`, or of `(T, 2 inner)` if it is gated."""
        if not self.gated:
            return _curve(self.curve, projected)
        values, gates = projected.chunk(2, dim=-1)
        return values * _curve(self.curve, gates)

    def gradient(self, grad: Tensor, projected: Tensor) -> Tensor:
        """The gradient of what was projected."""
        if not self.gated:
            return _slope(self.curve, grad, projected)
        values, gates = projected.chunk(2, dim=-1)
        result = torch.empty_like(projected)
        grad_values, grad_gates = result.chunk(2, dim=-1)
        torch.mul(grad, _curve(self.curve, gates), out=grad_values)
        torch.mul(grad, values, out=grad_gates)
        grad_gates.copy_(_slope(self.curve, grad_gates, gates))
        return result


def gate_of(activation: Any) -> Gate | None:
    """The gate of the first part of a feed-forward; None if it is another one, or not plain."""
    name = type(activation).__name__
    if name == "GEGLU":
        return Gate("gelu", gated=True)
    if name == "SwiGLU" and type(activation.activation) is nn.SiLU:
        return Gate("silu", gated=True)
    if name == "LinearActivation" and type(activation.activation) is nn.SiLU:
        return Gate("silu", gated=False)
    if name == "GELU" or (isinstance(activation, nn.Sequential) and type(activation[1]) is nn.GELU):
        approximate = activation.approximate if name == "GELU" else activation[1].approximate
        return Gate("tanh" if approximate == "tanh" else "gelu", gated=False)
    return None


def _curve(curve: str, x: Tensor) -> Tensor:
    return F.silu(x) if curve == "silu" else F.gelu(x, approximate="tanh" if curve == "tanh" else "none")


def _slope(curve: str, grad: Tensor, x: Tensor) -> Tensor:
    result: Tensor
    if curve == "silu":
        result = torch.ops.aten.silu_backward(grad, x)
    else:
        result = torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if curve == "tanh" else "none")
    return result
