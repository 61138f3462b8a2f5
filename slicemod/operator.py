"""Custom operators that are bypassed if nothing watches the operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slicemod.watched import is_watched


class Operator:
    """`torch.library.custom_op` of a function without side effects, to be called with positional arguments.

    A compiler, a transform or a counter of operators sees the operator. If there is none of these, the function is
    called directly, because calling an operator takes tens of microseconds, and its first call imports PyTorch's
    compiler, which takes seconds.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._operator = torch.library.custom_op(name, function, mutates_args=())
        self._function = function
        self._differentiable: type[torch.autograd.Function] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """`torch.library.register_fake` for this operator; may be used as a decorator."""
        self._operator.register_fake(fake)

    def register_vmap(self, batched: Callable[..., Any]) -> None:
        """`torch.library.register_vmap` for this operator."""
        self._operator.register_vmap(batched)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """`torch.library.register_autograd` for this operator."""
        self._operator.register_autograd(backward, setup_context=setup_context)
        function = self._function

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = function(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor | None) -> Any:
                return backward(ctx, *gradients)

        self._differentiable = Differentiable

    def __call__(self, *inputs: Any) -> Any:
        """The function's result, with gradients if they are registered and needed."""
        tensors = [given for given in inputs if isinstance(given, Tensor)]
        if is_watched(*tensors) or any(tensor.is_meta for tensor in tensors):
            return self._operator(*inputs)
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if wanted and self._differentiable is not None:
            return self._differentiable.apply(*inputs)
        return self._function(*inputs)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an `Operator` of the function below it."""

    def of(function: Callable[..., Any]) -> Operator:
        return Operator(name, function)

    return of
