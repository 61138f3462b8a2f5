"""The native kernel for Arm's processors, run by an emulator where this machine is another."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from slicemod.kernels.native.binding import FLOAT_MODE, NativeLibrary, Prepared, _Call
from slicemod.kernels.native.build import SOURCES

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [program for program in (COMPILER, EMULATOR) if shutil.which(program) is None]

_ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class LibraryOnArm(NativeLibrary):
    """The library, each of whose passes an emulated program computes.

    Args:
        folder: where to compile the program, and to write down the calls.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.vector_lanes = folder / "on_arm", 4
        self.modes = dict.fromkeys(_ELEMENTS, FLOAT_MODE)
        source = Path(__file__).with_suffix(".cpp")
        flags = "-O3", "-std=c++17", "-static"
        subprocess.run([COMPILER, *flags, "-I", str(SOURCES), "-o", str(self.path), str(source)], check=True)

    def _prepared(self, name: str, dtype: torch.dtype, call: _Call) -> Prepared:
        def run(*tensors: Tensor | None) -> bool:
            storages = [None if tensor is None else tensor.untyped_storage() for tensor in tensors]
            parts = [
                struct.pack("3q", ("forward", "backward").index(name), _ELEMENTS[dtype], len(tensors)),
                bytes(call),
            ]
            for tensor, storage in zip(tensors, storages, strict=True):
                if tensor is None or storage is None:
                    parts.append(struct.pack("2q", -1, 0))
                    continue
                parts.append(struct.pack("2q", storage.nbytes(), tensor.data_ptr() - storage.data_ptr()))
                parts.append(ctypes.string_at(storage.data_ptr(), storage.nbytes()))
            file = self.path.with_name("call")
            file.write_bytes(b"".join(parts))
            subprocess.run([EMULATOR, str(self.path), str(file)], check=True)
            place, written = len(parts[0]) + len(parts[1]), file.read_bytes()
            for storage in storages:
                place += 16
                if storage is not None:
                    ctypes.memmove(storage.data_ptr(), written[place : place + storage.nbytes()], storage.nbytes())
                    place += storage.nbytes()
            return True

        return run
