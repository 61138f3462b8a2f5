"""Tensors on disk, named by the digest of what they were computed from."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from slicemod.training.common.checkpoints import CheckpointError, write_safetensors
from slicemod.training.stable_diffusion.content_hash import tensors_digest
from slicemod.user_error import UserError

SEAL = "sha256"  # beside the tensors: the digest of all of them and of the key


class TensorCache:
    """A folder of safetensors files that appear whole or not at all; several processes may fill it at once.

    Each file holds a digest of its key and its tensors, so that a file which was changed, or which belongs to another
    key, is found out.

    Args:
        folder: made at the first write.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """The file of a key, in one of 256 folders so that none grows large."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the entry is there and is what was written; another one is named on stderr, to be written again."""
        if not self.path(key).exists():
            return False
        try:
            self.read(key)
        except CheckpointError as error:
            print(error, file=sys.stderr)
            return False
        return True

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key.

        Raises:
            CheckpointError: there is no such entry, or it is not what was written.
        """
        path = self.path(key)
        try:
            # Read, not mapped: Windows does not let a mapped file be replaced.
            tensors = load(path.read_bytes())
        except Exception as error:  # safetensors raises what it likes on bytes that are none
            raise CheckpointError(
                f"The cached file {path} cannot be read ({error}): expected a whole safetensors file. A run computes it"
                " again when it starts."
            ) from error
        seal = tensors.pop(SEAL, None)
        if seal is None or not torch.equal(seal, _seal(key, tensors)):
            found = ", ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())
            raise CheckpointError(
                f"The cached file {path} holds other tensors than slicemod wrote there: expected those of its"
                f" digest, got {found or 'none'}. A run computes it again when it starts."
            )
        return tensors

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes the tensors, in place of an older entry.

        Raises:
            UserError: the folder cannot be written.
        """
        own = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        try:
            write_safetensors(self.path(key), own | {SEAL: _seal(key, own)}, {})
        except UserError:
            if not self.has(key):
                raise
            # else another process was first: Windows does not let a file that is open be replaced


def _seal(key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The digest of a key and its tensors, (32,) uint8."""
    return torch.tensor(list(bytes.fromhex(tensors_digest(dict(sorted(tensors.items())), key))), dtype=torch.uint8)
