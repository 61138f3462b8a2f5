"""Tensors on disk, named by the digest of what they were computed from."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from slicemod.training.checkpoints import CheckpointError, read_safetensors, write_safetensors


class TensorCache:
    """A folder of safetensors files that appear whole or not at all; several processes may fill it at once.

    Args:
        folder: made at the first write.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """The file of a key, in one of 256 folders so that none grows large."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the entry is there and can be read; a damaged one is removed and named on stderr."""
        if not self.path(key).exists():
            return False
        try:
            self.read(key)
        except CheckpointError as error:
            print(f"{error} It is computed again.", file=sys.stderr)
            self.path(key).unlink()
            return False
        return True

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key.

        Raises:
            CheckpointError: there is no such entry, or it is damaged.
        """
        return read_safetensors(self.path(key))[0]

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes the tensors, in place of an older entry.

        Raises:
            UserError: the folder cannot be written.
        """
        write_safetensors(self.path(key), {name: tensor.cpu() for name, tensor in tensors.items()}, {})
