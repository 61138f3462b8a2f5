"""The projections of a layer. On a CPU they are computed in two halves of their rows if that is faster.

oneDNN computes some products in half precision by one thread, though it would use all threads for each half of the
rows. For which sizes it does this is not documented. So both ways are timed, once for each size of product that is
small enough for this to take only milliseconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable
from time import perf_counter
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.call import needs_grad
from slicemod.half_precision import cpu_products
from slicemod.layers.plain_module import runs_alone
from slicemod.rounding import ceil_div
from slicemod.torch_internals import differentiates_forward, is_any_autocast_enabled
from slicemod.watched import is_watched

_PLAIN = (Tensor, nn.Parameter)
_HALF_PRECISION = (torch.bfloat16, torch.float16)

# How many multiplications a product has that is timed. Smaller products are not worth two calls; for larger ones oneDNN
# uses all threads.
_LEAST_PRODUCTS, _MOST_PRODUCTS = 2**27, 2**29
# How oneDNN multiplies where it is timed (`cpu_products`). Without instructions for a dtype a product takes too long to
# be timed. By vectors of bfloat16, oneDNN uses all threads anyway, and takes more memory for a half than for the whole.
_MEASURED_PRODUCTS = ("tiles", "float16")
_ROUNDS = 5
_CLEARLY = 0.9  # the halves have to take less than this share of the time of the whole

# Whether halves are faster, by everything that this depends on.
_known_sizes: dict[tuple[Hashable, ...], bool] = {}
_MOST_KNOWN_SIZES = 4096


def project(module: Any, x: Tensor) -> Tensor:
    """`module(x)`. A plain `nn.Linear` runs in two halves of its rows if this gives the same bits in less time.

    In an `nn.Sequential` this holds for each of its parts. The parts of an `nn.ModuleList` are called one after the
    other. Neither way, nor timing them, takes more memory than the result and what oneDNN takes for one product.
    """
    if type(module) is nn.ModuleList:
        for part in module:
            x = project(part, x)
        return x
    if x.is_cpu and x.dtype in _HALF_PRECISION:
        if type(module) is nn.Sequential and is_plain(module, x):
            for part in module:
                x = project(part, x)
            return x
        if type(module) is nn.Linear:
            products = x.numel() * module.out_features
            small = _LEAST_PRODUCTS <= products <= _MOST_PRODUCTS
            if small and is_plain(module, x) and _is_product(module, x) and _is_faster_in_halves(module, x):
                return _in_halves(module, x)
    output: Tensor = module(x)
    return output


def is_plain(module: nn.Module, x: Tensor) -> bool:
    """Nothing watches the operators, and no hook or changed `forward` would be missed if the module is not called."""
    return not is_watched(x) and runs_alone(module)


def _is_product(linear: nn.Linear, x: Tensor) -> bool:
    """The module is one product of plain contiguous tensors on a CPU, and no gradient is needed."""
    return torch.get_num_threads() > 1 and x.is_cpu and x.is_contiguous() and _multiplies_plain_tensors(linear, x)


def is_plain_linear(module: Any, x: Tensor) -> TypeGuard[nn.Linear]:
    """`module(x)` is nothing but one product with the module's weight and bias, which need no gradient.

    So it may be computed by its weights, for some rows or some columns at a time.
    """
    return type(module) is nn.Linear and is_plain(module, x) and _multiplies_plain_tensors(module, x)


def _multiplies_plain_tensors(linear: nn.Linear, x: Tensor) -> bool:
    """Weight and bias are plain contiguous tensors of the dtype and device of `x`, and no gradient is needed."""
    if is_any_autocast_enabled() or differentiates_forward() or needs_grad(x):
        return False
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if weight is None:  # a wrapper keeps it elsewhere
        return False
    return type(x) in _PLAIN and all(
        type(tensor) in _PLAIN
        and tensor.is_contiguous()
        and tensor.device == x.device
        and tensor.dtype == x.dtype
        and not needs_grad(tensor)
        for tensor in (weight, bias)
        if tensor is not None
    )


def _is_faster_in_halves(linear: nn.Linear, x: Tensor) -> bool:
    rows = x.numel() // x.shape[-1]
    sizes = rows, linear.weight.shape, linear._parameters["bias"] is None, x.dtype, torch.get_num_threads()
    known = _known_sizes.get(sizes)
    if known is None:
        if len(_known_sizes) >= _MOST_KNOWN_SIZES:
            _known_sizes.clear()
        known = _known_sizes[sizes] = _measured(linear, x)
    return known


def _measured(linear: nn.Linear, x: Tensor) -> bool:
    """Whether both ways give the same result and the halves are clearly faster. It holds one result at a time."""
    if cpu_products(x.dtype) not in _MEASURED_PRODUCTS:
        return False
    sums: list[tuple[Tensor, Tensor]] = []
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(2 * _ROUNDS):
        start = perf_counter()
        output = _in_halves(linear, x) if turn % 2 else F.linear(x, linear.weight, linear.bias)
        seconds[turn % 2].append(perf_counter() - start)
        if turn < 2:
            sums.append(_sums_of_bits(output))
        del output
    same = all(map(torch.equal, *sums))
    whole, halves = map(statistics.median, seconds)
    return same and halves < _CLEARLY * whole


def _sums_of_bits(output: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the bits of each row and each column, to compare two results without keeping a copy of one."""
    bits = output.view(torch.int16).flatten(0, -2)
    return bits.sum(0, dtype=torch.int16), bits.sum(1, dtype=torch.int16)


def _in_halves(linear: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = linear.weight.t(), linear._parameters["bias"]
    rows = x.view(-1, x.shape[-1])
    output = x.new_empty(len(rows), linear.out_features)
    half = ceil_div(len(rows), 2)
    for part in (slice(None, half), slice(half, None)):
        if bias is None:
            torch.mm(rows[part], weight, out=output[part])
        else:
            torch.addmm(bias, rows[part], weight, out=output[part])
    return output.view(*x.shape[:-1], linear.out_features)
