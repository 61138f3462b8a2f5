"""`plan_picture`: what making a picture takes, or training, within a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from slicemod.config import SliceConfig
from slicemod.memory.sizes import size_text
from slicemod.planning.memory_given import bytes_given
from slicemod.planning.picture_kind import PictureKind
from slicemod.planning.picture_model import PictureModel, find_picture_model
from slicemod.planning.picture_parts import TracedPart, parts_of
from slicemod.planning.picture_peaks import Largest, PicturePlanner, WholePlan
from slicemod.planning.resolutions import check_resolutions


class Budgets(NamedTuple):
    """Budgets in bytes with which slicemod's way fits.

    Attributes:
        attention: for `swap_attention` on the UNet, or `sliced_sdpa` on the transformer.
        vae: for the autoencoder.
    """

    attention: int
    vae: int


@dataclass(frozen=True)
class PicturePlan:
    """What making a picture takes.

    Attributes:
        model: its name, as it was given.
        memory: bytes of the device.
        whole: each part at the resolution that was asked for.
        largest: the largest image for each way to compute, and the part that limits it.
        budgets: with which slicemod's way fits; None where it does not.
        left_out: names of parts that nothing is known of, which are not counted.
    """

    model: str
    memory: int
    whole: WholePlan
    largest: tuple[Largest, ...]
    budgets: Budgets | None
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.model} within {size_text(self.memory)}"]
        lines += [f"  largest image, {found.way}: {found.size} ({found.why})" for found in self.largest]
        lines += [
            f"  {part.name} at {self.whole.pixels}: {size_text(part.weights)} of weights, "
            f"{size_text(part.stays_loaded)} stay loaded, "
            f"{', '.join(f'{way} {size_text(peak)}' for way, peak in part.peaks.items())}"
            for part in self.whole.parts
        ]
        return "\n".join(lines)


def plan_picture(
    model: str,
    resolution: int,
    memory: int | str = "8GiB",
    kind: PictureKind | Mapping[str, Any] | None = None,
    *,
    frames: int | None = None,
    slicing: SliceConfig | Mapping[str, Any] | None = None,
) -> PicturePlan:
    """What making a picture takes, or a step of training: text encoders, UNet or transformer, and VAE.

    Neither weights nor the device are needed. Needs diffusers, and transformers for a folder's text encoders.

    Args:
        model: "sd15", "flux-dev" and so on as `slicemod plan --help` lists, a folder in diffusers' layout or a YAML.
        resolution: edge in pixels of the square image.
        memory: of the device, such as "8GiB" or bytes.
        kind: how it is made: a `slicemod.planning.picture_kind.PictureKind`, or a dict of its fields.
        frames: of a video; None takes 81, or 1 for images.
        slicing: policy and kernel of slicemod's attention in the UNet or transformer. The budget is replaced by what
            the plan leaves.

    Raises:
        slicemod.user_error.UserError: there is no such model, values are not known, or the kernel that `slicing` names
            cannot run the attention.
    """
    chosen = PictureKind.of(kind)
    found = find_picture_model(model, frames)
    check_resolutions([resolution], found.denoiser.resolution_step)
    device = torch.device(chosen.device)
    size = memory if isinstance(memory, int) else bytes_given("memory", memory, device)
    planner = picture_planner(found, chosen, size, SliceConfig.of(slicing))
    largest = tuple(planner.largest(way) for way in planner.ways)
    whole = planner.plan(resolution)
    budgets = budgets_of(planner, resolution) if whole.fits("slicemod") else None
    return PicturePlan(model, size, whole, largest, budgets, found.left_out)


def picture_planner(
    model: PictureModel,
    kind: PictureKind,
    memory: int,
    slicing: SliceConfig,
    progress: Callable[[str], None] = lambda _: None,
) -> PicturePlanner:
    """Traces the parts of a model, and plans them on a device with `memory` bytes.

    Args:
        model: what makes the picture.
        kind: how.
        memory: of the device.
        slicing: of slicemod's attention in the UNet or transformer.
        progress: is told what is being done if that takes seconds.
    """
    parts = list(parts_of(model, kind, slicing, progress))
    ways = next(part.planner.ways for part in parts if isinstance(part, TracedPart) and part.is_denoiser)
    source = model.denoiser
    return PicturePlanner(
        parts,
        together=kind.together,
        memory=memory,
        resolution_step=source.resolution_step,
        most_pixels=source.most_pixels,
        ways=ways,
    )


def budgets_of(planner: PicturePlanner, pixels: int) -> Budgets:
    """The budgets of slicemod's attention that the rest of each part leaves, for images with edges of `pixels`."""
    left = {}
    for part in planner.parts:
        if isinstance(part, TracedPart):
            memory = planner.memory - planner.stays_loaded(part)
            left[part.is_denoiser] = part.within(pixels, memory).plan(pixels).budget
    return Budgets(left[True], left[False])
