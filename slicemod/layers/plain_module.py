"""Whether calling a module is no more than the code of its class."""

import sys

from torch import nn

from slicemod.torch_internals import has_any_global_hook


def runs_alone(module: nn.Module) -> bool:
    """No hook and no changed `forward` would be missed if the module is not called."""
    if has_any_global_hook():
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    # Some programs put a forward of their own into a module, or into its class.
    is_own = has_own(type(module), "forward") and "forward" not in vars(module)
    return is_own and module._compiled_call_impl is None


def has_own(kind: type[nn.Module], method: str) -> bool:
    """A method of a class of modules is from the file of the class."""
    return getattr(getattr(kind, method), "__globals__", None) is vars(sys.modules[kind.__module__])
