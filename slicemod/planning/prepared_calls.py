"""Modules that `prepare_for_cpu` made, in a planned step: stand-ins on the device "meta", and the bytes of real ones.

A prepared module computes plainly while something watches the operators, as the recorder of a timeline does. What it
takes otherwise is not in proportion to the pixels: a convolution may be unfolded at one resolution and plain at
another. So the stand-ins compute nothing. They mark a row of the timeline, where each resolution gets what the module's
own `scratch_bytes` say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from slicemod.on_cpu.convolution import Window
from slicemod.on_cpu.prepare import choose_ways
from slicemod.on_cpu.prepared import Prepared
from slicemod.planning.layer_calls import replaced_forwards
from slicemod.planning.memory_timeline import MemoryRecorder
from slicemod.user_error import FieldError


class PreparedCall(NamedTuple):
    """One call of a prepared module.

    Attributes:
        row: of the timeline.
        scratch: the module's `scratch_bytes`.
        sizes: its arguments, each of which grows in proportion to the pixels or not at all.
    """

    row: int
    scratch: Callable[..., int]
    sizes: tuple[int, ...]

    @property
    def scratch_bytes(self) -> int:
        """Bytes that it takes beyond its result."""
        return self.scratch(*self.sizes)

    def between(self, other: PreparedCall, part: int, whole: int) -> PreparedCall:
        """The call at `part / whole` of the way to the `other` one, which differs only in its sizes."""
        sizes = (a + (b - a) * part // whole for a, b in zip(self.sizes, other.sizes, strict=True))
        return self._replace(sizes=tuple(sizes))


def become_prepared(model: nn.Module) -> None:
    """Have the modules of a model on the device "meta" become what `prepare_for_cpu` makes of them.

    Raises:
        FieldError: some might be faster, and it can prepare none of them.
    """
    chosen, skipped = choose_ways(model, "meta")
    if skipped and not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
        raise FieldError(
            f"prepared: expected a model that prepare_for_cpu can prepare; {reasons} in {type(model).__name__}. Leave "
            "it."
        )
    for chose in chosen:
        chose.module.__class__ = chose.becomes


class PreparedStandIn:
    """Stand-ins for prepared modules, while `installed`.

    Args:
        recorder: is told what a module takes when it runs.

    Attributes:
        calls: in order.
    """

    def __init__(self, recorder: MemoryRecorder) -> None:
        self._recorder = recorder
        self.calls: list[PreparedCall] = []

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """The `forward` of each prepared module is a stand-in meanwhile."""
        prepared = [module for module in model.modules() if isinstance(module, Prepared)]
        with replaced_forwards({module: self._forward(module) for module in prepared}):
            yield

    def _forward(self, module: Any) -> Callable[[Tensor], Tensor]:
        def convolve(image: Tensor) -> Tensor:
            if image.dim() != 4:
                return module.compute_plainly(image)  # type: ignore[no-any-return]
            items, _, height, width = image.shape
            rows, columns = Window.of(module).output(image)
            output = image.new_empty(items, module.out_channels, rows, columns)
            self._hold(module, items, height * width, rows * columns)
            return output

        def multiply(given: Tensor) -> Tensor:
            tokens = given.reshape(-1, module.in_features)  # a copy, if it has gaps
            output = tokens.new_empty(len(tokens), module.out_features)
            self._hold(module, len(tokens))
            return output.view(*given.shape[:-1], module.out_features)

        return multiply if isinstance(module, nn.Linear) else convolve

    def _hold(self, module: Any, *sizes: int) -> None:
        row = self._recorder.hold_for_a_while(module.scratch_bytes(*sizes))
        self.calls.append(PreparedCall(row, module.scratch_bytes, sizes))
