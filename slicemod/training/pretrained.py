"""Stable Diffusion's weights in: a diffusers folder or hub id, or one file in the layout of CompVis and sgm.

Nothing is unpickled: a ``.ckpt`` is read as tensors and plain values only. A single file holds neither configs nor a
vocabulary, so that it needs a ``config_source`` beside it, a folder or hub id whose small files describe it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor

from slicemod.training.checkpoints import CheckpointError, load_strictly, read_checkpoint, read_safetensors
from slicemod.user_error import UserError

SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Pretrained:
    """Where a Stable Diffusion model comes from.

    Args:
        source: a folder or hub id in diffusers' layout, or a ``.safetensors`` or ``.ckpt`` file of CompVis or sgm.
        config_source: folder or hub id with the configs and the vocabulary of a single file.

    Raises:
        UserError: the file does not exist, or a single file comes without ``config_source``.
    """

    source: str
    config_source: str | None = None

    def __post_init__(self) -> None:
        if not self.is_single_file:
            if self.config_source is not None:
                raise UserError(
                    f"model.config_source describes a single file, but model.source is {self.source!r}: expected a"
                    f" {' or '.join(SINGLE_FILE_SUFFIXES)} file. Leave config_source out."
                )
            if not Path(self.source).is_dir() and not _HUB_ID.fullmatch(self.source):
                raise UserError(
                    f"model.source: expected a folder, a hub id such as name/model or a"
                    f" {' or '.join(SINGLE_FILE_SUFFIXES)} file, found nothing at {self.source}. Correct the path."
                )
            return
        if not Path(self.source).is_file():
            raise UserError(f"model.source: expected a file, found none at {self.source}. Correct the path.")
        if self.config_source is None:
            raise UserError(
                f"model.config_source is missing: expected a folder or hub id in diffusers' layout whose configs and"
                f" vocabulary describe {self.source}, which holds neither. Name the model that it was trained from."
            )

    @property
    def is_single_file(self) -> bool:
        """The weights lie in one file of the CompVis layout."""
        return Path(self.source).suffix in SINGLE_FILE_SUFFIXES

    @property
    def config_folder(self) -> str:
        """Folder or hub id of the configs."""
        return self.config_source or self.source

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors of a single file by their CompVis names.

        Raises:
            CheckpointError: the file is damaged, needs code to be unpickled, or is of another layout.
        """
        if Path(self.source).suffix == ".safetensors":
            tensors, _ = read_safetensors(self.source)
        else:
            tensors = read_checkpoint(self.source)["state_dict"]
        if not any(name.startswith("model.diffusion_model.") for name in tensors):
            raise CheckpointError(
                f"{self.source} is no Stable Diffusion checkpoint of the CompVis layout: expected tensors named"
                f" model.diffusion_model.*, got {', '.join(list(tensors)[:3]) or 'none'}. Name another file."
            )
        return tensors

    def unet_config(self) -> dict[str, Any]:
        """The arguments of the UNet, without its weights."""
        return self._config(UNet2DConditionModel, "unet")

    def autoencoder_config(self) -> dict[str, Any]:
        """The arguments of the autoencoder, without its weights."""
        return self._config(AutoencoderKL, "vae")

    def load_unet(self) -> UNet2DConditionModel:
        """The UNet in float32.

        Raises:
            UserError: there is no such folder or model.
            CheckpointError: a single file does not fit its configs.
        """
        return self._load(UNet2DConditionModel, "unet", convert_ldm_unet_checkpoint)

    def load_autoencoder(self) -> AutoencoderKL:
        """The autoencoder in float32; raises as ``load_unet`` does."""
        return self._load(AutoencoderKL, "vae", convert_ldm_vae_checkpoint)

    def load_scheduler(self, **changes: Any) -> DDPMScheduler:
        """The noise schedule of the training, with entries of its config replaced by ``changes``."""
        return DDPMScheduler.from_config(self._config(DDPMScheduler, "scheduler"), **changes)

    def _config(self, kind: Any, subfolder: str) -> dict[str, Any]:
        with _named(self.config_folder, subfolder):
            return dict(kind.load_config(self.config_folder, subfolder=subfolder))

    def _load(self, kind: Any, subfolder: str, convert: Any) -> Any:
        if not self.is_single_file:
            with _named(self.source, subfolder):
                return kind.from_pretrained(
                    self.source, subfolder=subfolder, use_safetensors=True, low_cpu_mem_usage=False
                )
        config = self._config(kind, subfolder)
        model = kind.from_config(config)
        try:
            converted = convert(dict(self.tensors), config)
        except KeyError as error:
            raise CheckpointError(
                f"{self.source} does not fit the configs of {self.config_folder}: it lacks {error}. Name the"
                " config_source of the same architecture."
            ) from error
        load_strictly(model, converted, self.source)
        return model


class _named:  # noqa: N801 - a context manager used as a function
    """Turns what diffusers raises about a folder into a ``UserError`` that names it."""

    def __init__(self, folder: str, subfolder: str) -> None:
        self.place = f"{folder} ({subfolder}/)"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (OSError, ValueError)):
            raise UserError(
                f"model.source: {self.place} cannot be read: expected diffusers' layout with safetensors weights."
                f" {error} Correct the name, or convert the weights."
            ) from error
