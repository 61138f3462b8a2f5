"""The operators that a traced graph contains if the plan cannot be a constant of it.

A graph with a dynamic number of tokens plans when it runs. A graph whose attention cannot fit raises when it runs.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from slicemod.choose import plans_of
from slicemod.config import SliceConfig
from slicemod.dispatch import call_spec, describe, follow
from slicemod.kernels.fused.obstacles import layout_of
from slicemod.kernels.kernel import Arguments, Inputs
from slicemod.kernels.outputs import empty_heads
from slicemod.plan import NotEnoughMemoryError


@torch.library.custom_op("slicemod::not_enough_memory", mutates_args=())
def refused(query: Tensor, value: Tensor, message: str) -> Tensor:
    """Raises `NotEnoughMemoryError` when the graph runs. Raised while the graph is traced, the compiler would wrap it
    into an error of another type."""
    raise NotEnoughMemoryError(message)


@refused.register_fake
def _(query: Tensor, value: Tensor, message: str) -> Tensor:
    return empty_heads(query, value.shape[3])


def _no_gradients(_ctx: Any, _grad_output: Tensor) -> tuple[None, None, None]:
    """A graph that is compiled for training asks for the gradients before anything runs."""
    return None, None, None


refused.register_autograd(_no_gradients)


def is_dynamic(inputs: Inputs) -> bool:
    """A graph is traced, and a size of these tensors is symbolic in it."""
    return any(tensor is not None and any(isinstance(size, torch.SymInt) for size in tensor.shape) for tensor in inputs)


def planned_at_run_time(inputs: Inputs, arguments: Arguments, slicing: SliceConfig) -> Tensor:
    """Attention of 4-D inputs with symbolic sizes: one operator in the graph, which plans when it runs.

    It computes no gradients.
    """
    settings = json.dumps(slicing.as_dict())
    dropout_p, is_causal, scale, enable_gqa, *_ = arguments
    output: Tensor = _attention_of_any_size(*inputs, dropout_p, is_causal, scale, enable_gqa, settings)
    return output


@torch.library.custom_op("slicemod::attention_of_any_size", mutates_args=())
def _attention_of_any_size(  # noqa: PLR0913 - PyTorch wants the schema of an operator flat
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    settings: str,
) -> Tensor:
    inputs, arguments = (query, key, value, mask), Arguments(dropout_p, is_causal, scale, enable_gqa)
    call = call_spec(*describe(inputs, arguments, layout_of(inputs, arguments)))
    found = follow(plans_of(call, SliceConfig.of(json.loads(settings))).now(), inputs, arguments)
    output = empty_heads(query, value.shape[3])
    return found if found.stride() == output.stride() else output.copy_(found)


@_attention_of_any_size.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *settings: object) -> Tensor:
    return empty_heads(query, value.shape[3])
