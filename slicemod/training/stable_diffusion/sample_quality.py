"""KID or FID between the images held out and images drawn from their captions."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from slicemod.training.stable_diffusion.prompt_sampling import (
    EncodedPrompt,
    PromptSampling,
    draw_prompts,
    encode_prompts,
)
from slicemod.training.stable_diffusion.sample_images import is_last_validation_batch, require_stable_diffusion
from slicemod.user_error import UserError


class SampleQuality(pl.Callback):
    """Logs ``val/kid`` or ``val/fid`` at the end of each validation; nothing is downloaded for it.

    Args:
        feature_extractor: bytes (N, 3, H, W) to features (N, F), such as an Inception whose weights you have.
        metric: "kid" (Binkowski et al. 2018, arXiv:1801.01401), for few images, or "fid" (Heusel et al. 2017,
            arXiv:1706.08500), for thousands.
        seed: of the noise, one more for each image.
        steps: of denoising.
        guidance: weight of the caption.
    """

    def __init__(
        self,
        feature_extractor: nn.Module,
        metric: Literal["kid", "fid"] = "kid",
        seed: int = 0,
        steps: int = 30,
        guidance: float = 7.0,
    ) -> None:
        self.feature_extractor = feature_extractor.eval().requires_grad_(False)
        self.metric = metric
        self.seed = seed
        self.steps = steps
        self.guidance = guidance
        self._encoded: list[EncodedPrompt] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Encodes the captions of the images held out."""
        model, data = require_stable_diffusion(trainer, pl_module, "SampleQuality")
        if data.val_count < 2:
            raise UserError(
                f"SampleQuality compares two images at least: data.val_count is {data.val_count}. Raise it."
            )
        data.find(progress=False)
        self._encoded = encode_prompts(model, [image.caption for image in data.val_images])

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Measures and logs KID or FID."""
        if not is_last_validation_batch(trainer, batch_idx):
            return
        model, data = require_stable_diffusion(trainer, pl_module, "SampleQuality")
        extractor = self.feature_extractor.to(pl_module.device)
        kind: Any = FrechetInceptionDistance if self.metric == "fid" else KernelInceptionDistance
        options = {} if self.metric == "fid" else {"subset_size": data.val_count, "subsets": 1}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")  # of few images
            # Every process draws all images: sharded weights are gathered from all of them.
            measured = kind(feature=extractor, sync_on_compute=False, **options).to(pl_module.device)
        for place, image in enumerate(data.val_images):
            bucket = data.bucket(image)
            drawn = draw_prompts(
                model,
                self._encoded[place : place + 1],
                PromptSampling(bucket.height, bucket.width, self.steps, self.guidance, self.seed + place),
                progress=False,
            )
            measured.update(_bytes(data.pixels(image)[None]).to(pl_module.device), real=True)
            measured.update(_bytes(drawn).to(pl_module.device), real=False)
        value = measured.compute()
        value = value[0] if isinstance(value, tuple) else value
        pl_module.log(f"val/{self.metric}", value, sync_dist=True, batch_size=1)


def _bytes(images: Tensor) -> Tensor:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
