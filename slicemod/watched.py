"""Whether something looks on at the operators that are called."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

# Taken from PyTorch's dictionaries once: between large products, looking through them takes longer than the questions.
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._C._functorch import peek_interpreter_stack

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graph(function: Function) -> Function:
    """Marks what runs outside of a graph that is traced, so that its answer is a constant in there.

    It does what ``torch.compiler.assume_constant_result`` does, which imports the compiler first. That takes longer
    than importing the rest of PyTorch, and most programs never compile.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_watched(*tensors: Tensor) -> bool:
    """Something traces, transforms or counts operators, or stands in for these tensors.

    Where nothing does, what is called need not be an operator, and the answer to an earlier call holds for this one.
    """
    for tensor in tensors:
        if type(tensor) is not Tensor:
            return True
    return (
        torch.compiler.is_compiling()
        or get_eval_frame_callback() is not None  # the compiler would trace the functions called from here
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
    )
