"""Whatever is more than an inference by plain weights, prepared modules compute as plain ones do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from slicemod.on_cpu.packed import PackedConv2d
from slicemod.on_cpu.prepared import Prepared
from slicemod.on_cpu.unfolded import UnfoldedConv2d
from slicemod.on_cpu.widened import WidenedConv2d, WidenedLinear
from slicemod.torch_internals import has_onednn
from tests.on_cpu.convolutions import convolution, image

pytestmark = pytest.mark.skipif(not has_onednn, reason="PyTorch has no oneDNN here")

forward_ad: Any = torch.autograd.forward_ad

WAYS = {"unfolded": UnfoldedConv2d, "packed": PackedConv2d, "widened": WidenedConv2d, "linear": WidenedLinear}
NOT_PACKED = [name for name in WAYS if name != "packed"]  # whose weights are as they were


@dataclass
class Pair:
    """A plain module, the same one prepared, and an input."""

    plain: Any
    prepared: Any
    x: Tensor

    def results(self) -> tuple[Tensor, Tensor]:
        """Of the prepared module and of the plain one."""
        return self.prepared(self.x), self.plain(self.x)

    def assert_same(self) -> None:
        torch.testing.assert_close(*self.results(), rtol=0.02, atol=0.02)


def pair(way: str, *, outputs: int = 211) -> Pair:
    dtype = torch.float32 if way in ("unfolded", "packed") else torch.bfloat16  # packed too, on any CPU
    plain: nn.Module = nn.Linear(37, outputs).to(dtype).requires_grad_(False)
    x = image(2, 5, 37, dtype=dtype)
    if way != "linear":
        plain, x = convolution(dtype, outputs=outputs), image(2, 37, 7, 5, dtype=dtype)
    prepared: Any = copy.deepcopy(plain)
    prepared.__class__ = WAYS[way]
    prepared.prepare()
    return Pair(plain, prepared, x)


def undo(both: Pair) -> None:
    """Make the prepared module plain."""
    if isinstance(both.prepared, Prepared):
        both.prepared.make_plain()


def answer(module: Any, given: Tensor) -> str:
    """The shape of a module's output, or its error."""
    try:
        return str(module(given).shape)
    except RuntimeError as error:
        return str(error)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_a_method_that_a_program_kept_computes_after_the_module_is_plain_again(way: str) -> None:
    both = pair(way)
    kept = both.prepared.forward
    both.prepared.forward = lambda given: kept(given) + 1
    for _ in range(2):
        found, plain = both.results()
        torch.testing.assert_close(found, plain + 1, rtol=0.02, atol=0.02)
        undo(both)


def test_programs_find_the_layers_by_the_name_of_their_class(way: str) -> None:
    both = pair(way)
    assert both.prepared.__class__.__name__ == both.plain.__class__.__name__  # as kohya's LoRA and LyCORIS ask
    assert repr(both.prepared).startswith(f"{WAYS[way].__qualname__}(")


