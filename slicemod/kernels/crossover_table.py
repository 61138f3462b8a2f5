"""A table of the sizes from which a kernel is faster than those below it in the list. The choice of a kernel is a pure
function of the call and such a table.

A table is measured on one machine. It is kept as JSON that people can read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from slicemod.call import AttentionShape, CallSpec, dtype_name

FORMAT = 1

# What a call has beside query, key and value. PyTorch's kernels take another time with each of them. A call that has
# more than one counts as the one that comes first here.
EXTRAS = ("dropout", "mask gradient", "mask", "causal", "plain")


class CrossoverTableError(ValueError):
    """A table that cannot be used. The message says what to do."""


class Corner(NamedTuple):
    """The smallest call of a kind that was measured to be faster. A call is larger if all three numbers are.

    Attributes:
        queries: query tokens.
        keys: key tokens.
        products: multiplications of the scores, the product of batch, heads, queries, keys and channels.
    """

    queries: int
    keys: int
    products: int

    def reaches(self, other: Corner) -> bool:
        """Whether this size is at least as large as `other`."""
        return all(own >= least for own, least in zip(self, other, strict=True))


class CallClass(NamedTuple):
    """Calls that have the same corners.

    Attributes:
        kernel: the kernel that may be faster.
        dtype: such as "float32".
        training: with gradients.
        extra: one of `EXTRAS`.
        width: the most channels of a head; None for any number.
    """

    kernel: str
    dtype: str
    training: bool
    extra: str
    width: int | None

    def __str__(self) -> str:
        wide = "any head" if self.width is None else f"heads to {self.width}"
        return f"{self.dtype} {'training' if self.training else 'inference'}, {self.extra}, {wide}"


class Row(NamedTuple):
    """From which sizes on a kernel is faster for one class of calls: from any of the corners on; never without one."""

    calls: CallClass
    faster_from: tuple[Corner, ...]


@dataclass(frozen=True)
class CrossoverTable:
    """From which sizes on each kernel is faster, on one machine.

    Attributes:
        vectors: what the CPU multiplies by, "AVX2", "AVX-512", "AMX" or "NEON"; the bits of a result depend on it.
        processor: its name.
        threads: how many threads it was measured with.
        torch: the version of PyTorch.
        native: the library of the native kernel, whose name is made of its source and compiler.
        measured: the day.
        rows: the classes of calls. Of two that a call belongs to, the first one counts.
    """

    vectors: str
    processor: str
    threads: int
    torch: str
    native: str
    measured: str
    rows: tuple[Row, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.vectors, self.rows)))

    def __hash__(self) -> int:
        return self._hash  # computed once: a table is in the key of every call that is looked up

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.vectors}, measured {self.measured} on {self.processor} with {threads}"

    def is_faster(self, kernel: str, call: CallSpec) -> bool | None:
        """Whether a kernel is faster for a call than those below it; None if the table does not say."""
        dtype, extra, size = dtype_name(call.dtype), extra_of(call.shape), size_of(call.shape)
        width = max(call.shape.head_dim, call.shape.values)
        for calls, faster_from in self.rows:
            if calls[:4] == (kernel, dtype, call.training, extra) and width <= (calls.width or width):
                return any(size.reaches(corner) for corner in faster_from)
        return None

    def as_dict(self) -> dict[str, Any]:
        """The table as JSON has it."""
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _FIELDS},
            "rows": [
                {**row.calls._asdict(), "faster_from": [corner._asdict() for corner in row.faster_from]}
                for row in self.rows
            ],
        }

    def as_json(self) -> str:
        """The table as text, a line for each row."""
        content = self.as_dict()
        rows = ",\n  ".join(json.dumps(row) for row in content.pop("rows"))
        head = json.dumps(content, indent=1).removesuffix("\n}")
        return f'{head},\n "rows": [\n  {rows}\n ]\n}}\n'


_FIELDS = {"vectors": str, "processor": str, "threads": int, "torch": str, "native": str, "measured": str}


def extra_of(shape: AttentionShape) -> str:
    """Which of `EXTRAS` a call has."""
    mask = shape.mask
    there_is = (shape.dropout, mask is not None and mask.has_grad, mask is not None, shape.causal, True)
    return EXTRAS[there_is.index(True)]


def size_of(shape: AttentionShape) -> Corner:
    """The size of a call, as corners tell it."""
    products = shape.batch_heads * shape.queries * shape.keys * shape.head_dim
    return Corner(shape.queries, shape.keys, products)


def read_table(path: Path) -> CrossoverTable:
    """The table in a file.

    Raises:
        CrossoverTableError: there is no such file, or it is not a table of this version.
    """
    try:
        return table_of(json.loads(path.read_text(encoding="utf-8")), str(path))
    except CrossoverTableError as error:
        said = str(error)
    except (OSError, ValueError) as error:
        said = f"{path}: expected a table as `slicemod tune` writes it; got {error}."
    raise CrossoverTableError(f"{said} Run `slicemod tune` to measure a new one, or remove the file.")


def table_of(content: object, where: str) -> CrossoverTable:
    """The table that `CrossoverTable.as_dict` made this of.

    Args:
        content: the dictionary.
        where: where it comes from, for errors.

    Raises:
        CrossoverTableError: it is not one, or of another version.
    """
    if isinstance(content, Mapping) and content.get("format") != FORMAT:
        found = content.get("format")
        raise CrossoverTableError(f"{where}: expected a table of format {FORMAT}; got format {found!r}.")
    given = _checked(content, {"format": int, **_FIELDS, "rows": list}, where)
    rows = tuple(_row_of(row, f"{where}, row {number}") for number, row in enumerate(given["rows"], 1))
    return CrossoverTable(**{name: given[name] for name in _FIELDS}, rows=rows)


def _row_of(content: object, where: str) -> Row:
    kinds = {"kernel": str, "dtype": str, "training": bool, "extra": str, "width": int, "faster_from": list}
    given = _checked(content, kinds, where)
    if given["extra"] not in EXTRAS:
        raise CrossoverTableError(f"{where}: extra: expected one of {', '.join(EXTRAS)}; got {given['extra']!r}.")
    sizes = dict.fromkeys(Corner._fields, int)
    corners = tuple(Corner(**_checked(corner, sizes, f"{where}, faster_from")) for corner in given.pop("faster_from"))
    return Row(CallClass(**given), corners)


def _checked(content: object, kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    """The dictionary, if it has the fields `kinds`, each of its type. Only a width may be None."""
    if not isinstance(content, Mapping) or set(content) != set(kinds):
        got = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise CrossoverTableError(f"{where}: expected the fields {', '.join(kinds)}; got {got or 'none'}.")
    for name, kind in kinds.items():
        value = content[name]
        if type(value) is not kind and not (name == "width" and value is None):
            raise CrossoverTableError(f"{where}: {name}: expected {kind.__name__}; got {value!r}.")
    return dict(content)
