"""Comparing peers: checked against float64 first, then their peak memory, then timed in interleaved rounds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slicemod.bench.memory import peak_memory
from slicemod.bench.peers import SDPA, Peer
from slicemod.bench.timing import LargeProduct, seconds_of
from slicemod.bench.work import Exact, Work
from slicemod.memory.free_memory import free_memory

MOST_ERROR = 4.0  # times SDPA's, on the same input; a peer beyond it is not timed
COPIES_OF_SCORES = 2.5  # what unsliced attention holds of its scores at once; a peer without the room is not started

# What a peer that cannot compute a work raises: PyTorch's and its compiler's errors are RuntimeErrors.
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, ImportError)

Mode = Literal["inference", "training"]
_MIXED = "-mixed"  # how such a dtype ends


@dataclass(frozen=True)
class Setting:
    """How a work is run.

    Attributes:
        dtype: of weights and inputs, as "float32"; "bfloat16-mixed" has them in float32, and autocasts to bfloat16.
        mode: a forward pass, or a training step with gradients of input and weights.
        compiled: by `torch.compile`.
    """

    dtype: str
    mode: Mode
    compiled: bool = False

    @property
    def mixed(self) -> bool:
        """Under autocast."""
        return self.dtype.endswith(_MIXED)

    @property
    def products(self) -> torch.dtype:
        """The dtype of matrix products."""
        dtype: torch.dtype = getattr(torch, self.dtype.removesuffix(_MIXED))
        return dtype

    def __str__(self) -> str:
        return f"{self.dtype}, {self.mode}{', compiled' if self.compiled else ''}"


@dataclass(frozen=True)
class Measurement:
    """One peer on one work.

    Attributes:
        series: of the work.
        size: of the work, in its `unit`.
        unit: "px" or "tokens".
        setting: how it ran.
        peer: its name.
        error: relative error of its attention against float64, of the worst layer.
        rounds: how many were timed.
        seconds: median time.
        ratio: median over the rounds of its time by that of SDPA in the same round.
        spread: first and third quartile of those ratios.
        peak_bytes: peak memory beyond inputs and weights.
        output_bytes: of that, what it returns: its output, in training the gradients.
        rate_share: median over the rounds of its FLOP/s by those of the large matrix product in the same round.
        product_rate: median of the large product's FLOP/s.
    """

    series: str
    size: int
    unit: str
    setting: Setting
    peer: str
    error: float
    rounds: int
    seconds: float
    ratio: float
    spread: tuple[float, float]
    peak_bytes: int
    output_bytes: int
    rate_share: float
    product_rate: float

    @property
    def work(self) -> str:
        """Series and size."""
        return f"{self.series}, {self.size} {self.unit}"

    @property
    def pace(self) -> float:
        """Seconds per N^2."""
        return self.seconds / self.size**2

    @property
    def beyond_bytes(self) -> int:
        """Peak memory beyond the output too."""
        return self.peak_bytes - self.output_bytes


@dataclass(frozen=True)
class LeftOut:
    """A peer that was not measured on a work, and why."""

    work: str
    setting: Setting
    peer: str
    reason: str


@dataclass
class _Runner:
    """A peer ready to be timed."""

    peer: str
    call: Callable[[], object]
    error: float
    peak_bytes: int
    output_bytes: int
    times: list[float] = field(default_factory=list)


class Comparison:
    """All peers on one work in one setting.

    `prepare` and then `rounds` do the measuring a step at a time, so that whoever drives them may show progress and
    stop at any step; `measurements` and `left_out` have what is known by then.

    Args:
        work: what is computed.
        peers: who computes it; `SDPA` among them.
        setting: how.
        device: where.
    """

    def __init__(self, work: Work, peers: Sequence[Peer], setting: Setting, device: torch.device) -> None:
        self.work, self.peers, self.setting, self.device = work, peers, setting, device
        self.left_out: list[LeftOut] = []
        self._runners: list[_Runner] = []  # SDPA's first
        self._products: list[float] = []
        self._product = LargeProduct(setting.products, device)
        self._flops = self._scores = 0

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.setting.mixed else self.setting.products

    @property
    def _training(self) -> bool:
        return self.setting.mode == "training"

    def prepare(self) -> Iterator[str]:
        """Checks every peer and measures its peak; yields a peer's name before its turn."""
        torch.manual_seed(0)
        self._flops = self.work.flops(training=self._training)
        self._scores = self.work.scores_bytes(self.setting.products.itemsize, training=self._training)
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in self.work.build().parameters())
        # They are made in float32, whatever the dtype.
        needed = weights * max(torch.float32.itemsize, self._dtype.itemsize * (3 if self._training else 1))
        free = free_memory(self.device)
        if needed > free:
            everyone = (
                f"weights{' and their gradients' if self._training else ''} need {needed:,} bytes, {free:,} are free"
            )
            self.left_out += [LeftOut(self.work.name, self.setting, peer.name, everyone) for peer in self.peers]
            return
        with self.device:
            base = nn.Module.to(self.work.build(), self._dtype)  # diffusers' own `to` warns at half precision
            inputs = tuple(_as_dtype(given, self._dtype) for given in self.work.inputs())
        base.requires_grad_(self._training)
        exact: list[Exact] | None = None
        most_error = 0.0
        for peer in self.peers:
            yield peer.name
            try:
                module = self._fitted(peer, base)
                if exact is None:
                    exact = self.work.exact(base, inputs)
                called: Any = torch.compile(module, dynamic=False) if self.setting.compiled else module
                called = _autocast(called, self.device, self.setting.products) if self.setting.mixed else called
                # A layer inside of a compiled UNet cannot be called by itself; it is checked uncompiled.
                layers = (module.get_submodule(check.path) if check.path else called for check in exact)
                error = max(_error(layer, check) for layer, check in zip(layers, exact, strict=True))
                if peer is SDPA:
                    most_error = MOST_ERROR * error
                elif not error <= most_error:  # NaN is no better
                    raise ValueError(f"its error against float64, {error:.1e}, is over {MOST_ERROR:g} times SDPA's")
                self._runners.append(self._runner(peer, called, list(module.parameters()), inputs, error))
            except REFUSALS as refusal:
                self._leave_out(peer, refusal)
                if peer is SDPA:
                    return

    def rounds(self, count: int, until: float) -> Iterator[int]:
        """Times every peer once a round, in turns forwards and backwards; yields the number of the round done.

        Args:
            count: rounds.
            until: a time of `time.monotonic` after which no other round begins.
        """
        if not self._runners:
            return
        seconds_of(self._product, self.device)
        for turn in range(count):
            if turn and time.monotonic() > until:
                return
            found = [
                (runner, seconds_of(runner.call, self.device)) for runner in self._runners[:: -1 if turn % 2 else 1]
            ]
            self._products.append(seconds_of(self._product, self.device))
            for runner, seconds in found:  # a round that is broken off counts for none
                runner.times.append(seconds)
            yield turn + 1

    def measurements(self) -> list[Measurement]:
        """What the rounds so far have shown."""
        return [self._measurement(runner) for runner in self._runners if self._products]

    def _fitted(self, peer: Peer, base: nn.Module) -> nn.Module:
        missing = peer.missing(self.device)
        if missing is not None:
            raise ValueError(missing)
        held = peer.scores_held * self._scores
        free = free_memory(self.device)
        if COPIES_OF_SCORES * held > free:
            raise ValueError(f"would hold {COPIES_OF_SCORES * held:,.0f} bytes of scores, {free:,} are free")
        module = self.work.computed_by(peer, base)
        if module is None:
            raise ValueError("comes with its projections only")
        return module

    def _runner(
        self, peer: Peer, called: Any, weights: list[nn.Parameter], inputs: tuple[Any, ...], error: float
    ) -> _Runner:
        call = _inference(called, inputs)
        if self._training:
            given = tuple(
                x.clone().requires_grad_() if _is_float(x) and self.work.has_gradient(position) else x
                for position, x in enumerate(inputs)
            )
            call = _training_step(called, given, weights)
        if self.setting.compiled or self.device.type == "cuda":
            call()  # cuBLAS takes a workspace, for good, at a thread's first product; it would be the first peer's
        sizes: list[int] = []

        def sized() -> object:
            result = call()
            sizes.append(_bytes_of(result))
            return result

        peak = peak_memory(sized, self.device)
        return _Runner(peer.name, call, error, peak, sizes[0])

    def _measurement(self, runner: _Runner) -> Measurement:
        base = self._runners[0].times
        ratios = [own / sdpa for own, sdpa in zip(runner.times, base, strict=True)]
        shares = [
            self._flops / own / (self._product.flops / product)
            for own, product in zip(runner.times, self._products, strict=True)
        ]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
        return Measurement(
            series=self.work.series,
            size=self.work.size,
            unit=self.work.unit,
            setting=self.setting,
            peer=runner.peer,
            error=runner.error,
            rounds=len(ratios),
            seconds=statistics.median(runner.times),
            ratio=statistics.median(ratios),
            spread=(quartiles[0], quartiles[2]),
            peak_bytes=runner.peak_bytes,
            output_bytes=runner.output_bytes,
            rate_share=statistics.median(shares),
            product_rate=self._product.flops / statistics.median(self._products),
        )

    def _leave_out(self, peer: Peer, refusal: Exception) -> None:
        lines = str(refusal).strip().splitlines() or [type(refusal).__name__]
        self.left_out.append(LeftOut(self.work.name, self.setting, peer.name, lines[0]))
        gc.collect()  # what a failed call left behind would be freed in the next peer's measurement


def _error(layer: Callable[..., Tensor], check: Exact) -> float:
    with torch.no_grad():
        found = layer(*check.args)[..., check.rows, :].double()
    return float((found - check.wanted).norm() / check.wanted.norm())


def _autocast(module: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return module(*args)

    return call


def _inference(module: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[], object]:
    def infer() -> object:
        with torch.no_grad():
            return module(*inputs)

    return infer


def _training_step(
    module: Callable[..., Any], inputs: tuple[Any, ...], parameters: list[nn.Parameter]
) -> Callable[[], object]:
    wanted = [*(x for x in inputs if _is_float(x) and x.requires_grad), *parameters]

    def step() -> object:
        output = module(*inputs)
        output = output if isinstance(output, Tensor) else output.sample
        output.square().mean().backward()  # not autograd.grad, which reentrant checkpoints refuse
        grads = [tensor.grad for tensor in wanted]
        for tensor in wanted:
            tensor.grad = None
        return grads

    return step


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: _as_dtype(tensor, dtype) for name, tensor in value.items()}
    return value.to(dtype) if _is_float(value) else value


def _bytes_of(result: Any) -> int:
    tensors = [result] if isinstance(result, Tensor) else list(result.values() if hasattr(result, "values") else result)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
