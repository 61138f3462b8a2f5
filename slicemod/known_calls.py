"""Remembers calls: an eager call that is like an earlier one is looked up, instead of checked and planned again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from slicemod import kernels
from slicemod.call import must_be_deterministic
from slicemod.choose import CallPlans
from slicemod.config import SliceConfig
from slicemod.kernels.fused.running import pytorchs_choice
from slicemod.kernels.kernel import Arguments, Inputs, Run
from slicemod.kernels.table_in_use import given_table
from slicemod.torch_internals import differentiates_forward
from slicemod.watched import is_watched

CallKey: TypeAlias = tuple[Hashable, ...]  # only compared as a whole: nothing reads its parts


class KnownCall(NamedTuple):
    """What is known of a call.

    Attributes:
        plans: its plans.
        arguments: its arguments besides the tensors.
        run: runs the best plan, without another look at sizes and strides. None if there is no best plan.
    """

    plans: CallPlans
    arguments: Arguments
    run: Run | None


class KnownCalls:
    """Calls that were checked and planned before. The key of a call is everything that this depended on, except the
    free memory.

    What the processor can do is not in the key, because it does not change while the process runs. A UNet makes some
    dozens of different calls. If there are more than `most`, all are forgotten.
    """

    def __init__(self, most: int = 4096) -> None:
        self._calls: dict[CallKey, KnownCall] = {}
        self.most = most

    def __len__(self) -> int:
        return len(self._calls)

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()

    def find(self, key: CallKey | None) -> KnownCall | None:
        """What is known of the call with this key."""
        return None if key is None else self._calls.get(key)

    def remember(self, key: CallKey, known: KnownCall) -> None:
        """Keep what is known of a call."""
        if len(self._calls) >= self.most:
            self._calls.clear()
        self._calls[key] = known


KNOWN_CALLS = KnownCalls()

_DEFAULT = SliceConfig()


def key_of(inputs: Inputs, arguments: Arguments, slicing: SliceConfig | Mapping[str, Any] | None) -> CallKey | None:
    """The key of a call, or None if the call must not be remembered.

    On CUDA, which kernel PyTorch takes depends on PyTorch's settings too, so PyTorch is asked each time, and its answer
    is part of the key. Calls on devices other than CPU and CUDA are not remembered.
    """
    query, key, value, mask = inputs
    if is_watched(query, key, value):
        return None
    place: tuple[int, int, bool] | None = None
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        index = query.get_device()
        if not query.is_cuda or key.get_device() != index or value.get_device() != index:
            return None
        # With its math kernel disabled, PyTorch raises for calls that it cannot fuse, instead of giving an answer.
        if not torch.backends.cuda.math_sdp_enabled():  # type: ignore[no-untyped-call]
            return None
        place = index, pytorchs_choice(inputs, arguments), must_be_deterministic()
    if differentiates_forward():
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
        None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.requires_grad),
        *(arguments.is_causal, arguments.enable_gqa, arguments.scale, torch.get_num_threads(), place),
        *(slicing, kernels.KERNELS, given_table()),
    )
