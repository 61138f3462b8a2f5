"""Stable Diffusion's weights in: a diffusers folder or hub id, or one file in the layout of CompVis and sgm.

Nothing is unpickled: a ``.ckpt`` is read as tensors and plain values only. A single file holds neither configs nor a
vocabulary, so that it needs a ``config_source`` beside it, a folder or hub id whose small files describe it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors import SafetensorError
from torch import Tensor

from slicemod.training.common.checkpoints import CheckpointError, load_strictly, read_checkpoint, read_safetensors
from slicemod.user_error import UserError

SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_MOVED = "(sample and export take where it lies now by --source)"


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
    _configs: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

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
                    f" {' or '.join(SINGLE_FILE_SUFFIXES)} file, found nothing at {self.source}. Correct the path"
                    f" {_MOVED}."
                )
            return
        if not Path(self.source).is_file():
            raise UserError(f"model.source: expected a file, found none at {self.source}. Correct the path {_MOVED}.")
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

    def scheduler_config(self) -> dict[str, Any]:
        """The arguments of the scheduler that the model draws by, and its class as ``_class_name``."""
        return self._config(DDPMScheduler, "scheduler")

    def load_scheduler(self, **changes: Any) -> DDPMScheduler:
        """The noise schedule of the training, with entries of its config replaced by ``changes``."""
        return DDPMScheduler.from_config(self.scheduler_config(), **changes)

    def zeroes_missing_text(self) -> bool:
        """Whether zeros stand where SDXL is given no text: what ``force_zeros_for_empty_prompt`` says.

        Where no ``model_index.json`` says it, they do, as in diffusers.
        """
        folder = self.config_folder
        if Path(folder).is_dir() and not (Path(folder) / "model_index.json").exists():
            return True
        with reading_part(folder, "model_index.json"):
            index: dict[str, Any] = DiffusionPipeline.load_config(folder)
        return bool(index.get("force_zeros_for_empty_prompt", True))

    def _config(self, kind: Any, subfolder: str) -> dict[str, Any]:
        if subfolder not in self._configs:  # of a hub id each reading is a request
            with reading_part(self.config_folder, f"{subfolder}/"):
                self._configs[subfolder] = dict(kind.load_config(self.config_folder, subfolder=subfolder))
        return dict(self._configs[subfolder])

    def _load(self, kind: Any, subfolder: str, convert: Any) -> Any:
        if not self.is_single_file:
            return load_part(kind, self.source, subfolder, low_cpu_mem_usage=False)
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


def load_part(kind: Any, folder: str, part: str, **options: Any) -> Any:
    """A model of diffusers or transformers with all its weights, in float32.

    Args:
        kind: the model's class.
        folder: folder or hub id.
        part: the folder in it.
        options: of ``kind.from_pretrained``.

    Raises:
        UserError: the part cannot be read, or weights are missing, which the libraries would fill in at random.
    """
    with reading_part(folder, f"{part}/"):
        model, report = kind.from_pretrained(
            folder, subfolder=part, use_safetensors=True, output_loading_info=True, **options
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"model.source: {folder} ({part}/) lacks {len(missing)} of the weights of a {kind.__name__}, such as"
            f" {missing[0]}: expected all that {part}/config.json describes. Copy the folder again."
        )
    return model.float()  # transformers keeps the dtype of the file


@contextmanager
def reading_part(folder: str, part: str) -> Iterator[None]:
    """Turns what diffusers and transformers raise about a part of a model into a ``UserError`` that names it."""
    try:
        yield
    except SafetensorError as error:
        files = (
            ", ".join(str(file) for file in sorted(Path(folder, part).glob("*.safetensors"))) or f"{folder} ({part})"
        )
        raise UserError(
            f"model.source: {files} cannot be read as safetensors ({error}): expected a whole file, got one that is cut"
            " short or damaged. Copy the file again."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: weights of another shape than the config's
        raise UserError(
            f"model.source: {folder} ({part}) cannot be read: expected diffusers' layout with safetensors weights."
            f" {error} Correct the name, or copy or convert the weights."
        ) from error
