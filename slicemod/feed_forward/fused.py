"""A feed-forward of three products that oneDNN fuses with the bias, the activation and the gate.

PyTorch writes what the first projection gives to memory, reads it for the activation and again for the gate, and a
product of half precision starts from a copy of its bias. oneDNN does all this while the numbers are in the cache, in
float32. So a chunk holds half as much, takes less time, and in bfloat16 is more accurate.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.call import needs_grad
from slicemod.feed_forward.gates import Gate, gate_of
from slicemod.feed_forward.sizes import first_projection
from slicemod.half_precision import cpu_products, onednn_limit
from slicemod.layers.plain_module import runs_alone
from slicemod.layers.projection import is_plain_linear
from slicemod.torch_internals import PYTORCH, fused_linear, fused_linear_times, has_avx512, has_onednn

# With fewer multiplications in a product, the calls take longer than what they save.
_LEAST_PRODUCTS = 2**28
# oneDNN adds up all channels in one float32 number, MKL in several. Up to so many channels the rounding error is up to
# 1.6 times MKL's, with more it is over twice as large.
_MOST_SUMMED = 640
# The first version of PyTorch whose products are known to take no more than the plan. Those of 2.9 take half as much
# again in bfloat16.
_MEASURED_FROM = 2, 14
# What oneDNN takes for a product is 257 KiB for each thread at most, measured with 1 to 8 threads. It has to fit into
# what a chunk holds less than its plan says: one tensor between the projections, two where there is a gate.
_SCRATCH = 2**19

# oneDNN's names, their numbers and their variants.
_CURVES: dict[str, tuple[str, list[float], str]] = {
    "gelu": ("gelu", [], "none"),
    "tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
}
_NO_CURVE: tuple[str, list[float], str] = ("none", [], "")


class FusedFeedForward(NamedTuple):
    """A projection, a gate, and the projection back."""

    first: nn.Linear
    gate: Gate
    second: nn.Linear

    def compute(self, tokens: Tensor) -> Tensor:
        """`(T, C')` of `(T, C)`."""
        weight, bias, inner = self.first.weight, self.first.bias, self.second.in_features
        # The gates are the last of the channels.
        found = fused_linear(
            tokens, weight[-inner:], None if bias is None else bias[-inner:], *_CURVES[self.gate.curve]
        )
        if self.gate.gated:
            found = fused_linear_times(tokens, found, weight[:inner], None if bias is None else bias[:inner], "mul")
        if not _sums_exactly(self.second):
            return F.linear(found, self.second.weight, self.second.bias)
        output: Tensor = fused_linear(found, self.second.weight, self.second.bias, *_NO_CURVE)
        return output


def fused(net: Any, tokens: Tensor, rows: int) -> FusedFeedForward | None:
    """The feed-forward `net` as fused products; None if they are not known to be faster, or `net` does more than them.

    It does more, for example, with hooks, adapters or dropout, while a gradient is needed, and under autocast.

    Args:
        net: the parts of a feed-forward, see `slicemod.feed_forward.sizes.sizes_of`.
        tokens: `(T, C)`.
        rows: how many tokens are computed at a time.
    """
    if not tokens.is_cpu or not tokens.is_contiguous() or needs_grad(tokens) or not fused_is_faster(tokens.dtype):
        return None
    first, second, gate = first_projection(net[0]), net[2], gate_of(net[0])
    if gate is None or not is_plain_linear(first, tokens) or not is_plain_linear(second, tokens):
        return None
    if not _sums_exactly(first):
        return None
    inner = rows * second.in_features
    saved = (2 if gate.gated else 1) * inner * tokens.element_size()
    if first.in_features * inner < _LEAST_PRODUCTS or saved < torch.get_num_threads() * _SCRATCH:
        return None
    if any(map(_drops, (net[1], *net[3:]))) or not all(runs_alone(inside) for part in net for inside in part.modules()):
        return None
    return FusedFeedForward(first, gate, second)


def _sums_exactly(linear: nn.Linear) -> bool:
    """Whether oneDNN's product of this size is as exact as PyTorch's; in half precision both are oneDNN's."""
    return linear.weight.dtype != torch.float32 or linear.in_features <= _MOST_SUMMED


def _drops(part: nn.Module) -> bool:
    return type(part) is not nn.Dropout or (part.training and part.p > 0)


def fused_is_faster(dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused products are measured to be faster than PyTorch's operators on this kind of processor.

    In bfloat16 PyTorch's products are oneDNN's too. In float32 they are MKL's, which is slower than oneDNN on AMD's
    processors.
    """
    if not has_onednn or not torch.backends.mkldnn.enabled or PYTORCH < _MEASURED_FROM:
        return False
    if dtype == torch.bfloat16:
        return cpu_products(dtype) == "bfloat16"
    return dtype == torch.float32 and has_avx512() and not onednn_limit() and is_amd()


@lru_cache(maxsize=4)
def is_amd(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether Linux says so; elsewhere it was not measured."""
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")
