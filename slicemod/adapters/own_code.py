"""Whether a layer still runs the code that its class was written with.

Some programs put their own attention into the classes or layers of others: hypernetworks, token merging, prompt
editing. A swap would silently lose that. So these functions find out where the code of a layer comes from. Hooks of
accelerate and diffusers put a `forward` on a layer that calls the former one; these are allowed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

ACCELERATE = "accelerate.hooks"
HOOKS = (ACCELERATE, "diffusers.hooks.hooks")

# Where AUTOMATIC1111's webui keeps what it puts into the classes of LDM and sgm. It applies hypernetworks in there.
_WEBUI = ("modules.sd_hijack", "modules.hypernetworks.")


def owner_of(kind: type, name: str) -> type | None:
    """The class from which `kind` has its attribute `name`. None if that is `nn.Module`, or if no class has it."""
    owner = next((base for base in kind.__mro__ if name in vars(base)), None)
    return None if owner in (nn.Module, object) else owner


def replaced_method(kind: type, name: str) -> str | None:
    """That a method of `kind` is not the one that its class was written with. None if it is, or does not exist."""
    owner = owner_of(kind, name)
    if owner is None:
        return None
    method = vars(owner)[name]
    if isinstance(method, FunctionType):
        code, written = method.__code__, f"{owner.__qualname__}.{name}"
        # A wrapper made by functools.wraps has the names of the wrapped function, but its code keeps its own name.
        names = {method.__qualname__, getattr(code, "co_qualname", written)}
        module = method.__globals__.get("__name__", "builtins")  # the default is a class's under a nameless `exec`
        if names == {written} and code.co_name == name and module == owner.__module__:
            return None
        method = code
        if module.startswith(_WEBUI):
            return (
                f"{name} of its class {owner.__name__} was replaced by the webui's {code.co_name}, which applies "
                "hypernetworks; add slicemod to the webui's own choices by `slicemod install webui`"
            )
    return f"{name} of its class {owner.__name__} was replaced ({_where(method)})"


def _where(method: Any) -> str:
    return f"{method.co_filename}:{method.co_firstlineno}" if isinstance(method, CodeType) else repr(method)


def replaced_function(kind: type, name: str) -> str | None:
    """That somebody replaced a function that the method calls by a name of its module.

    This is for code that is known to import functions under their own names. Functions of PyTorch and einops may be
    wrappers, and are not looked at.
    """
    owner = owner_of(kind, name)
    method = None if owner is None else vars(owner)[name]
    if not isinstance(method, FunctionType):
        return None
    for used in sorted(names_in(method.__code__)):
        function = method.__globals__.get(used)
        if not isinstance(function, FunctionType) or function.__code__.co_name == used:
            continue
        if (function.__module__ or "").partition(".")[0] not in ("torch", "einops"):
            return f"{used}, which its {name} calls, was replaced ({_where(function.__code__)})"
    return None


def names_in(code: CodeType) -> set[str]:
    """The names of globals and attributes that the code uses, functions inside of it included."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def methods_from(kind: type, code: CodeType, name: str) -> Iterator[tuple[str, CodeType]]:
    """Names and codes of the method `name`, which has the code `code`, and of the methods of `kind` that it calls."""
    found, waiting = {name: code}, [name]
    while waiting:
        name = waiting.pop(0)
        yield name, found[name]
        for called in sorted(names_in(found[name]) - found.keys()):
            owner = owner_of(kind, called)
            method = None if owner is None else vars(owner)[called]
            if isinstance(method, FunctionType):
                found[called] = method.__code__
                waiting.append(called)


def altered(module: nn.Module, names: Iterable[str], hooks: Sequence[str] = HOOKS) -> str | None:
    """That one of these methods was replaced, on the layer's class or on the layer itself. None if none was.

    `hooks` are the names of the modules whose hooks are allowed on the layer.
    """
    kind = type(module)
    if owner_of(kind, "__call__") is not None:
        return f"its class {kind.__name__} has a __call__ of its own"
    for name in names:
        replaced = replaced_method(kind, name)
        if replaced is not None:
            return replaced
        own = _without_hooks(vars(module).get(name), hooks)
        if own is not None and getattr(own, "__func__", None) is not getattr(kind, name, None):
            return f"its {name} was replaced on the object itself"
    return None


def _without_hooks(forward: Any, hooks: Sequence[str]) -> Any:
    """The function that the hooks around `forward` call in the end."""
    while isinstance(forward, functools.partial) and forward.func.__module__ in hooks:
        forward = vars(forward)["__wrapped__"]
    return forward


def copy_accelerate_hook(source: nn.Module, target: nn.Module) -> None:
    """Put the hook of accelerate around the `forward` of `source`, if there is one, around that of `target` too."""
    forward, hook = vars(source).get("forward"), vars(source).get("_hf_hook")
    for name in ("forward", "_hf_hook", "_old_forward"):
        vars(target).pop(name, None)
    if hook is None or not isinstance(forward, functools.partial):
        return
    own = MethodType(type(target).forward, target)
    vars(target)["_hf_hook"], vars(target)["_old_forward"] = hook, own
    vars(target)["forward"] = functools.update_wrapper(functools.partial(forward.func, target), own)
