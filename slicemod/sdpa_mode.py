"""`sliced_sdpa`: every `F.scaled_dot_product_attention` of any model, by slicemod.

A torch function mode sees the calls, whoever makes them and by whatever name they know the function. PyTorch keeps
modes for each thread, and takes a mode off while it handles a call. slicemod's own kernels use the operator below the
function, which this mode leaves alone: ours never comes back to ours, not even through a second mode around the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import CodeType, FunctionType, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slicemod.config import SliceConfig
from slicemod.dispatch import describe
from slicemod.functional import planned_attention
from slicemod.graph_operators import is_dynamic
from slicemod.kernels.kernel import Arguments
from slicemod.layers.inputs import as_four_dims, autocast_inputs, check_inputs
from slicemod.sdpa_report import SdpaReport, note_passed_on, note_sliced
from slicemod.torch_internals import function_mode_at, function_modes

_SDPA = F.scaled_dot_product_attention
_NESTED = "query, key, value: nested tensors"
_WEIGHTS = "nn.MultiheadAttention with need_weights=True, which holds all its weights to return them"


def _no_overrides(*_tensors: object) -> bool:
    return False


def _without_overrides(function: Any) -> FunctionType:
    """The same function, which does not give itself to a mode.

    A compiler looks up names in its globals only if these have no name, by which it would find the module's.
    """
    asked = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _no_overrides
    )
    names = {name: value for name, value in function.__globals__.items() if name != "__name__"} | asked
    same = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    same.__kwdefaults__ = function.__kwdefaults__
    return same


# Functions of PyTorch that call attention, the last three where a part of a model is recomputed. With a mode on, they
# give themselves to it, and what they call would be called with the mode off.
_CALLERS: dict[Any, FunctionType] = {
    function: _without_overrides(function)
    for function in (F.multi_head_attention_forward, Tensor.backward, torch.autograd.backward, torch.autograd.grad)
}


class _SlicedMode(TorchFunctionMode):
    """The function mode, one for all threads and installs of a `sliced_sdpa`."""

    def __init__(self, config: SliceConfig, report: SdpaReport) -> None:
        super().__init__()
        self.config = config
        self.report = report

    def __deepcopy__(self, _memo: object) -> _SlicedMode:
        return self  # a copy of a model counts in the same report

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is Tensor.unflatten and args:  # before PyTorch 2.14 a compiler traces the method, not the function
            return args[0].unflatten(*args[1:], **kwargs)
        if func is not _SDPA and func not in _CALLERS:
            return func(*args, **kwargs)
        if func is _SDPA and any(isinstance(given, Tensor) and given.is_nested for given in (*args, *kwargs.values())):
            note_passed_on(self.report.number, _NESTED)
            return func(*args, **kwargs)
        if types:  # what a class of tensors makes of the call comes first; the attention in there is ours again
            with self:
                result = types[0].__torch_function__(func, types, args, kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        if func is _SDPA:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward and kwargs.get("need_weights", True):
            note_passed_on(self.report.number, _WEIGHTS)
        with self:
            return _CALLERS[func](*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        query, key, value, attn_mask = autocast_inputs(query, key, value, attn_mask)
        try:
            check_inputs(query, key, value, attn_mask, dropout_p, is_causal)
            inputs = as_four_dims(query, key, value, attn_mask, enable_gqa)
        except (ValueError, NotImplementedError) as refusal:
            # Not for slicemod to compute: PyTorch computes it, or says in its own words why not.
            note_passed_on(self.report.number, str(refusal))
            return _SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        output, plan = planned_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, slicing=self.config
        )
        settings = Arguments(dropout_p, is_causal, scale, enable_gqa)
        sizes = None if is_dynamic(inputs) else describe(inputs, settings, ())[0]
        note_sliced(self.report.number, sizes, plan)
        return output


class _SlicedForward:
    """In the place of a module's `forward`: the same, with the mode on.

    A part of a model may have settings of its own: of all installs around a module, the nearest holds. It holds as well
    where the module is called alone, as gradient checkpointing does in the backward pass.
    """

    def __init__(self, former: Callable[..., Any], was_own: bool) -> None:
        self.__wrapped__ = former  # whose signature this has
        self.was_own = was_own  # the module had a forward of its own, not its class's
        self.installs: list[tuple[int, _SlicedMode]] = []  # how many modules above this one, and with which mode
        self.mode: _SlicedMode | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.mode is None or self.mode is _innermost():
            return self.__wrapped__(*args, **kwargs)
        with self.mode:
            return self.__wrapped__(*args, **kwargs)

    @property
    def __code__(self) -> CodeType:  # which torch.export reads the names of arguments from
        return self.__wrapped__.__code__

    def add(self, distance: int, mode: _SlicedMode) -> None:
        """One more install, which holds from now on unless another is nearer."""
        self.installs.insert(0, (distance, mode))
        self._choose()

    def remove(self, distance: int, mode: _SlicedMode) -> None:
        """One install less."""
        self.installs.remove((distance, mode))
        self._choose()

    def _choose(self) -> None:
        self.mode = min(self.installs, key=lambda install: install[0])[1] if self.installs else None


def _innermost() -> _SlicedMode | None:
    """The mode of slicemod's that holds in this thread; modes of others may lie on top of it."""
    for place in range(function_modes() - 1, -1, -1):
        mode = function_mode_at(place)
        if isinstance(mode, _SlicedMode):
            return mode
    return None


