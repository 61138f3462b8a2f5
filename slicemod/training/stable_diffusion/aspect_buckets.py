"""Aspect-ratio buckets: a few image sizes of about the same area, and which of them an image is cropped to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slicemod.user_error import UserError

MOST_RESOLUTION = 16384  # pixels; what no latent-diffusion UNet was trained on
MOST_RATIO = 100


@dataclass(frozen=True, order=True)
class Bucket:
    """An image size in pixels. Every batch has one bucket, so that each bucket has one slice plan a layer.

    >>> str(Bucket(512, 768))
    '512x768'
    """

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def plan_buckets(resolution: int, step: int, max_ratio: float) -> tuple[Bucket, ...]:
    """All sizes whose edges are multiples of ``step``, whose area is at most ``resolution`` squared, and as large.

    Args:
        resolution: edge in pixels of the square bucket, which is always there.
        step: what autoencoder and UNet halve down to whole latents; also the distance between buckets.
        max_ratio: longest edge over shortest; 1 leaves the square alone.

    Raises:
        UserError: a number is out of range, or the resolution is no multiple of ``step``.

    >>> [str(bucket) for bucket in plan_buckets(512, 64, 1.5)]
    ['448x576', '512x512', '576x448']
    """
    if not 1 <= resolution <= MOST_RESOLUTION:
        raise UserError(
            f"data.resolution must be from 1 to {MOST_RESOLUTION} pixels, got {resolution}: use the edge of the images"
            " that the model was made for, such as 512 or 1024."
        )
    if not 1 <= step <= resolution:
        raise UserError(f"data.bucket_step must be from 1 pixel to data.resolution, {resolution}, got {step}: use 64.")
    if resolution % step:
        raise UserError(
            f"data.resolution must be a multiple of {step} pixels, got {resolution}: use"
            f" {max(1, round(resolution / step)) * step}."
        )
    if not 1 <= max_ratio <= MOST_RATIO:
        raise UserError(
            f"data.max_ratio must be from 1 to {MOST_RATIO}, got {max_ratio}: 1 leaves square images alone."
        )
    widest = math.floor(resolution * math.sqrt(max_ratio))  # areas are at most the square's
    wide = [Bucket(resolution**2 // width // step * step, width) for width in range(resolution, widest + 1, step)]
    wide = [bucket for bucket in wide if bucket.width <= bucket.height * max_ratio]
    return tuple(sorted({*wide, *(Bucket(bucket.width, bucket.height) for bucket in wide)}))


def nearest_bucket(height: int, width: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect ratio is nearest to that of an image of ``height`` x ``width`` pixels.

    >>> str(nearest_bucket(900, 1200, plan_buckets(512, 64, 2)))
    '448x576'
    """
    wanted = math.log(width / height)
    return min(buckets, key=lambda bucket: abs(math.log(bucket.width / bucket.height) - wanted))
