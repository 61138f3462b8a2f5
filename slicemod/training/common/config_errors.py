"""What is wrong with a configuration, found again in words of the configuration.

jsonargparse tries every type that a value may have and reports what each of them said; of that one line is the cause.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from importlib import import_module
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

BLOCK = ("class_path", "init_args", "dict_kwargs")
FIRST = ((Optimizer, "params"), (LRScheduler, "optimizer"))  # arguments that the program gives


def find_cause(error: str, given: Mapping[str, Any], arguments: Sequence[str], groups: Mapping[str, type]) -> str:
    """The part of the parser's message that a reader can act on, or all of it.

    Args:
        error: the parser's message.
        given: the configuration files as they were written.
        arguments: the command line, whose options come over them.
        groups: the class behind each top-level block.
    """
    given = _with_options(given, arguments)
    for place, block in _class_blocks(given, ""):
        if wrong := _fault(place, block):
            return wrong
    for name, kind in groups.items():
        unknown = [key for key in given.get(name) or {} if key not in known_keys(kind)]
        if unknown and isinstance(given.get(name), Mapping):
            return _unknown(name, unknown, known_keys(kind), kind.__name__)
    return _innermost(error) or " ".join(error.split())


def _innermost(error: str) -> str | None:
    """What the parser says of the value inside a block that it could not take."""
    keys = re.findall(r'Parser key "([^"]+)"', error)
    if len(keys) < 2:
        return None
    inner = error.rpartition(f'Parser key "{keys[-1]}"')[2]
    value = re.search(r"Given value: ([^\n]+?)(?:\. Got value.*)?$", inner, flags=re.MULTILINE)
    single = re.search(r"Expected a <class '([\w.]+)'>\. Got value: ([^\n]+)", inner)
    if single:
        return f"{keys[0]}: {keys[-1]} cannot be {single[2].strip()!r}: expected {single[1]}"
    return f"{keys[0]}: {keys[-1]} cannot be {value[1].strip()!r}: expected {_expected(inner)}" if value else None


def _with_options(given: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    changed: dict[str, Any] = deepcopy(dict(given))
    for option, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = option.partition("=")
        *blocks, last = name.removeprefix("--").split(".")
        if not (option.startswith("--") and blocks):
            continue
        place: Any = changed
        for block in blocks:
            place = place.setdefault(block, {}) if isinstance(place, dict) else None
        if isinstance(place, dict):
            if "class_path" in place and last not in BLOCK:
                place = place.setdefault("init_args", {})
            try:
                place[last] = yaml.safe_load(value if equals else after)
            except yaml.YAMLError:
                place[last] = value if equals else after
    return changed


def _expected(error: str) -> str:
    subtypes = re.findall(r"Subtypes: \[([^\n]*)\]", error)
    names = re.findall(r"(?:class '|^|, )([\w.]+)'?", subtypes[-1]) if subtypes else []
    return " or ".join(name for name in names if name != "class") or "another type of value"


def _class_blocks(value: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield place, value
        for key, part in value.items():
            yield from _class_blocks(part, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _class_blocks(part, f"{place}[{number}]")


def _fault(place: str, block: Mapping[str, Any]) -> str | None:
    path = str(block["class_path"])
    if beside := [str(key) for key in block if key not in BLOCK]:
        return (
            f"{place}: unknown key {', '.join(map(repr, beside))} beside class_path: expected {', '.join(BLOCK)}."
            " Arguments of the class stand under init_args"
        )
    module, dot, name = path.rpartition(".")
    if not dot:
        return None  # a short name, which the parser looks up
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        return f"{place}.class_path: {path} is not there to be imported: {error}"
    arguments = block.get("init_args") or {}
    if not (isinstance(kind, type) and isinstance(arguments, Mapping)):
        return None
    known = known_keys(kind)
    unknown = [str(key) for key in arguments if key not in known]
    return _unknown(f"{place}.init_args", unknown, known, path) if unknown else None


def _unknown(place: str, unknown: Sequence[str], known: Sequence[str], kind: str) -> str:
    keys = ", ".join(map(repr, unknown))
    return f"{place}: unknown key {keys} of {kind}: known are {', '.join(known)}"


def named_numbers(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """Every number with a fraction of a parsed configuration, by its place."""
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, Namespace | Mapping):
        for key, part in vars(value).items() if isinstance(value, Namespace) else value.items():
            yield from named_numbers(part, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from named_numbers(part, f"{place}[{number}]")


def known_keys(kind: type) -> list[str]:
    """What a configuration may give to a class."""
    added = ArgumentParser(exit_on_error=False).add_class_arguments(kind, "block", fail_untyped=False)
    names = {name.removeprefix("block.").partition(".")[0] for name in added}
    return sorted(names - {name for base, name in FIRST if issubclass(kind, base)})
