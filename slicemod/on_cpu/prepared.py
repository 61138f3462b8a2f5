"""What the modules have in common that `prepare_for_cpu` makes of plain ones, in place."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from slicemod.call import needs_grad
from slicemod.torch_internals import is_any_autocast_enabled
from slicemod.watched import is_watched

_FORWARDS = {plain: plain.forward for plain in (nn.Conv2d, nn.Linear)}


class Prepared(nn.Module):
    """A module of the class `plain` that became one of this class in place, and becomes plain again.

    Its parameters, hooks and attributes stay. Copies and pickles are plain modules. Moving or converting the module,
    for which its weight may have to be computed with in another way, makes it plain first.
    """

    plain: ClassVar[type[nn.Conv2d] | type[nn.Linear]]
    way: ClassVar[str]  # how it computes, for people

    def prepare(self) -> None:
        """Do what is to be done when a plain module has just become one of this class."""

    def make_plain(self) -> None:
        """Become a plain module again, with the very same parameters."""
        self.__class__ = self.plain  # type: ignore[assignment]

    def plain_state(self) -> dict[str, Any]:
        """The attributes that the plain module would have."""
        return dict(vars(self))

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.make_plain()
        return self._apply(fn, recurse)  # that of the plain class

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return object.__new__, (self.plain,), self.plain_state()


def is_only_inference(module: Prepared, given: Tensor) -> bool:
    """The call is no more than an inference in the dtype of the weight.

    Nothing watches it, no gradient is needed, and nobody has put another `forward` into the plain class.
    """
    weight: Any = module.weight
    return (
        not is_watched(given)
        and module.plain.forward is _FORWARDS[module.plain]
        and not is_any_autocast_enabled()
        and not needs_grad(given, *module.parameters(recurse=False))
        and given.dtype == weight.dtype
    )


def is_other_convolution(conv: nn.Conv2d, image: Tensor) -> bool:
    """The image has no batch, or others changed what is computed, as programs do whose pictures can be tiled."""
    return image.dim() != 4 or conv.padding_mode != "zeros" or "_conv_forward" in vars(conv)
