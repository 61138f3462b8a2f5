"""The attention of a ComfyUI model by slicemod, for its `transformer_options["optimized_attention_override"]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from slicemod.config import SliceConfig
from slicemod.integrations.comfy_call import sliced_or_own
from slicemod.sdpa_mode import sliced_sdpa
from slicemod.sdpa_report import SdpaReport

KEY = "optimized_attention_override"


class SlicedOverride:
    """What ComfyUI calls in the place of its attention function.

    An override of another node that was there before stays in charge: it is called first, and the attention function
    that it is given is slicemod's.

    Args:
        slicing: a `SliceConfig`, a dict of its fields, or None for the default one.
        former: the override that was there before. One of slicemod's is replaced.
    """

    def __init__(
        self, slicing: SliceConfig | Mapping[str, Any] | None = None, former: Callable[..., Any] | None = None
    ) -> None:
        self.slicing = SliceConfig.of(slicing)
        self.former: Callable[..., Any] | None = former.former if isinstance(former, SlicedOverride) else former
        self._slicer = sliced_sdpa(self.slicing)
        containers = getattr(self.former, "container_function", None)
        if containers is not None:  # ComfyUI calls it without an attention function, so none of it could be slicemod's
            self.container_function = containers

    @property
    def report(self) -> SdpaReport:
        """The calls that slicemod computed, with their plans."""
        return self._slicer.report

    def __call__(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Compute attention in the place of `func`, ComfyUI's own, which has the arguments of `comfy_attention`."""
        if self.former is None:
            return sliced_or_own(self._slicer, func, args, kwargs)

        def sliced(*args: Any, **kwargs: Any) -> Tensor:
            return sliced_or_own(self._slicer, func, args, kwargs)

        return self.former(sliced, *args, **kwargs)

    def start_run(self) -> None:
        """Forget the calls of the run before. Those in compiled graphs, which run again, stay."""
        self.report.calls.clear()
        self.report.passed_on.clear()
