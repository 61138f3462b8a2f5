"""What a Stable Diffusion UNet is trained between and what never changes: autoencoder and text encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from slicemod.training.stable_diffusion.content_hash import module_digest
from slicemod.training.stable_diffusion.text_encoders import CutCaption, TextEmbeddings


class CaptionEncoder(Protocol):
    """What ``TextEncoders`` is to the training."""

    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Embeds captions."""

    def digest(self) -> str:
        """Names what the embeddings depend on."""

    def cut(self, captions: Sequence[str]) -> list[CutCaption]:
        """Those that are too long to be looked at whole."""

    def to(self, device: Any) -> Any:
        """Moves the weights."""


class LatentDistribution(NamedTuple):
    """Mean and standard deviation of scaled latents, (B, c, h, w) each."""

    mean: Tensor
    std: Tensor


class FrozenStages:
    """Autoencoder and text encoders, in float32, on the device that ``on`` names while they work.

    They are no submodules of what is trained: checkpoints and averages of weights leave them out.

    Args:
        load_autoencoder: called at the first use.
        load_text_encoders: called at the first use.
    """

    def __init__(
        self, load_autoencoder: Callable[[], AutoencoderKL], load_text_encoders: Callable[[], CaptionEncoder]
    ) -> None:
        self._load_autoencoder = load_autoencoder
        self._load_text_encoders = load_text_encoders
        self._device = torch.device("cpu")

    def __deepcopy__(self, memo: object) -> FrozenStages:
        """Itself: copies of the trained weights share what is frozen."""
        return self

    @cached_property
    def autoencoder(self) -> AutoencoderKL:
        """The first stage; its ``config.scaling_factor`` brings latents to about unit variance."""
        return self._load_autoencoder().eval().requires_grad_(False).to(self._device)

    @cached_property
    def text_encoders(self) -> CaptionEncoder:
        """The conditioning stage."""
        encoders = self._load_text_encoders()
        encoders.to(self._device)
        return encoders

    def to(self, device: torch.device) -> None:
        """Moves what is loaded, and loads the rest there."""
        self._device = device
        for name in ("autoencoder", "text_encoders"):
            if name in vars(self):
                getattr(self, name).to(device)

    @cached_property
    def latents_digest(self) -> str:
        """Names what latents depend on besides the image."""
        return module_digest(self.autoencoder, self.autoencoder.config.scaling_factor)

    @cached_property
    def embeddings_digest(self) -> str:
        """Names what embeddings depend on besides the caption."""
        return self.text_encoders.digest()

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> LatentDistribution:
        """(B, 3, H, W) in [-1, 1] to the distribution of their latents."""
        scale = float(self.autoencoder.config.scaling_factor)
        posterior = self.autoencoder.encode(images.to(self._device)).latent_dist
        return LatentDistribution(posterior.mean * scale, posterior.std * scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, c, h, w) to images (B, 3, H, W) in [-1, 1], one at a time, on the CPU."""
        scale = float(self.autoencoder.config.scaling_factor)
        decoded = [
            self.autoencoder.decode(part.to(self._device).float() / scale).sample for part in torch.split(latents, 1)
        ]
        return torch.cat([part.clamp(-1, 1).cpu() for part in decoded])

    def encode_captions(self, captions: Sequence[str]) -> TextEmbeddings:
        """Embeds captions."""
        return self.text_encoders.encode(captions)
