"""Whether something watches the operators that are called (a compiler, a transform, a counter), and how to run code
outside of a traced graph."""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from slicemod.torch_internals import compiling_frames, dispatch_modes, innermost_transformation, tracing_state

Function = TypeVar("Function", bound=Callable[..., Any])

# What a function that is `constant_in_graph` is handed: a tracer takes tuples of plain values as constants, no records.
PlainValues: TypeAlias = tuple[Any, ...]


def constant_in_graph(function: Function) -> Function:
    """Marks a function that runs outside of the graph while one is traced. Its answer is a constant of the graph.

    This does what ``torch.compiler.assume_constant_result`` does. That function imports the compiler, which takes
    longer than importing the rest of PyTorch, and most programs never compile.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def plain_values(record: Any, names: tuple[str, ...]) -> PlainValues:
    """The fields of a record with these names. Code around it may be traced.

    Not every version of PyTorch can trace how a record is handed to a function that is `constant_in_graph`, or how its
    `__match_args__`, which are these names, are read.
    """
    return tuple([getattr(record, name) for name in names])


def is_transformed() -> bool:
    """A function of `torch.func` transforms the current call, and no graph is traced."""
    return not torch.compiler.is_compiling() and innermost_transformation() is not None


def is_watched(*tensors: Tensor) -> bool:
    """Something traces, transforms or counts operators, or one of the tensors is of a subclass of `Tensor`.

    If nothing does, the code need not be called as an operator, and what an earlier call like this one found out holds.
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
