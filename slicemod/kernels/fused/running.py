"""Runs PyTorch's fused attention in a way that lets PyTorch run nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slicemod.card import card_of
from slicemod.kernels.fused.cuda_bytes import cudnn_is_known
from slicemod.kernels.kernel import Arguments, Inputs
from slicemod.torch_internals import function_modes, fused_choice, sdpa_operator
from slicemod.watched import is_watched

# PyTorch's "math" backend is left out, because it allocates all scores, which no plan counts. So is cuDNN's attention,
# unless it is known what it allocates for a call (`is_fused`).
BACKENDS = {
    "cpu": [SDPBackend.FLASH_ATTENTION],
    "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
}
_SDPA: Callable[..., Tensor] = F.scaled_dot_product_attention  # PyTorch's own, whatever stands there later
_CHOICES = {device: {backend.value for backend in backends} for device, backends in BACKENDS.items()}
_CUDNN = SDPBackend.CUDNN_ATTENTION.value


def fused_attention(inputs: Inputs, more: Arguments) -> Tensor:
    """`F.scaled_dot_product_attention` by a fused kernel; `(B, H, N, D)` in and out.

    Raises:
        RuntimeError: PyTorch has no fused kernel for these inputs after all.
    """
    # Asking PyTorch for its choice takes a tenth of the time of `sdpa_kernel`, which restricts the choice.
    query, key, value, _ = inputs
    if not is_watched(query, key, value) and is_fused(pytorchs_choice(inputs, more), inputs, more):
        return sdpa(inputs, more)
    with sdpa_kernel(BACKENDS[query.device.type]):
        return sdpa(inputs, more)


def sdpa(inputs: Inputs, more: Arguments) -> Tensor:
    """`F.scaled_dot_product_attention` by the backend that PyTorch chooses.

    With a torch function mode on, this calls the operator below the function, because `sliced_sdpa` would take the
    function for a call of the model's. So does a graph, which may run with a mode on. Otherwise it calls the function,
    whose warnings reach Python.
    """
    attend = sdpa_operator if function_modes() or torch.compiler.is_compiling() else _SDPA
    return attend(*inputs, more.dropout_p, more.is_causal, scale=more.scale, enable_gqa=more.enable_gqa)


def pytorchs_choice(inputs: Inputs, more: Arguments) -> int:
    """The value of the `SDPBackend` that `F.scaled_dot_product_attention` would run, with PyTorch's settings of now."""
    return fused_choice(*inputs, more.dropout_p, more.is_causal, scale=more.scale, enable_gqa=more.enable_gqa)


def is_fused(choice: int | None, inputs: Inputs, more: Arguments) -> bool:
    """Whether `choice`, an answer of `pytorchs_choice`, is a fused kernel whose bytes the plan counts."""
    device = inputs[0].device
    if choice == _CUDNN:
        return device.type == "cuda" and counts_cudnn(inputs, more)
    return choice in _CHOICES[device.type]


def counts_cudnn(inputs: Inputs, more: Arguments) -> bool:
    """Whether the bytes of cuDNN's attention are known for this call on a CUDA device (`cudnn_is_known`)."""
    query, key, value, mask = inputs
    plain = mask is None and more.dropout_p == 0 and query.shape[-3] == key.shape[-3]
    return cudnn_is_known(card_of(query.device), int(query.shape[-1]), int(value.shape[-1]), plain=plain)
