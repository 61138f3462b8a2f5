"""The autoencoders that `slicemod plan` knows, by their diffusers config: a step is decoding, or encoding.

`AUTOENCODERS` has one record for each class of diffusers. To add a class, add its record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from slicemod.planning.class_defaults import diffusers_class
from slicemod.planning.kept_in_float32 import in_dtype
from slicemod.planning.resolutions import HIGHEST_RESOLUTION
from slicemod.planning.step_source import StepInputs
from slicemod.planning.whole_latents import pixels_per_latent
from slicemod.user_error import UserError

Config = Mapping[str, Any]


class AutoencoderKind(NamedTuple):
    """One class of autoencoders.

    Attributes:
        latent_channels: the name of the entry with the channels of the latents.
        video: images and latents have frames.
    """

    latent_channels: str
    video: bool = False


AUTOENCODERS = {
    "AutoencoderKL": AutoencoderKind("latent_channels"),
    "AutoencoderKLQwenImage": AutoencoderKind("z_dim", video=True),
    "AutoencoderKLWan": AutoencoderKind("z_dim", video=True),
}
_FRAMES_PER_LATENT = 4  # of the videos, after the first frame
# Videos are decoded a few frames after the other. From here on, frames that are finished are all that is added.
_TRACED_FRAMES = 9


class AutoencoderSource(NamedTuple):
    """What is needed to build an autoencoder, and which half of it is the step.

    Attributes:
        class_name: a key of `AUTOENCODERS`.
        config: the arguments of that class; others are its defaults.
        frames: of a video; 1 for an image.
        encodes: the step is encoding. Otherwise it is decoding.
    """

    class_name: str
    config: Config
    frames: int = 1
    encodes: bool = False

    @property
    def kind(self) -> AutoencoderKind:
        """The record of its class."""
        return AUTOENCODERS[self.class_name]

    @property
    def latent_pixels(self) -> int:
        """The edge, in pixels of the image, of the square that one latent pixel stands for."""
        return pixels_per_latent({"_class_name": self.class_name, **self.config}, self.class_name)

    @property
    def resolution_step(self) -> int:
        """The edge of an image has to be a multiple of this."""
        return self.latent_pixels

    @property
    def most_pixels(self) -> int:
        """An autoencoder takes images of any size."""
        return HIGHEST_RESOLUTION

    @property
    def own_pixels(self) -> int | None:
        """No size is like no other to it."""
        return None

    @property
    def full_upcasts(self) -> bool | None:
        """Whether full attention has its scores in float32."""
        return False

    @property
    def guidance_batch(self) -> int:
        """Images that are decoded at once."""
        return 1

    @property
    def latents_name(self) -> str:
        """Its input."""
        return "x" if self.encodes else "z"

    def model(self, dtype: torch.dtype) -> Any:
        """The autoencoder on the device "meta".

        Raises:
            UserError: its config builds none.
        """
        try:
            with torch.device("meta"):
                model = diffusers_class(self.class_name).from_config(dict(self.config))
        except (TypeError, ValueError) as error:
            raise UserError(f"vae: describes no {self.class_name}: {error}. Correct its entries.") from error
        return in_dtype(model.eval(), dtype)

    def inputs(self, model: Any, dtype: torch.dtype, batch: int, pixels: int) -> dict[str, Any]:
        """Latents `(batch, c, h, w)` to decode, or images to encode; with frames before `h` where it has any."""
        step, config = StepInputs(dtype, batch, pixels), model.config
        edge = pixels if self.encodes else pixels // self.latent_pixels
        of_images = config.get("in_channels", 3)
        channels = of_images if self.encodes else config[self.kind.latent_channels]
        if not self.kind.video:
            return {self.latents_name: step.empty(channels, edge, edge)}
        traced = min(self.frames, _TRACED_FRAMES)
        frames = traced if self.encodes else (traced - 1) // _FRAMES_PER_LATENT + 1
        return {
            self.latents_name: step.empty(channels, frames, edge, edge),
            "other frames": step.empty(of_images, self.frames - traced, pixels, pixels),
        }

    def run(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Decodes, or encodes."""
        given = inputs[self.latents_name]
        return model.encode(given) if self.encodes else model.decode(given).sample


def autoencoder_of_config(where: str, config: Config, frames: int) -> AutoencoderSource:
    """The decoding autoencoder that a diffusers config describes.

    Raises:
        UserError: of a class that is not known.
    """
    class_name = config.get("_class_name", "AutoencoderKL")
    if class_name not in AUTOENCODERS:
        raise UserError(
            f"{where}: expected the config of one of {', '.join(AUTOENCODERS)}; got one of {class_name}, whose memory "
            "is not known. Plan the model alone by slicemod plan --part unet, or transformer."
        )
    return AutoencoderSource(class_name, {key: value for key, value in config.items() if key[0] != "_"}, frames)
