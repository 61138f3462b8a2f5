"""Reading checkpoints safely, and writing safetensors.

Nothing here unpickles code: ``.ckpt`` files are read with ``weights_only=True`` and ``.safetensors`` files hold
tensors only. Whatever is wrong with a file ends as a ``CheckpointError`` that names it.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from slicemod.user_error import UserError
from slicemod.whole_file import replacing

NAMES_SHOWN = 3  # of a list of wrong keys, so that the error stays a paragraph


class CheckpointError(UserError):
    """A checkpoint file that is missing, damaged, unsafe or of another model."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a Lightning checkpoint without running any code that it may contain.

    Returns:
        Lightning's dictionary, its tensors on the CPU; ``"state_dict"`` is in it.

    Raises:
        CheckpointError: the file is missing, cut short, needs code to be unpickled or has no state dict.
    """
    _require_file(path)
    try:
        with warnings.catch_warnings():
            # torch asks for a report where a file is no checkpoint of its own; the refusal below says more
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            with torch.serialization.safe_globals([(_LeftOut, name) for name in _bookkeeping(path)]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: a checkpoint is read as tensors and plain values only, and this file holds other"
            " pickled objects (code that would run on loading) or is no checkpoint at all."
            " Use a checkpoint that `slicemod fit` wrote, or a .safetensors file."
        ) from error
    except Exception as error:  # on bytes that are no checkpoint torch's reader raises what it likes
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: expected a whole file written by torch.save, got"
            f" {Path(path).stat().st_size:,} bytes that end too early, are damaged or are something else. Copy the"
            " file again or use an earlier checkpoint."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(
            f"{path} is no Lightning checkpoint: expected a dictionary with a `state_dict`, got"
            f" {_describe(content)}. Use a checkpoint that `slicemod fit` wrote."
        )
    return content


class _LeftOut:
    """In the place of an object that is not read."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _bookkeeping(path: str | os.PathLike[str]) -> list[str]:
    """What Lightning keeps in a checkpoint beside tensors, by name: of its callbacks, and their numpy numbers.

    Checkpoints of CompVis and Stability hold such objects. ``_LeftOut`` stands for them, and no code of theirs runs.
    """
    if not zipfile.is_zipfile(path):
        return []
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [name for name in named if name.startswith(("pytorch_lightning.", "numpy.")) or name == "_codecs.encode"]


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing, cut short or in another format.
    """
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if os.name == "nt":  # which replaces no file that is still mapped into memory
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}): expected a whole safetensors file, got"
            f" {Path(path).stat().st_size:,} bytes that are not one. Copy the file again, or remove it and let"
            " `slicemod fit` write a new one."
        ) from error


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors as safetensors: the file appears whole under its name or not at all.

    Raises:
        UserError: the folder cannot be made or written.
    """
    whole = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, dict(metadata))
    with replacing(path) as temporary:
        temporary.write_bytes(whole)


def require_finite(tensors: Mapping[str, object], path: str | os.PathLike[str]) -> None:
    """Checks that every tensor of ``tensors``, read from ``path``, holds finite numbers.

    Raises:
        CheckpointError: one does not.
    """
    spoiled = [
        name
        for name, value in tensors.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if spoiled:
        raise CheckpointError(
            f"{path} holds values that are no finite numbers (nan or inf) in {len(spoiled)} of {len(tensors)} tensors:"
            f" {_shortened(spoiled)}. What it was trained to is lost: use an earlier checkpoint."
        )


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Loads a state dict whose keys and shapes are exactly the module's.

    Raises:
        CheckpointError: keys are missing, unexpected, or of another shape, or a value is no finite number; nothing is
            loaded then.
    """
    require_matching(module.state_dict(), state, path, type(module).__name__)
    module.load_state_dict(state)


def require_matching(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str | os.PathLike[str], owner: str
) -> None:
    """Checks that ``state``, read from ``path``, has exactly the keys and shapes of ``own``, and finite values.

    Raises:
        CheckpointError: keys are missing, unexpected, or of another shape, or a value is no finite number.
    """
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} (expected {tuple(own[name].shape)}, got {_shape(tensor)})"
        for name, tensor in state.items()
        if name in own and (not isinstance(tensor, Tensor) or tensor.shape != own[name].shape)
    ]
    problems = [
        f"{len(names)} {what}: {_shortened(names)}"
        for names, what in (
            (missing, "keys are missing"),
            (unexpected, "keys are unexpected"),
            (reshaped, "tensors have another shape"),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit this {owner}: expected its {len(own)} tensors by name and shape, but"
            f" {'; '.join(problems)}. Use the configuration that the file was trained with, or another file."
        )
    require_finite(state, path)


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _require_file(path: str | os.PathLike[str]) -> None:
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "nothing of that name"
        raise CheckpointError(f"The checkpoint {path} cannot be read: expected a file, found {found}. Check the path.")


def _describe(content: object) -> str:
    if isinstance(content, dict):
        return f"one with the keys {_shortened([str(key) for key in content])}" if content else "an empty one"
    return f"a {type(content).__name__}"


def _shortened(names: list[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
