"""Which table the kernels of this process are chosen by.

This is the first of these:

1. the table that a program gives by `using_table`, as a resumed training does with its checkpoint's;
2. what the environment variable `SLICEMOD_TABLE` names: a file, or "built-in";
3. the table that `slicemod tune` measured on this machine, with these versions and as many threads;
4. the built-in table for what the CPU multiplies by, in `native/tables/`.

The last three are looked up once, at the first question. Without the native kernel's library there is nothing to
choose, and the table is empty. On Arm, where nothing was measured, the built-in table is empty too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from slicemod.kernels.crossover_table import CrossoverTable, CrossoverTableError, read_table
from slicemod.kernels.native.binding import TILED_MODE, NativeLibrary
from slicemod.kernels.native.build import native_library

TABLE_VARIABLE, BUILT_IN = "SLICEMOD_TABLE", "built-in"
NO_TABLE = CrossoverTable("none", "none", 0, torch.__version__, "none", "never", ())

_TABLES = Path(__file__).parent / "native" / "tables"
_FILES = {"AVX2": "avx2.json", "AVX-512": "avx512.json", "AMX": "amx.json"}


class TableInUse(NamedTuple):
    """A table, and where it comes from.

    Attributes:
        table: the table.
        source: "built-in", or the file, or who gave it.
    """

    table: CrossoverTable
    source: str


_given: TableInUse | None = None


def table_in_use() -> TableInUse:
    """The table that calls on this machine's CPU are chosen by.

    Raises:
        CrossoverTableError: the file that it should be read from cannot be used.
    """
    return _given or machine_table()


def table_for(device: torch.device) -> CrossoverTable:
    """The table for calls on a device. Nothing was measured on GPUs."""
    return table_in_use().table if device.type == "cpu" else NO_TABLE


def given_table() -> CrossoverTable | None:
    """The table of `using_table`. Outside of it the table is always the same one."""
    return None if _given is None else _given.table


def table_used() -> TableInUse | None:
    """The table that this process has chosen a kernel by, or will; None if it did not ask for one yet."""
    return _given or (machine_table() if machine_table.cache_info().currsize else None)


@contextmanager
def using_table(table: CrossoverTable, source: str) -> Iterator[None]:
    """Has all threads choose by this table, within a `with` block. What was compiled before stays as it is."""
    global _given  # one for all threads: results must not depend on the thread
    before, _given = _given, TableInUse(table, source)
    try:
        yield
    finally:
        _given = before


@lru_cache(maxsize=1)
def machine_table() -> TableInUse:
    """The table of this machine: the one that the user pinned, else the one that was measured, else the built-in one.

    Raises:
        CrossoverTableError: the file cannot be used.
    """
    library = native_library()
    if library is None:
        return TableInUse(NO_TABLE, "no native kernel, no table")
    return find_table(library, os.environ.get(TABLE_VARIABLE, ""), torch.get_num_threads())


def find_table(library: NativeLibrary, pinned: str, threads: int) -> TableInUse:
    """The table for a library.

    Args:
        library: of the native kernel.
        pinned: "built-in", or a file; empty to look for what was measured.
        threads: how many threads there are.

    Raises:
        CrossoverTableError: the file cannot be used.
    """
    measured = measured_file(library, threads)
    if pinned == BUILT_IN or not (pinned or measured.exists()):
        return TableInUse(built_in_table(library), BUILT_IN)
    path = Path(pinned) if pinned else measured
    table = read_table(path)
    if table.vectors != vectors_of(library):
        raise CrossoverTableError(
            f"{path}: expected a table for {vectors_of(library)}, which this CPU multiplies by; got one for "
            f"{table.vectors}. Set {TABLE_VARIABLE}={BUILT_IN}, or to a table of this machine."
        )
    return TableInUse(table, str(path))


def measured_file(library: NativeLibrary, threads: int) -> Path:
    """Where the table lies that was measured on this machine: beside the library, whose name says the processor, the
    compiler and the source."""
    return library.path.with_name(f"{library.path.stem}-torch-{torch.__version__}-threads-{threads}.json")


def vectors_of(library: NativeLibrary) -> str:
    """What the library multiplies by, as tables name it."""
    if library.vector_lanes < 16:
        return "AVX2" if library.vector_lanes == 8 else "NEON"
    return "AMX" if library.modes[torch.bfloat16] == TILED_MODE else "AVX-512"


def built_in_table(library: NativeLibrary) -> CrossoverTable:
    """The table that slicemod comes with."""
    return _built_in(vectors_of(library))


@lru_cache
def _built_in(vectors: str) -> CrossoverTable:
    return read_table(_TABLES / _FILES[vectors]) if vectors in _FILES else replace(NO_TABLE, vectors=vectors)
