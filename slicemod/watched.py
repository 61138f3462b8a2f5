"""Whether something looks on at the operators that are called, and what then is asked outside of a traced graph."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from slicemod.torch_internals import compiling_frames, dispatch_modes, innermost_transformation, tracing_state

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graph(function: Function) -> Function:
    """Marks what runs outside of a graph that is traced, so that its answer is a constant in there.

    It does what ``torch.compiler.assume_constant_result`` does, which imports the compiler first. That takes longer
    than importing the rest of PyTorch, and most programs never compile.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_transformed() -> bool:
    """A function of `torch.func` differentiates or maps what is called, and no graph is traced."""
    return not torch.compiler.is_compiling() and innermost_transformation() is not None


def is_watched(*tensors: Tensor) -> bool:
    """Something traces, transforms or counts operators, or stands in for these tensors.

    Where nothing does, what is called need not be an operator, and the answer to an earlier call holds for this one.
    """
    for tensor in tensors:
        if type(tensor) is not Tensor:
            return True
    return (
        torch.compiler.is_compiling()
        or compiling_frames() is not None  # the compiler would trace the functions called from here
        or tracing_state() is not None
        or dispatch_modes() > 0
        or innermost_transformation() is not None
    )
