"""A folder of images with captions: which are there, which cannot be used and why."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from slicemod.training.stable_diffusion.aspect_buckets import Bucket
from slicemod.training.stable_diffusion.captions import METADATA, captions_of_metadata, place, read_text
from slicemod.training.stable_diffusion.decoded_picture import decoded_picture
from slicemod.training.stable_diffusion.files_below import files_below
from slicemod.user_error import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class CaptionedImage:
    """An image that was decoded once to see that it is whole; its size is the one after EXIF rotation."""

    path: Path
    caption: str
    height: int
    width: int
    digest: str


class Crop(NamedTuple):
    """What a bucket shows of an image: its corner in the resized image, in pixels, and whether it is then mirrored."""

    top: int
    left: int
    flipped: bool


class FoundImages(NamedTuple):
    """The images of a folder, sorted by path, and those left out with the reason."""

    images: list[CaptionedImage]
    skipped: list[tuple[Path, str]]


def find_captioned_images(folder: str | os.PathLike[str], *, progress: bool = True) -> FoundImages:
    """Looks for images and their captions, in ``metadata.jsonl`` or else in a ``.txt`` beside the image.

    Raises:
        UserError: there is no such folder, no usable image in it, or ``metadata.jsonl`` is not as expected.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"data.folder: expected a folder of images, found none at {root}. Correct the path.")
    files, skipped = files_below(root)
    captions = captions_of_metadata(root, files)
    places = {path: place(path) for path in files}
    gone = captions.keys() - places.values()
    skipped += [(path, f"{METADATA} names it, but there is no such file") for path in sorted(gone)]
    known = Image.registered_extensions()
    images: list[CaptionedImage] = []
    for path in track(files, "reading images", disable=not progress, transient=True):
        if path.suffix.lower() in SUFFIXES:
            try:
                images.append(_captioned_image(path, captions.get(places[path])))
            except (OSError, ValueError) as error:
                skipped.append((path, str(error)))
        elif path.suffix.lower() in known:
            skipped.append((path, f"expected {', '.join(SUFFIXES)}, got {path.suffix}"))
    if not images:
        reasons = "".join(f" {path.name}: {reason}." for path, reason in skipped[:3])
        raise UserError(
            f"data.folder: expected images ({', '.join(SUFFIXES)}) with captions in {root}, found none.{reasons} Put a"
            f" caption beside each image, cat.txt beside cat.png, or into {METADATA}."
        )
    return FoundImages(images, skipped)


def read_crop(image: CaptionedImage, bucket: Bucket, crop: Crop) -> Tensor:
    """The part of an image that a bucket shows, (3, height, width) float32 in [-1, 1]."""
    picture = decoded_picture(image.path.read_bytes())
    height, width = covering_size(image, bucket)
    down, across = image.height / height, image.width / width  # pixels of the file for one of the resized image
    shown = (
        crop.left * across,
        crop.top * down,
        min((crop.left + bucket.width) * across, image.width),
        min((crop.top + bucket.height) * down, image.height),
    )
    # The same pixels as of resizing all of it and cropping then, which of a long strip would be a huge picture.
    picture = picture.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=shown)
    if crop.flipped:
        picture = ImageOps.mirror(picture)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (3, height, width)
    return pixels.float() / 127.5 - 1


def covering_size(image: CaptionedImage, bucket: Bucket) -> tuple[int, int]:
    """Height and width of the image made just large enough to cover the bucket."""
    scale = enlargement(image, bucket)
    return max(bucket.height, round(image.height * scale)), max(bucket.width, round(image.width * scale))


def enlargement(image: CaptionedImage, bucket: Bucket) -> float:
    """Edge of the image that covers the bucket over its edge in the file; below 1 where it is made smaller."""
    return max(bucket.height / image.height, bucket.width / image.width)


def _captioned_image(path: Path, caption: str | None) -> CaptionedImage:
    """The image of a file; without a caption the text beside it is taken.

    Raises:
        OSError: it cannot be read.
        ValueError: there is no caption or no picture; the message says why.
    """
    if caption is None:
        beside = path.with_suffix(".txt")
        if not beside.is_file():
            raise ValueError(f"it has no caption, neither in {METADATA} nor in {beside.name}")
        try:
            caption = read_text(beside).strip()
        except (OSError, ValueError) as error:
            raise ValueError(f"{beside.name} cannot be read: {error}") from error
    content = path.read_bytes()
    width, height = decoded_picture(content).size
    return CaptionedImage(path, caption, height, width, hashlib.sha256(content).hexdigest())