@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
def test_code_that_a_program_puts_into_the_class_is_called(
    way: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair(way)
    kind: Any = type(both.plain)
    if not hasattr(kind, method):
        return
    own = getattr(kind, method)

    def doubled(self: Any, *given: Any) -> Tensor:
        output: Tensor = own(self, *given)
        return 2 * output

    wanted = 2 * both.plain(both.x)
    monkeypatch.setattr(kind, method, doubled)
    if (way, method) == ("packed", "forward"):  # it may look for plain weights
        with pytest.raises(RuntimeError, match=r"got another forward in nn\.Conv2d"):
            both.prepared(both.x)
    else:
        torch.testing.assert_close(both.prepared(both.x), wanted, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own, at the first tangent
@pytest.mark.parametrize("gradients", [True, False])
def test_tangents_of_forward_differentiation_are_not_lost(way: str, gradients: bool) -> None:
    both = pair(way)
    tangents = []
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        both.x = forward_ad.make_dual(both.x, torch.ones_like(both.x))
        for result in both.results():
            tangent = forward_ad.unpack_dual(result).tangent
            assert tangent is not None
            tangents.append(tangent)
        torch.testing.assert_close(*tangents, rtol=0.02, atol=0.02)


def test_a_weight_that_is_put_in_is_computed_with_and_stays_when_undone(way: str) -> None:
    both, other = pair(way), pair(way, outputs=13)
    both.prepared.weight, both.prepared.bias = other.plain.weight, other.plain.bias
    both.plain = other.plain
    for _ in range(2):
        both.assert_same()
        undo(both)
    assert both.prepared.weight is other.plain.weight


def test_a_weight_that_is_no_parameter_gets_its_gradient(way: str) -> None:
    both = pair(way)
    gradients = []
    for module in (both.prepared, both.plain):
        weight = torch.full(module.weight.shape, 0.01, dtype=both.x.dtype, requires_grad=True)
        del module.weight
        module.weight = weight  # as of a hypernetwork
        module(both.x).sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("way", NOT_PACKED)
@pytest.mark.parametrize(
    "register",
    [parametrizations.weight_norm, lambda module: parametrize.register_parametrization(module, "weight", _Doubled())],
    ids=["weight_norm", "doubled"],
)
def test_a_module_that_is_parametrized_becomes_plain_with_its_parametrization(
    way: str, register: Callable[[nn.Module], object]
) -> None:
    both = pair(way)
    register(both.plain)
    register(both.prepared)
    both.assert_same()
    both.prepared.to(both.x.dtype)
    both.assert_same()
    assert parametrize.is_parametrized(both.prepared, "weight")
    assert repr(both.prepared) == repr(both.plain)
    for module in (both.plain, both.prepared):
        parametrize.remove_parametrizations(module, "weight")
    assert type(both.prepared) is type(both.plain)


def test_inputs_that_do_not_fit_get_the_error_or_the_result_of_the_plain_module(way: str) -> None:
    both = pair(way)
    x = both.x
    shapes = [(0, *x.shape[1:]), (2, 0, 37), (2, 5, 31), (0, 7), (), (2, 36, 7, 5), (2, 37, 0, 5), (2, 37, 7, 5, 3)]
    for shape in shapes:
        given = x.new_zeros(shape)
        found, wanted = answer(both.prepared, given), answer(both.plain, given)
        assert found == wanted, shape


@pytest.mark.parametrize("way", [name for name in WAYS if name != "linear"])
def test_a_kernel_that_others_changed_is_computed_with(way: str) -> None:
    both = pair(way)
    changes: list[dict[str, Any]] = [
        {"padding": 1, "stride": 1, "dilation": 1},  # numbers, which PyTorch takes too
        {"padding": "same"},
        {"padding": (2, 2), "dilation": (2, 2)},
        {"padding": (0, 0), "dilation": (4, 4)},  # which does not fit into the image
    ]
    for change in changes:
        for module in (both.plain, both.prepared):
            for name, value in change.items():
                setattr(module, name, value)
        found, wanted = answer(both.prepared, both.x), answer(both.plain, both.x)
        assert found == wanted, change
        if wanted.startswith("torch.Size"):
            both.assert_same()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")  # of PyTorch 2.14
def test_transforms_and_traces_see_the_plain_operators(way: str) -> None:
    both = pair(way)
    plain, x = both.plain(both.x), both.x
    close: Any = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(torch.vmap(lambda item: both.prepared(item[None])[0])(x), plain, **close)
    weights = {name: 2 * given for name, given in both.plain.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(both.prepared, weights, x), 2 * plain, **close)
    traced = torch.jit.trace(both.prepared, x, check_trace=False)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(x), plain, **close)
    if way != "packed":
        exported = torch.export.export(both.prepared, (x,)).module()(x)
        torch.testing.assert_close(exported, plain, **close)
        graph = torch.fx.symbolic_trace(nn.Sequential(both.prepared))
        torch.testing.assert_close(graph(x), plain, **close)
