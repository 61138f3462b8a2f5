"""A folder of images with captions: which are there, which cannot be used and why."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from slicemod.training.aspect_buckets import Bucket
from slicemod.user_error import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METADATA = "metadata.jsonl"  # as Hugging Face's imagefolder reads it: {"file_name": ..., "text": ...} a line


@dataclass(frozen=True)
class CaptionedImage:
    """An image that was decoded once to see that it is whole; its size is the one after EXIF rotation."""

    path: Path
    caption: str
    height: int
    width: int
    digest: str


class Crop(NamedTuple):
    """What a bucket shows of an image: its corner in the resized image, in pixels, and whether it is mirrored."""

    top: int
    left: int
    flipped: bool


class FoundImages(NamedTuple):
    """The images of a folder, sorted by path, and those left out with the reason."""

    images: list[CaptionedImage]
    skipped: list[tuple[Path, str]]


def find_captioned_images(folder: str | os.PathLike[str], *, progress: bool = True) -> FoundImages:
    """Looks for images and their captions, in ``metadata.jsonl`` or in a ``.txt`` beside the image.

    Raises:
        UserError: there is no such folder, no usable image in it, or ``metadata.jsonl`` is not as expected.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"data.folder: expected a folder of images, found none at {root}. Correct the path.")
    captions = dict(_captions_of_metadata(root))
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    images: list[CaptionedImage] = []
    skipped = [(path, f"{METADATA} names it, but there is no such file") for path in captions if path not in paths]
    for path in track(paths, "reading images", disable=not progress, transient=True):
        beside = path.with_suffix(".txt")
        try:
            caption = captions.get(path, beside.read_text(encoding="utf-8").strip() if beside.is_file() else None)
        except (OSError, UnicodeDecodeError) as error:
            skipped.append((path, f"{beside.name} cannot be read: {error}"))
            continue
        if caption is None:
            skipped.append((path, f"it has no caption, neither in {METADATA} nor in {beside.name}"))
            continue
        try:
            content = path.read_bytes()
            width, height = _decoded(content).size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow's readers raise
            skipped.append((path, f"it cannot be decoded: {error}"))
            continue
        images.append(CaptionedImage(path, caption, height, width, hashlib.sha256(content).hexdigest()))
    if not images:
        reasons = "".join(f" {path.name}: {reason}." for path, reason in skipped[:3])
        raise UserError(
            f"data.folder: expected images ({', '.join(SUFFIXES)}) with captions in {root}, found none.{reasons} Put a"
            f" caption beside each image, cat.txt beside cat.png, or into {METADATA}."
        )
    return FoundImages(images, skipped)


def read_crop(image: CaptionedImage, bucket: Bucket, crop: Crop) -> Tensor:
    """The part of an image that a bucket shows, (3, height, width) float32 in [-1, 1]."""
    picture = _decoded(image.path.read_bytes())
    picture = picture.resize(covering_size(image, bucket)[::-1], Image.Resampling.LANCZOS)
    picture = picture.crop((crop.left, crop.top, crop.left + bucket.width, crop.top + bucket.height))
    if crop.flipped:
        picture = ImageOps.mirror(picture)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (3, height, width)
    return pixels.float() / 127.5 - 1


def covering_size(image: CaptionedImage, bucket: Bucket) -> tuple[int, int]:
    """Height and width of the image made just large enough to cover the bucket."""
    scale = max(bucket.height / image.height, bucket.width / image.width)
    return max(bucket.height, round(image.height * scale)), max(bucket.width, round(image.width * scale))


def _decoded(content: bytes) -> Image.Image:
    """Upright RGB; what is transparent becomes white."""
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        upright = ImageOps.exif_transpose(opened)
    if upright.has_transparency_data:
        layered = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    return upright.convert("RGB")


def _captions_of_metadata(root: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(root.rglob(METADATA)):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {error}. Save it as UTF-8.") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                yield file.parent / entry["file_name"], str(entry["text"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{file}, line {number}: expected an object with file_name and text, got {line[:60]!r}. Correct"
                    " the line."
                ) from error