class InstalledSdpa(AbstractContextManager["InstalledSdpa"]):
    """Sliced attention in one model, until `remove()` or the end of a `with` block.

    Attributes:
        report: the `SdpaReport`, shared by all that one `sliced_sdpa` is used for.
    """

    def __init__(self, report: SdpaReport, forwards: list[tuple[nn.Module, _SlicedForward, int, _SlicedMode]]) -> None:
        self.report = report
        self._forwards = forwards

    def remove(self) -> None:
        """Give the model its own attention back. A second time does nothing."""
        while self._forwards:
            module, forward, distance, mode = self._forwards.pop()
            forward.remove(distance, mode)
            # Where somebody wrapped forward again, ours stays inside of that and does nothing.
            if forward.mode is None and vars(module).get("forward") is forward:
                if forward.was_own:
                    module.forward = forward.__wrapped__
                else:
                    del module.forward

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __str__(self) -> str:
        return str(self.report)


class sliced_sdpa(AbstractContextManager[SdpaReport]):  # noqa: N801 - reads as the function that it stands for
    """Compute every `F.scaled_dot_product_attention` in slices, in any PyTorch code.

    As `with sliced_sdpa(slicing) as report:` for all that the thread runs in the block, or by `install(model)` for the
    calls of one model from any thread. Of several around a call the innermost holds. One object may be entered and
    installed as often as one likes, and counts all in one report.

    Gradient checkpointing calls a part of the model again in the backward pass: `backward()` belongs into the block
    too, or the model is installed, which covers it wherever it is.

    Under `torch.compile` the mode may be on outside of the graph or be entered inside, with `fullgraph` only from
    PyTorch 2.14 on. Make the object outside, since `fullgraph` cannot trace that, and enter the same one again, since
    code is compiled once for each.

    What slicemod has no attention for (nested tensors, forward-mode differentiation, inputs that PyTorch refuses too)
    is passed on to PyTorch, and the report says so. What is no call of the function is not seen: TorchScript,
    FlexAttention, and `nn.TransformerEncoderLayer` in compiled inference, which is one operator there
    (`torch.backends.mha.set_fastpath_enabled(False)` makes it call the function).

    Args:
        slicing: a `SliceConfig`, or a dict of its fields.

    Raises:
        ValueError: settings that do not go together; in a call, a kernel was asked for that cannot run it.
        NotEnoughMemoryError: in a call, no plan fits the budget.

    >>> query, key, value = torch.randn(3, 2, 5, 7, 4).unbind()
    >>> with sliced_sdpa({"kernel": "math", "steps": 3}) as report:
    ...     output = F.scaled_dot_product_attention(query, key, value)
    >>> report.kernels
    Counter({'math': 1})
    """

    def __init__(self, slicing: SliceConfig | Mapping[str, Any] | None = None) -> None:
        self.report = SdpaReport()
        self._mode = _SlicedMode(SliceConfig.of(slicing), self.report)

    def __enter__(self) -> SdpaReport:
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self.report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def install(self, model: nn.Module) -> InstalledSdpa:
        """Slice the attention of one model, or of a part of it, until `remove()` of what this returns.

        Each module that may attend has the mode on while its `forward` runs, so that `vae.decode(...)` and modules that
        are called alone are covered. A part that has an install of its own keeps to that.

        Raises:
            TypeError: the model is no `nn.Module`.
            ValueError: the model is TorchScript, which no mode sees into.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: expected an nn.Module; got {type(model).__name__}. Pass the transformer, UNet or VAE of a "
                "pipeline, each by itself."
            )
        if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
            raise ValueError(
                f"model: expected a model in Python; got TorchScript ({type(model).__name__}), whose attention is "
                "compiled in. Install into the model that it was made of, and script nothing."
            )
        forwards = []
        for distance, module in _with_distances(model):
            forward = vars(module).get("forward")
            if not isinstance(forward, _SlicedForward):
                forward = _SlicedForward(module.forward, was_own=forward is not None)
                module.forward = forward
            forward.add(distance, self._mode)
            forwards.append((module, forward, distance, self._mode))
        return InstalledSdpa(self.report, forwards)


def _with_distances(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """The modules that may attend, with how far below the model they are. PyTorch's own layers, most of all, do not."""
    seen: dict[nn.Module, int] = {}
    for name, module in model.named_modules():
        seen[module] = name.count(".") + bool(name)
    return [(distance, module) for module, distance in seen.items() if distance == 0 or _may_attend(module)]


def _may_attend(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.nn.modules.") or isinstance(
        module, nn.MultiheadAttention | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
    )
