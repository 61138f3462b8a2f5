"""Times are of the call, and the large product counts its operations."""

from __future__ import annotations

import time

import pytest
import torch

from slicemod.bench import timing
from slicemod.bench.timing import LargeProduct, seconds_of

CPU = torch.device("cpu")


def test_a_call_takes_as_long_as_it_takes() -> None:
    assert seconds_of(lambda: time.sleep(0.05), CPU) >= 0.05


@pytest.mark.parametrize(("ticks", "calls"), [((0.07,), 1), ((0.02, 0.03), 1 + 3)], ids=["long", "short"])
def test_a_short_call_is_repeated_until_it_fills_the_span(
    ticks: tuple[float, ...], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([second for tick in ticks for second in (0.0, tick)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    counted: list[None] = []
    seconds = seconds_of(lambda: counted.append(None), CPU)
    assert len(counted) == calls
    assert seconds == pytest.approx(ticks[-1] / max(calls - 1, 1))


def test_the_product_counts_two_operations_for_each_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PRODUCT_SIZE", 67)
    product = LargeProduct(torch.bfloat16, CPU)
    result = product()
    assert isinstance(result, torch.Tensor)
    assert (result.dtype, result.shape) == (torch.bfloat16, (67, 67))
    assert product.flops == 2 * 67**3


def test_a_product_that_would_take_long_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PRODUCT_SIZE", 512)
    monkeypatch.setattr(timing, "seconds_of", lambda call, device: 0.2)
    assert LargeProduct(torch.float32, CPU).left.shape == (256, 256)
    monkeypatch.setattr(timing, "seconds_of", lambda call, device: 0.1)
    assert LargeProduct(torch.float32, CPU).left.shape == (512, 512)


@pytest.mark.cuda
def test_a_gpu_is_waited_for() -> None:
    large = torch.randn(4096, 4096, device="cuda")
    assert seconds_of(lambda: large @ large @ large, torch.device("cuda")) > 1e-4
