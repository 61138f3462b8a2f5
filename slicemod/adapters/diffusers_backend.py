"""A member of diffusers' attention dispatcher: `model.set_attention_backend("slicemod")`.

diffusers has no public way in: its registry is private, and the names of backends are a closed enum. This file is the
only one that touches them. Each of diffusers' names is asked for below, and if one is gone the error says which one.
`sliced_sdpa` needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from slicemod.config import SliceConfig
from slicemod.sdpa_mode import sliced_sdpa
from slicemod.sdpa_report import SdpaReport
from slicemod.torch_internals import function_mode_at, function_modes

BACKEND = "slicemod"

# diffusers' names: the module, the enum of the backends' names, the registry and how it registers.
_MODULE = "diffusers.models.attention_dispatch"
_NAMES, _REGISTRY, _REGISTER, _BACKENDS, _NATIVE = (
    "AttentionBackendName",
    "_AttentionBackendRegistry",
    "register",
    "_backends",
    "NATIVE",
)
# Python's, of an enum's members, by which one is added.
_ENUM = ("_member_names_", "_member_map_", "_value2member_map_")


def register_diffusers_backend(slicing: SliceConfig | Mapping[str, Any] | None = None) -> SdpaReport:
    """Let `model.set_attention_backend("slicemod")` of diffusers compute attention in slices.

    It means what diffusers' backend "native" means: the same masks, `is_causal`, `scale`, `enable_gqa` and gradients,
    and it refuses the same. Unlike `sliced_sdpa` it reaches only models that call diffusers' dispatcher, such as Flux,
    Wan and QwenImage, and no UNet. A second call changes the settings of all models that use the backend.

    Args:
        slicing: a `SliceConfig`, a dict of its fields, or None for the default one.

    Returns:
        The report of the calls that the backend will compute with these settings.

    Raises:
        ImportError: diffusers is not installed, or has a name no more that this needs.
        ValueError: settings that do not go together.

    >>> report = register_diffusers_backend({"budget": "512MiB"})
    >>> from diffusers.models.attention_dispatch import attention_backend
    >>> with attention_backend("slicemod"):  # or model.set_attention_backend("slicemod")
    ...     pass
    """
    slicer = sliced_sdpa(slicing)
    dispatch = import_module(_MODULE)
    names, registry = _private(dispatch, _NAMES), _private(dispatch, _REGISTRY)
    register = _private(registry, _REGISTER)
    native = _private(registry, _BACKENDS)[_private(names, _NATIVE)]
    register(_member(names, BACKEND))(_backend(slicer, native))
    return slicer.report


def _backend(slicer: sliced_sdpa, native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """diffusers' native backend, whose call of `F.scaled_dot_product_attention` becomes slicemod's."""

    # diffusers passes only arguments that are named here.
    def sliced(  # noqa: PLR0913 - the arguments of diffusers' backends
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        if _parallel_config is not None:
            raise ValueError(
                'backend: "slicemod" does not split attention over devices; got a parallel_config. '
                'Take the backend "native" with context parallelism.'
            )
        with ExitStack() as modes:
            modes.enter_context(slicer)
            for other in _modes_of_others():
                modes.enter_context(other)
            return native(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)

    return sliced


def _modes_of_others() -> list[TorchFunctionMode]:
    """The function modes around this call that are neither PyTorch's nor slicemod's, from the outermost on.

    Such a mode may take the place of attention, as diffusers' perturbed-attention guidance does. It would not see a
    call of which a mode further inside made something else, so it has to be inside of ours.
    """
    modes: list[Any] = [function_mode_at(place) for place in range(function_modes())]
    return [mode for mode in modes if type(mode).__module__.partition(".")[0] not in ("torch", "slicemod")]


def _private(owner: Any, name: str) -> Any:
    """An attribute that its owner does not promise to keep."""
    if not hasattr(owner, name):
        raise ImportError(
            f"{_MODULE}: expected {owner.__name__} to have {name}, a private name; that of diffusers "
            f"{import_module('diffusers').__version__} has none. Use sliced_sdpa, which needs no private name, or a "
            "version of diffusers that has it.",
            name=_MODULE,
        )
    return getattr(owner, name)


def _member(names: Any, value: str) -> Any:
    """The enum's member with this value. It is added if there is none, for which an enum has no public way."""
    ordered, members, by_value = (_private(names, part) for part in _ENUM)
    if value not in by_value:
        member = str.__new__(names, value)
        member._name_, member._value_ = value.upper(), value
        ordered.append(member.name)
        members[member.name] = by_value[value] = member
        type.__setattr__(names, member.name, member)
    return by_value[value]
