"""The projections of a layer. On a CPU they run in two halves of their rows if that is faster (`halves.py`)."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from slicemod.call import needs_grad
from slicemod.layers.halves import HALVES, Halves
from slicemod.layers.plain_module import runs_alone
from slicemod.torch_internals import differentiates_forward, is_any_autocast_enabled
from slicemod.watched import is_watched

_PLAIN = (Tensor, nn.Parameter)
_HALF_PRECISION = (torch.bfloat16, torch.float16)


def project(module: Any, x: Tensor, halves: Halves = HALVES) -> Tensor:
    """`module(x)`. A plain `nn.Linear` runs in two halves of its rows if this gives the same bits in less time.

    In an `nn.Sequential` this holds for each of its parts. The parts of an `nn.ModuleList` are called one after the
    other. Neither way, nor timing them, takes more memory than the result and what oneDNN takes for one product.
    """
    if type(module) is nn.ModuleList:
        for part in module:
            x = project(part, x, halves)
        return x
    if x.is_cpu and x.dtype in _HALF_PRECISION:
        if type(module) is nn.Sequential and is_plain(module, x):
            for part in module:
                x = project(part, x, halves)
            return x
        if type(module) is nn.Linear:
            small = halves.may_pay_off(module, x)
            if small and is_plain(module, x) and _is_product(module, x) and halves.pay_off(module, x):
                return halves.compute(module, x)
    output: Tensor = module(x)
    return output


def is_plain(module: nn.Module, x: Tensor) -> bool:
    """Nothing watches the operators, and no hook or changed `forward` would be missed if the module is not called."""
    return not is_watched(x) and runs_alone(module)


def _is_product(linear: nn.Linear, x: Tensor) -> bool:
    """The module is one product of plain contiguous tensors on a CPU, and no gradient is needed."""
    return torch.get_num_threads() > 1 and x.is_cpu and x.is_contiguous() and _multiplies_without_gaps(linear, x)


def is_plain_linear(module: Any, x: Tensor) -> TypeGuard[nn.Linear]:
    """`module(x)` is nothing but one product with the module's weight and bias, which need no gradient.

    So it may be computed by its weights, for some rows or some columns at a time.
    """
    return type(module) is nn.Linear and is_plain(module, x) and _multiplies_without_gaps(module, x)


def _multiplies_without_gaps(linear: nn.Linear, x: Tensor) -> bool:
    """Weight and bias are contiguous, and `multiplies_plain_tensors`."""
    return multiplies_plain_tensors(linear, x) and all(
        given is None or given.is_contiguous() for given in linear._parameters.values()
    )


def multiplies_plain_tensors(module: nn.Module, x: Tensor) -> bool:
    """Weight and bias are plain tensors of the dtype and device of `x`, and no gradient is needed."""
    if is_any_autocast_enabled() or differentiates_forward() or needs_grad(x):
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None:  # a wrapper keeps it elsewhere
        return False
    return type(x) in _PLAIN and all(
        type(tensor) in _PLAIN and tensor.device == x.device and tensor.dtype == x.dtype and not needs_grad(tensor)
        for tensor in (weight, bias)
        if tensor is not None
    )
