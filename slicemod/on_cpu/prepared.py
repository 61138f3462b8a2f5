"""What the modules have in common that `prepare_for_cpu` makes of plain ones, in place."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from slicemod.layers.plain_module import has_own
from slicemod.layers.projection import multiplies_plain_tensors
from slicemod.watched import is_watched


class Prepared(nn.Module):
    """A module of the class `plain` that became one of this class in place, and becomes plain again.

    Its parameters, hooks and attributes stay. Copies and pickles are plain modules. Moving or converting the module,
    for which its weight may have to be computed with in another way, makes it plain first.

    Programs that put LoRA into a model look for layers by the name of their class. So a class that says its `way` has
    the name of the plain one, and its own name in the `repr`.
    """

    plain: ClassVar[type[nn.Conv2d] | type[nn.Linear]]
    way: ClassVar[str]  # how it computes, for people

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "way" in vars(cls):
            cls.__name__ = cls.plain.__name__

    def forward(self: nn.Module, input: Tensor) -> Tensor:  # noqa: A002 - PyTorch's name
        """What the plain module computes: by `compute` if the call is no more than an inference."""
        if not isinstance(self, Prepared):  # a program kept this method, and the module has become plain since
            output: Tensor = type(self).forward(self, input)
            return output
        return self.compute(input) if self.takes(input) else self.compute_plainly(input)

    def takes(self, given: Tensor) -> bool:
        """The call is no more than an inference by plain weights, in their dtype.

        Nothing watches it, no gradient is needed, and nobody has put another `forward` into the plain class.
        """
        return (
            not is_watched(given)
            and has_own(self.plain, "forward")
            and multiplies_plain_tensors(self, given)
            and given.numel() > 0
        )

    def compute(self, given: Tensor) -> Tensor:
        """The output for what `takes` takes."""
        raise NotImplementedError

    def compute_plainly(self, given: Tensor) -> Tensor:
        """The output for any other input, as the plain class computes it."""
        plain: Any = self.plain
        output: Tensor = plain.forward(self, given)
        return output

    def prepare(self) -> None:
        """Do what is to be done when a plain module has just become one of this class."""

    def make_plain(self) -> None:
        """Become a plain module again, with the very same parameters."""
        self.__class__ = _plain_class(type(self))

    def plain_state(self) -> dict[str, Any]:
        """The attributes that the plain module would have."""
        return dict(vars(self))

    def _get_name(self) -> str:
        return type(self).__qualname__

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.make_plain()
        return self._apply(fn, recurse)  # that of the plain class

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return object.__new__, (_plain_class(type(self)),), self.plain_state()


def _plain_class(kind: Any) -> Any:
    """The plain class in the place of a prepared one. Classes that others derived from it, as PyTorch does for the
    parametrization of a module, are made anew."""
    if not issubclass(kind, Prepared):
        return kind
    if "way" in vars(kind):
        return kind.plain
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, tuple(map(_plain_class, kind.__bases__)), own)
