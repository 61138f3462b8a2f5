"""The parts of making a picture, or of training, and the peak of each at any resolution and with any memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch

from slicemod.config import SliceConfig
from slicemod.memory.budget import AMPLE
from slicemod.planning.memory_timeline import StepPeak
from slicemod.planning.picture_kind import PictureKind
from slicemod.planning.picture_model import PictureModel
from slicemod.planning.prompt_encoders import KnownEncoder
from slicemod.planning.step_peaks import WAYS, StepPlanner, Way
from slicemod.planning.step_source import StepSource
from slicemod.planning.transformers import TransformerSource
from slicemod.planning.unet_step import StepKind
from slicemod.user_error import FieldError


class Part(Protocol):
    """A part of the whole, which runs while the others may be loaded."""

    @property
    def name(self) -> str:
        """Such as "VAE decoding"."""

    @property
    def waiting(self) -> int:
        """Bytes that stay loaded while another part runs, unless it is taken away."""

    def peaks(self, pixels: int, memory: int) -> Mapping[Way, StepPeak]:
        """The peak for each way that is possible, for images with edges of `pixels`, within `memory` bytes."""

    def fits(self, way: Way, pixels: int, memory: int) -> bool:
        """Whether that peak fits `memory` bytes."""

    def whole_peak(self, way: Way, pixels: int) -> int:
        """Bytes of that peak where memory does not matter."""

    @property
    def trains(self) -> bool:
        """It is a step of training."""


class EncoderPart:
    """A text encoder whose figures are known: the same for every image and every way."""

    def __init__(self, name: str, encoder: KnownEncoder, dtype: torch.dtype) -> None:
        self.name = name
        self._peak = encoder.peak(dtype)
        self.waiting = self._peak.weights
        self.trains = False

    def peaks(self, pixels: int, memory: int) -> Mapping[Way, StepPeak]:
        """The peak of one prompt."""
        del pixels, memory
        return dict.fromkeys(WAYS, self._peak)

    def fits(self, way: Way, pixels: int, memory: int) -> bool:
        """Whether weights and peak fit."""
        del way, pixels
        return self._peak.total <= memory

    def whole_peak(self, way: Way, pixels: int) -> int:
        """Weights and peak."""
        del way, pixels
        return self._peak.total


class TracedPart:
    """A part whose step is traced.

    Args:
        name: of the part.
        planner: of its step.
        waiting: bytes that stay loaded while another part runs.
        is_denoiser: it is the UNet or the transformer.
    """

    def __init__(self, name: str, planner: StepPlanner, waiting: int, *, is_denoiser: bool = False) -> None:
        self.name, self.planner, self.waiting, self.is_denoiser = name, planner, waiting, is_denoiser
        self.trains = planner.kind.training

    def within(self, pixels: int, memory: int) -> StepPlanner:
        """The planner of the step, for what its own inputs leave of `memory`."""
        return self.planner.within(memory - self.planner.inputs(pixels))

    def peaks(self, pixels: int, memory: int) -> Mapping[Way, StepPeak]:
        """Of the step, together with the tensors that it is given."""
        inputs, found = self.planner.inputs(pixels), self.within(pixels, memory).plan(pixels).peaks
        return {way: peak._replace(activations=peak.activations + inputs) for way, peak in found.items()}

    def fits(self, way: Way, pixels: int, memory: int) -> bool:
        """Whether the step fits."""
        return self.within(pixels, memory).fits(way, pixels)

    def whole_peak(self, way: Way, pixels: int) -> int:
        """Of the step and its inputs, where memory does not matter; more than there is if it cannot run."""
        peak = self.within(pixels, AMPLE).peak(way, pixels)
        return AMPLE if peak is None else peak.total + self.planner.inputs(pixels)


def parts_of(
    model: PictureModel, kind: PictureKind, slicing: SliceConfig, progress: Callable[[str], None]
) -> Iterator[Part]:
    """The parts, in the order in which they run; the last but one or the last is the UNet or the transformer.

    Args:
        model: what makes the picture.
        kind: how.
        slicing: of slicemod's attention in the UNet or transformer. In the others it is as `swap_vae` has it.
        progress: is told what is being done if that takes seconds.
    """
    swapped_layers = kind.train and (kind.feed_forward or slicing.recomputes_layers)
    if swapped_layers and isinstance(model.denoiser, TransformerSource):
        field = "feed_forward" if kind.feed_forward else "checkpoint"
        raise FieldError(
            f"{field}: expected a UNet, whose layers swap_attention knows; got {model.denoiser.class_name}. Leave it."
        )
    step = kind.step(model.denoiser)
    alone = step._replace(batch=1, training=False, checkpoint_blocks=False, prepared=False)

    def traced(name: str, source: StepSource, of: StepKind, *, swapped: bool = False) -> StepPlanner:
        own = slicing if source is model.denoiser else SliceConfig()
        return StepPlanner(source, of, AMPLE, own, lambda told: progress(f"{name}: {told}"), swapped=swapped)

    for number, encoder in enumerate(model.encoders, 1):
        name = "text encoder" if len(model.encoders) == 1 else f"text encoder {number}"
        if isinstance(encoder, KnownEncoder) and not alone.streams_weights:
            yield EncoderPart(name, encoder, step.dtype)
            continue
        source = encoder.source if isinstance(encoder, KnownEncoder) else encoder
        yield _part(name, traced(name, source, alone))
    denoiser = "transformer" if is_transformer(model) else "UNet"
    if kind.train:
        images = alone._replace(batch=step.batch)
        encodes = model.autoencoder._replace(encodes=True)
        yield _part("VAE encoding", traced("VAE encoding", encodes, images, swapped=True))
        planner = traced(denoiser, model.denoiser, step, swapped=kind.feed_forward)
        yield _part(f"{denoiser}, training", planner, is_denoiser=True)
        return
    yield _part(
        f"{denoiser}, a step",
        traced(denoiser, model.denoiser, step, swapped=not is_transformer(model)),
        is_denoiser=True,
    )
    decoded = model.autoencoder_dtype(step.dtype)
    images = alone._replace(dtype=decoded, batch=max(1, step.batch // model.denoiser.guidance_batch))
    decoder = traced("VAE decoding", model.autoencoder, images, swapped=True)
    yield TracedPart("VAE decoding", decoder, decoder.weights * step.dtype.itemsize // decoded.itemsize)


def sliced_parts(model: PictureModel, kind: PictureKind, slicing: SliceConfig) -> str:
    """What is in slices in slicemod's way."""
    if kind.train:
        layers = "layers" if slicing.recomputes_layers else "attention"
        return f"{layers} and feed-forwards" if kind.feed_forward and slicing.checkpoint else layers
    if model.autoencoder.class_name != "AutoencoderKL":
        return "attention"
    layers_are_whole = kind.offload == "sequential" or slicing.kernel == "math"
    return "attention and VAE" if is_transformer(model) or layers_are_whole else "layers, feed-forwards and VAE"


def left_whole(model: PictureModel) -> Iterator[str]:
    """What slicemod's way computes as it is although it may be the largest, in words."""
    if is_transformer(model):
        yield (
            "slicemod: the transformer's feed-forwards are planned as they are. swap_attention(transformer, "
            "feed_forward=True) computes those of diffusers' class FeedForward in slices"
        )
    if model.autoencoder.class_name != "AutoencoderKL":
        yield f"slicemod: the VAE, an {model.autoencoder.class_name}, is planned as it is. swap_vae does not slice it"


def is_transformer(model: PictureModel) -> bool:
    """The steps are those of a transformer, not of a UNet."""
    return isinstance(model.denoiser, TransformerSource)


def _part(name: str, planner: StepPlanner, *, is_denoiser: bool = False) -> Part:
    return TracedPart(name, planner, planner.weights + planner.optimizer, is_denoiser=is_denoiser)
