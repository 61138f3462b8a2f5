"""A folder of captioned images as batches of cached latents and embeddings, one aspect-ratio bucket a batch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import Progress
from torch import Tensor

from slicemod.training.common.resumable_batches import PlannedBatch, ResumableBatches
from slicemod.training.stable_diffusion.aspect_buckets import Bucket, nearest_bucket, plan_buckets
from slicemod.training.stable_diffusion.captioned_images import (
    CaptionedImage,
    Crop,
    covering_size,
    enlargement,
    find_captioned_images,
    read_crop,
)
from slicemod.training.stable_diffusion.content_hash import text_digest
from slicemod.training.stable_diffusion.frozen_stages import FrozenStages
from slicemod.training.stable_diffusion.tensor_cache import TensorCache
from slicemod.user_error import UserError

MOST_CROPS = 1000  # each of them is encoded and kept
ENLARGED = 2.0  # images that are enlarged by more than this look blurred, and are named
NAMES_SHOWN = 3  # of the images that are enlarged
VARIANTS_SEED = 500_009  # apart from the seed of the order, so that the two have nothing to do with each other


class LatentBatch(TypedDict):
    """What a training step gets: this process's part of a batch that may be shared between processes.

    ``mean`` and ``std`` (B, c, h, w) of the latents; ``context`` (B, tokens, d), ``pooled`` (B, p) or None, the same
    of the empty caption, ``empty_context`` (1, tokens, d) and ``empty_pooled``; ``time_ids`` (B, 6): height and width
    of the image, top and left of the crop, height and width of the bucket; ``files``; ``numbers``, of each image one
    that no other has, from the first epoch on; ``total``, the images of the shared batch.
    """

    mean: Tensor
    std: Tensor
    context: Tensor
    pooled: Tensor | None
    empty_context: Tensor
    empty_pooled: Tensor | None
    time_ids: Tensor
    files: list[str]
    numbers: list[int]
    total: int


class BucketBatches(ResumableBatches[LatentBatch]):
    """Batches of one bucket each; every process takes its own part of the same batch.

    Where images are left over, a bucket's last batch is smaller; fewer images than processes wait for the next epoch.

    Args:
        buckets: of every image.
        batch_size: images of one process.
        variants: crops and flips of each image to draw from; each epoch draws one.
        seed: of order and variants; None keeps the order and takes the first variant.
        load_part: given this process's images and variants, the batch without numbers and total.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        batch_size: int,
        variants: int,
        seed: int | None,
        load_part: Callable[[Sequence[int], Sequence[int]], dict[str, Any]],
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        groups: dict[Bucket, list[int]] = {bucket: [] for bucket in sorted(set(buckets))}
        for place, bucket in enumerate(buckets):
            groups[bucket].append(place)
        super().__init__(list(groups.values()), batch_size * world_size, seed, multiple=world_size)
        self.variants = variants
        self.load_part = load_part
        self.rank = rank
        self.world_size = world_size
        self._drawn: tuple[int, list[int]] = (-1, [])

    def load(self, planned: PlannedBatch) -> LatentBatch:
        """This process's part."""
        share = len(planned.images) // self.world_size
        own = slice(self.rank * share, (self.rank + 1) * share)
        numbers = planned.numbers[own]
        part = self.load_part(planned.images[own], [self._variant(number) for number in numbers])
        return cast(LatentBatch, {**part, "numbers": numbers, "total": len(planned.images)})

    def _variant(self, number: int) -> int:
        if self.seed is None:
            return 0
        epoch, place = divmod(number, self.images)
        if self._drawn[0] != epoch:
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + VARIANTS_SEED)
            self._drawn = epoch, torch.randint(self.variants, (self.images,), generator=draw).tolist()
        return self._drawn[1][place]


