"""One configuration of a model: by `swap_attention`, by `sliced_sdpa` and by diffusers' attention backend."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.overrides import TorchFunctionMode

from slicemod import register_diffusers_backend, restore_attention, sliced_sdpa, swap_attention
from tests.diffusers_classes.configurations import Configuration

SLICING: dict[str, Any] = {"kernel": "math", "steps": 3}
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, nn.functional.softmax)


@dataclass(frozen=True)
class Trial:
    """What came of one configuration.

    A difference is the largest of any element of any output from the class's own output, divided by the largest
    element of that output. It is None where nothing was sliced.

    Attributes:
        model: the model class.
        configuration: the name of the configuration.
        failure: why the class could not be built or called; the rest is empty then.
        attends: how often it calls `F.scaled_dot_product_attention`.
        flex: how often it calls PyTorch's FlexAttention.
        softmax: how often it calls a softmax by itself.
        sliced: how many calls `sliced_sdpa` sliced.
        passed_on: why `sliced_sdpa` passed calls on, how often each.
        yardstick: by PyTorch's own attention in another way: as matrix products, not fused.
        sdpa_difference: by `sliced_sdpa`.
        swapped: how many layers `swap_attention` swapped.
        left: how many of the calls of attention a swapped model still makes.
        refusal: why `swap_attention` swapped nothing.
        swap_difference: by `swap_attention`.
        restored: whether the output after `restore_attention` has the same bits.
        by_backend: how many calls the backend "slicemod" of diffusers' dispatcher computes.
        backend_refusal: why the model cannot take that backend.
        backend_difference: by that backend.
    """

    model: str
    configuration: str
    failure: str | None = None
    attends: int = 0
    flex: int = 0
    softmax: int = 0
    sliced: int = 0
    passed_on: Mapping[str, int] | None = None
    yardstick: float | None = None
    sdpa_difference: float | None = None
    swapped: int = 0
    left: int = 0
    refusal: str | None = None
    swap_difference: float | None = None
    restored: bool | None = None
    by_backend: int = 0
    backend_refusal: str | None = None
    backend_difference: float | None = None


class _Counting(TorchFunctionMode):
    """Counts calls of attention and of softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # nn.MultiheadAttention calls attention within a function of PyTorch's, into which no mode sees.
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            self.calls["attention"] += 1
        elif func in _SOFTMAX:
            self.calls["softmax"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _counting_flex_attention(calls: Counter[str]) -> Iterator[None]:
    """Counts calls of FlexAttention, into which no mode sees. What it calls itself counts too, and is taken off."""
    original = flex_attention.flex_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        before = calls.copy()
        output = original(*args, **kwargs)
        calls.clear()
        calls.update(before + Counter(flex=1))
        return output

    with patch.object(flex_attention, "flex_attention", counted):
        yield


def try_out(name: str, configuration: Configuration) -> Trial:
    """Run one configuration in each way; `name` is that of its model class."""
    try:
        model = _model(configuration)
        with _Counting() as own, _counting_flex_attention(own.calls):
            expected = _outputs(model, configuration)
        if not own.calls:
            return Trial(name, configuration.name)
        again = _outputs(model, configuration)
    except Exception as error:  # noqa: BLE001 - whatever a class raises belongs into the table
        return Trial(name, configuration.name, failure=_in_a_line(error))
    if not expected or not all(map(_is_usable, expected)):
        return Trial(name, configuration.name, failure="its own output is empty or not finite")
    if not all(map(torch.equal, expected, again)):
        return Trial(name, configuration.name, failure="its own output differs from call to call")

    with sliced_sdpa(SLICING) as report:
        outputs = _outputs(model, configuration)
    sliced = sum(report.calls.values())
    with sdpa_kernel(SDPBackend.MATH):
        yardstick = _difference(_outputs(model, configuration), expected)
    return Trial(
        name,
        configuration.name,
        attends=own.calls["attention"],
        flex=own.calls["flex"],
        softmax=own.calls["softmax"],
        sliced=sliced,
        passed_on=dict(report.passed_on) or None,
        yardstick=yardstick if sliced else None,
        sdpa_difference=_difference(outputs, expected) if sliced else None,
        **_by_backend(configuration, expected),
        **_by_swap(configuration, expected),
    )


def _by_swap(configuration: Configuration, expected: list[Tensor]) -> dict[str, Any]:
    model = _model(configuration)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model that is swapped in part, which `left` counts
        try:
            swapped = len(swap_attention(model, SLICING).layers)
        except ValueError as error:
            return {"refusal": _in_a_line(error)}
    with _Counting() as left:
        outputs = _outputs(model, configuration)
    restore_attention(model)
    return {
        "swapped": swapped,
        "left": left.calls["attention"],
        "swap_difference": _difference(outputs, expected),
        "restored": all(map(torch.equal, _outputs(model, configuration), expected)),
    }


def _by_backend(configuration: Configuration, expected: list[Tensor]) -> dict[str, Any]:
    model = _model(configuration)
    if not hasattr(model, "set_attention_backend"):
        return {}
    report = register_diffusers_backend(SLICING)
    with attention_backend("native"):  # what set_attention_backend sets for the whole process ends with the block
        model.set_attention_backend("slicemod")
        try:
            outputs = _outputs(model, configuration)
        except ValueError as error:  # of models that ask for another backend by name
            return {"backend_refusal": _in_a_line(error)}
    calls = sum(report.calls.values())
    return {"by_backend": calls, "backend_difference": _difference(outputs, expected) if calls else None}


def _model(configuration: Configuration) -> Any:
    torch.manual_seed(3)
    model = configuration.model_class(**configuration.arguments()).eval()
    # Zeros, with which many layers start, would hide what comes before them.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.1)
    return model


def _outputs(model: Any, configuration: Configuration) -> list[Tensor]:
    torch.manual_seed(5)  # for what the model itself draws
    inputs = configuration.inputs()
    torch.manual_seed(7)
    with torch.no_grad():
        return list(_tensors(model(**inputs)))


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of an output: a tensor, a list, a dict, or one of diffusers' records."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
    elif hasattr(output, "__dict__"):
        yield from _tensors(vars(output))


def _is_usable(output: Tensor) -> bool:
    return bool(output.isfinite().all()) and bool(output.any())


def _difference(outputs: list[Tensor], expected: list[Tensor]) -> float:
    if [output.shape for output in outputs] != [output.shape for output in expected]:
        return float("inf")
    return max(
        float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in zip(outputs, expected, strict=True)
    )


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
