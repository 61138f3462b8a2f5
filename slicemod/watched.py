"""Whether something looks on at the operators that are called."""

import torch
from torch import Tensor


def is_watched(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Something traces, transforms or counts operators, or stands in for these tensors.

    Where nothing does, what is called need not be an operator, and the answer to an earlier call holds for this one.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or not type(query) is type(key) is type(value) is Tensor
    )