class CaptionedFolder(pl.LightningDataModule):
    """Images with captions from ``metadata.jsonl`` or from a ``.txt`` beside each.

    Args:
        folder: searched with its subfolders, linked ones too; broken files are named on stderr and left out.
        cache: folder of the cached latents and embeddings, keyed by content and settings.
        resolution: edge in pixels of the square bucket; the others have about its area.
        batch_size: images a step and process.
        bucket_step: distance between bucket edges in pixels.
        max_ratio: longest edge of a bucket over its shortest; 1 crops everything to squares.
        crops: cuts of each image to draw from: the first is the centre, the others are random and fixed.
        flip: draw mirrored images too.
        val_count: images held out for validation, chosen by their content.
        shuffle_seed: chooses the order of the batches, and crop and flip of each image in each epoch.
    """

    def __init__(  # noqa: PLR0913 - these are the keys of users' configs
        self,
        folder: str,
        cache: str,
        resolution: int = 512,
        batch_size: int = 1,
        bucket_step: int = 64,
        max_ratio: float = 2.0,
        crops: int = 1,
        flip: bool = False,
        val_count: int = 0,
        shuffle_seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least, most in (
            ("batch_size", batch_size, 1, math.inf),
            ("crops", crops, 1, MOST_CROPS),
            ("val_count", val_count, 0, math.inf),
            ("shuffle_seed", shuffle_seed, 0, 2**32 - 1),
        ):
            if not least <= value <= most:
                bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
                raise UserError(f"data.{name} must be a whole number {bounds}, got {value}.")
        self.folder = folder
        self.cache = TensorCache(cache)
        self.resolution = resolution
        self.batch_size = batch_size
        self.crops = crops
        self.flip = flip
        self.val_count = val_count
        self.shuffle_seed = shuffle_seed
        self.buckets = plan_buckets(resolution, bucket_step, max_ratio)
        self.bucket_step = bucket_step
        self.train_images: list[CaptionedImage] = []
        self.val_images: list[CaptionedImage] = []
        self._digests = ("", "")  # of what encoded latents and embeddings

    @property
    def variants(self) -> int:
        """Crops times flips of each image."""
        return self.crops * (2 if self.flip else 1)

    def bucket(self, image: CaptionedImage) -> Bucket:
        """The bucket of an image."""
        return nearest_bucket(image.height, image.width, self.buckets)

    def pixels(self, image: CaptionedImage, variant: int = 0) -> Tensor:
        """What a variant shows of an image, (3, height, width) in [-1, 1]; variant 0 is what validation sees."""
        return read_crop(image, self.bucket(image), self._crop(image, variant))

    def find(self, *, progress: bool = True) -> None:
        """Looks through the folder; names on stderr what is left out or much enlarged. Does nothing the second time.

        Raises:
            UserError: there is no usable image, or none left to train on.
        """
        if self.train_images:
            return
        found = find_captioned_images(self.folder, progress=progress)
        for path, reason in found.skipped:
            _tell(f"{path} is left out: {reason}.")
        if len(found.images) <= self.val_count:
            raise UserError(
                f"data.val_count must leave images to train on, got {self.val_count} of {len(found.images)}: give a"
                " smaller number."
            )
        held_out = set(sorted(found.images, key=lambda image: image.digest)[: self.val_count])
        self.val_images = [image for image in found.images if image in held_out]
        self.train_images = [image for image in found.images if image not in held_out]
        self._name_enlarged(found.images)

    def _name_enlarged(self, images: Sequence[CaptionedImage]) -> None:
        """Says which images are too small for their bucket."""
        scales = [(enlargement(image, self.bucket(image)), image) for image in images]
        enlarged = sorted((pair for pair in scales if pair[0] > ENLARGED), key=lambda pair: -pair[0])
        if enlarged:
            named = ", ".join(
                f"{image.path} ({image.width}x{image.height} pixels, {scale:.3g} times)"
                for scale, image in enlarged[:NAMES_SHOWN]
            )
            rest = f" and {len(enlarged) - NAMES_SHOWN} more" if len(enlarged) > NAMES_SHOWN else ""
            _tell(
                f"{len(enlarged)} of {len(images)} images are enlarged by more than {ENLARGED:g} times and will look"
                f" blurred: {named}{rest}. Take them out, or lower data.resolution."
            )

    def fill_cache(self, stages: FrozenStages, *, rank: int = 0, world_size: int = 1, progress: bool = True) -> None:
        """Computes the latents and embeddings that are missing, every process its share.

        An interrupted run continues where it stopped: each entry is written whole or not at all.

        Args:
            stages: autoencoder and text encoders.
            rank: number of this process.
            world_size: number of processes; wait for all of them before reading.
            progress: whether to show a progress bar.

        Raises:
            UserError: an encoder gives a number that is not finite, or the cache cannot be written.
        """
        self.find(progress=progress)
        self._digests = (stages.latents_digest, stages.embeddings_digest)
        captions = sorted({"", *(image.caption for image in (*self.train_images, *self.val_images))})
        crops = [(image, variant) for image in self.train_images for variant in range(self.variants)]
        crops += [(image, 0) for image in self.val_images]
        with Progress(disable=not progress, transient=True) as bar:
            for caption in bar.track(captions[rank::world_size], description="caching captions"):
                if not self.cache.has(key := self._caption_key(caption)):
                    context, pooled = stages.encode_captions([caption])
                    encoded = {"context": context[0]} | ({} if pooled is None else {"pooled": pooled[0]})
                    self.cache.write(key, _finite(encoded, f"The text encoder's embeddings of the caption {caption!r}"))
            for image, variant in bar.track(crops[rank::world_size], description="caching latents"):
                if not self.cache.has(key := self._latents_key(image, variant)):
                    latents = stages.encode_images(self.pixels(image, variant)[None])
                    encoded = {"mean": latents.mean[0], "std": latents.std[0]}
                    self.cache.write(key, _finite(encoded, f"The autoencoder's latents of {image.path}"))

    def train_dataloader(self) -> BucketBatches:
        """Batches of one bucket each, in another order each epoch; every process its share.

        Raises:
            UserError: no bucket has an image for every process.
        """
        trainer: Any = self.trainer
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        batches = self._batches(self.train_images, self.shuffle_seed, rank, world_size)
        if not len(batches):
            images = self.train_images
            raise UserError(
                f"data.folder: expected a bucket with at least {world_size} images, one for each process, got"
                f" {len(images)} images in {len({self.bucket(image) for image in images})} buckets. Add images, use"
                " fewer processes, or lower data.max_ratio."
            )
        return batches

    def val_dataloader(self) -> BucketBatches | list[Any]:
        """The images held out, in a fixed order and all of them on every process; none where none are."""
        return self._batches(self.val_images, None, 0, 1) if self.val_images else []

    def _batches(self, images: list[CaptionedImage], seed: int | None, rank: int, world_size: int) -> BucketBatches:
        return BucketBatches(
            [self.bucket(image) for image in images],
            self.batch_size,
            self.variants,
            seed,
            lambda places, variants: self._load([images[place] for place in places], variants),
            rank=rank,
            world_size=world_size,
        )

    def _load(self, images: Sequence[CaptionedImage], variants: Sequence[int]) -> dict[str, Any]:
        latents = [self.cache.read(self._latents_key(*pair)) for pair in zip(images, variants, strict=True)]
        texts = [self.cache.read(self._caption_key(image.caption)) for image in images]
        empty = self.cache.read(self._caption_key(""))
        pooled = "pooled" in empty
        return {
            "mean": torch.stack([entry["mean"] for entry in latents]),
            "std": torch.stack([entry["std"] for entry in latents]),
            "context": torch.stack([entry["context"] for entry in texts]),
            "pooled": torch.stack([entry["pooled"] for entry in texts]) if pooled else None,
            "empty_context": empty["context"][None],
            "empty_pooled": empty["pooled"][None] if pooled else None,
            "time_ids": torch.tensor(
                [self._time_ids(*pair) for pair in zip(images, variants, strict=True)], dtype=torch.float32
            ),
            "files": [str(image.path) for image in images],
        }

    def _time_ids(self, image: CaptionedImage, variant: int) -> list[int]:
        bucket, crop = self.bucket(image), self._crop(image, variant)
        left = crop.left
        if crop.flipped:  # what is seen was cut from the mirrored image: there its left edge is the right one
            left = covering_size(image, bucket)[1] - bucket.width - crop.left
        return [image.height, image.width, crop.top, left, bucket.height, bucket.width]

    def _crop(self, image: CaptionedImage, variant: int) -> Crop:
        bucket, number = self.bucket(image), variant % self.crops
        height, width = covering_size(image, bucket)
        spare = torch.tensor([height - bucket.height, width - bucket.width])
        draw = torch.Generator().manual_seed(int(text_digest(image.digest, number)[:12], 16))
        share = torch.rand(2, generator=draw) if number else torch.tensor([0.5, 0.5])
        top, left = (share * (spare + 1)).long().minimum(spare).tolist()
        return Crop(top, left, flipped=variant >= self.crops)

    def _latents_key(self, image: CaptionedImage, variant: int) -> str:
        return text_digest("latents", self._digests[0], image.digest, self.bucket(image), self._crop(image, variant))

    def _caption_key(self, caption: str) -> str:
        return text_digest("caption", self._digests[1], caption)


@rank_zero_only
def _tell(line: str) -> None:
    """To the user, by one of the processes: all of them find the same."""
    print(line, file=sys.stderr)


def _finite(encoded: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    for name, tensor in encoded.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{what}: expected finite numbers, got infinite ones or NaN ({name}). The weights of model.source are"
                " damaged, or were made for another precision: use another copy of them."
            )
    return encoded
