"""Projections go in two halves of rows only where nobody could tell."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.layers.halves import HALVES, Halves, in_halves
from slicemod.layers.projection import project

ROWS, WIDTH, OUT = 61, 48, 32


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """One thread would go the plain way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


class Recorded(Halves):
    """Halves that always are the faster ones, and the shapes of what was computed by them."""

    def __init__(self) -> None:
        super().__init__(least=1, compute=self._compute, are_faster=lambda linear, x: True)
        self.shapes: list[torch.Size] = []

    def _compute(self, linear: nn.Linear, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        return in_halves(linear, x)


@pytest.fixture
def halves() -> Recorded:
    """Halves that record."""
    return Recorded()


@pytest.fixture
def inference() -> Iterator[None]:
    """Without gradients."""
    with torch.no_grad():
        yield


def plain(bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    return nn.Linear(WIDTH, OUT, bias=bias, dtype=dtype)


def tokens(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, ROWS, WIDTH).to(dtype)


@pytest.mark.usefixtures("inference")
def test_a_sequential_may_start_with_one(halves: Recorded) -> None:
    out, x = nn.Sequential(plain(), nn.Dropout(0.5)).eval(), tokens()
    torch.testing.assert_close(project(out, x, halves), out(x))
    assert halves.shapes == [x.shape]


def hook(*_: Any) -> None:
    """Does nothing, but is there."""


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        """Twice the weight."""
        return 2 * weight


class Adapter(nn.Linear):
    """A linear layer of somebody else, as LoRA's are."""

    def forward(self, x: Tensor) -> Tensor:
        """Something more."""
        return super().forward(x) + 1


class Wrapped(Tensor):
    """A tensor of somebody else."""


def with_its_own_forward(linear: nn.Linear) -> nn.Linear:
    forward = linear.forward
    vars(linear)["forward"] = lambda x: forward(x) + 1
    return linear


def with_hook(kind: str) -> Callable[[nn.Linear], nn.Linear]:
    def register(linear: nn.Linear) -> nn.Linear:
        getattr(linear, f"register_{kind}")(hook)
        return linear

    return register


def parametrized(linear: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(linear, "weight", Doubled())
    return linear


CHANGES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "forward hook": with_hook("forward_hook"),
    "forward pre-hook": with_hook("forward_pre_hook"),
    "backward hook": with_hook("full_backward_hook"),
    "backward pre-hook": with_hook("full_backward_pre_hook"),
    "forward of its own": with_its_own_forward,
    "parametrization": parametrized,
    "subclass": lambda linear: Adapter(WIDTH, OUT, dtype=torch.bfloat16),
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),  # type: ignore[no-untyped-call]
    "hook of a sequential": lambda linear: with_hook("forward_hook")(nn.Sequential(linear)),  # type: ignore[arg-type]
    "weight of another layout": lambda linear: _with_weight(linear, linear.weight.t().contiguous().t()),
    "weight of somebody else": lambda linear: _with_weight(linear, linear.weight.detach().as_subclass(Wrapped)),
}


def _with_weight(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_module_that_is_more_than_a_product_is_called(
    change: Callable[[nn.Linear], nn.Module], halves: Recorded
) -> None:
    changed, x = change(plain()), tokens()
    assert torch.equal(project(changed, x, halves), changed(x))
    assert halves.shapes == []


@pytest.mark.usefixtures("inference")
def test_a_hook_of_all_modules_is_called(halves: Recorded) -> None:
    linear, seen = plain(), []
    handle = register_module_forward_hook(lambda called, *_: seen.append(called))
    try:
        project(linear, tokens(), halves)
    finally:
        handle.remove()
    assert seen == [linear]
    assert halves.shapes == []


@pytest.mark.usefixtures("inference")
def test_a_forward_put_into_all_linear_layers_is_called(monkeypatch: pytest.MonkeyPatch, halves: Recorded) -> None:
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) + 1)
    linear, x = plain(), tokens()
    assert torch.equal(project(linear, x, halves), linear(x))
    assert halves.shapes == []


def test_gradients_go_the_plain_way(halves: Recorded) -> None:
    linear, x = plain(), tokens()
    assert torch.autograd.grad(project(linear, x, halves).sum(), linear.weight)[0].shape == linear.weight.shape
    frozen = plain().requires_grad_(False)
    assert project(frozen, tokens().requires_grad_(), halves).requires_grad
    assert halves.shapes == []
    assert not project(frozen, tokens(), halves).requires_grad
    assert len(halves.shapes) == 1


@pytest.mark.usefixtures("inference")
def test_other_dtypes_and_devices_go_the_plain_way(halves: Recorded) -> None:
    for dtype in (torch.float32, torch.float64):
        assert project(plain(dtype=dtype), tokens(dtype), halves).dtype == dtype
    assert project(plain().to("meta"), tokens().to("meta"), halves).is_meta
    with torch.autocast("cpu", torch.float16):
        assert project(plain(), tokens(), halves).dtype == torch.float16
    assert halves.shapes == []


@pytest.mark.usefixtures("inference")
def test_who_looks_on_sees_the_plain_way(halves: Recorded) -> None:
    linear, x = plain(), tokens()
    torch.func.vmap(lambda one: project(linear, one, halves))(x)
    torch.compile(project, backend="eager", fullgraph=True)(linear, x, halves)
    with forward_ad.dual_level():
        project(linear, x, halves)
    assert halves.shapes == []


@pytest.mark.usefixtures("inference")
def test_one_thread_goes_the_plain_way(halves: Recorded) -> None:
    torch.set_num_threads(1)
    project(plain(), tokens(), halves)
    assert halves.shapes == []


@pytest.mark.usefixtures("inference")
def test_a_layer_projects_in_halves_and_is_the_same_layer(monkeypatch: pytest.MonkeyPatch, halves: Recorded) -> None:
    for name in ("least", "compute", "are_faster", "known"):
        monkeypatch.setattr(HALVES, name, getattr(halves, name))
    layer = MemoryAwareCrossAttention(32, 48, heads=2, dim_head=16).to(torch.bfloat16).eval()
    hooked = copy.deepcopy(layer)
    for part in (hooked.to_q, hooked.to_k, hooked.to_v, hooked.to_out[0]):
        part.register_forward_hook(hook)
    x, context = torch.randn(2, 61, 32).to(torch.bfloat16), torch.randn(2, 53, 48).to(torch.bfloat16)
    found = layer(x, context)
    assert halves.shapes == [(2, 61, 32), (2, 53, 48), (2, 53, 48), (2, 61, 32)]
    torch.testing.assert_close(found, hooked(x, context))
    assert len(halves.shapes) == 4
