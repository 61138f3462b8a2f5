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
    own = type(module).forward.__globals__ is vars(sys.modules[type(module).__module__])
    return own and "forward" not in vars(module) and module._compiled_call_impl is None
