"""Products of half precision in two halves of their rows, for the sizes where a CPU is faster that way.

oneDNN computes some products in half precision by one thread, though it would use all threads for each half of the
rows. For which sizes it does this is not documented. So both ways are timed, once for each size of product that is
small enough for this to take only milliseconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.half_precision import cpu_products
from slicemod.rounding import ceil_div

# How oneDNN multiplies where it is timed (`cpu_products`). Without instructions for a dtype a product takes too long to
# be timed. By vectors of bfloat16, oneDNN uses all threads anyway, and takes more memory for a half than for the whole.
_TIMED_PRODUCTS = ("tiles", "float16")
_ROUNDS = 5
_CLEARLY = 0.9  # the halves have to take less than this share of the time of the whole

Product = Callable[[nn.Linear, Tensor], Tensor]


def in_halves(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear(x)` for contiguous tensors without gradients, one half of the rows after the other."""
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


def are_faster(
    linear: nn.Linear,
    x: Tensor,
    halves: Product = in_halves,
    *,
    clock: Callable[[], float] = perf_counter,
    products: Callable[[torch.dtype], str | None] = cpu_products,
) -> bool:
    """Whether `halves` gives the same bits as the whole in clearly less time. It holds one result at a time.

    Args:
        linear: the product.
        x: what it multiplies, of half precision.
        halves: the other way to compute it.
        clock: the time in seconds.
        products: how the CPU multiplies a dtype.
    """
    if products(x.dtype) not in _TIMED_PRODUCTS:
        return False
    sums: list[tuple[Tensor, Tensor]] = []
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(2 * _ROUNDS):
        start = clock()
        output = halves(linear, x) if turn % 2 else F.linear(x, linear.weight, linear.bias)
        seconds[turn % 2].append(clock() - start)
        if turn < 2:
            sums.append(_sums_of_bits(output))
        del output
    same = all(map(torch.equal, *sums))
    whole, halved = map(statistics.median, seconds)
    return same and halved < _CLEARLY * whole


def _sums_of_bits(output: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the bits of each row and each column, to compare two results without keeping a copy of one."""
    bits = output.view(torch.int16).flatten(0, -2)
    return bits.sum(0, dtype=torch.int16), bits.sum(1, dtype=torch.int16)


@dataclass
class Halves:
    """Which products run in halves, by their sizes.

    Attributes:
        least: how many multiplications a product has that is worth two calls.
        most: the same, of the largest that is timed. For larger ones oneDNN uses all threads.
        room: how many sizes are remembered.
        compute: computes a product in halves.
        are_faster: whether that is faster for a product.
        known: what `are_faster` said, by everything that it depends on.
    """

    least: int = 2**27
    most: int = 2**29
    room: int = 4096
    compute: Product = in_halves
    are_faster: Callable[[nn.Linear, Tensor], bool] = are_faster
    known: dict[tuple[Hashable, ...], bool] = field(default_factory=dict)

    def may_pay_off(self, linear: nn.Linear, x: Tensor) -> bool:
        """The product is neither too small nor too large."""
        return self.least <= x.numel() * linear.out_features <= self.most

    def pay_off(self, linear: nn.Linear, x: Tensor) -> bool:
        """Halves are faster for a product of these sizes. For the first one, both ways are timed."""
        rows = x.numel() // x.shape[-1]
        sizes = rows, linear.weight.shape, linear._parameters["bias"] is None, x.dtype, torch.get_num_threads()
        known = self.known.get(sizes)
        if known is None:
            if len(self.known) >= self.room:
                self.known.clear()
            known = self.known[sizes] = self.are_faster(linear, x)
        return known


HALVES = Halves()
