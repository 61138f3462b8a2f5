"""The YAML files of a configuration: which there are, and that each says one thing, once, and in a bounded size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from slicemod.user_error import UserError

MOST_VALUES = 100_000  # of one file with its aliases written out; a configuration has some hundred
DEEPEST = 100


def config_files(arguments: Sequence[str]) -> list[str]:
    """The files that `--config` names, in order."""
    return options(arguments, "--config", "-c")


def options(arguments: Sequence[str], *names: str) -> list[str]:
    """The values that a command line gives to an option, in order."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    found = []
    for option, after in pairs:
        name, equals, value = option.partition("=")
        if name in names:
            found.append(value if equals else after)
    return found


def read_configs(files: Sequence[str]) -> dict[str, Any]:
    """The configurations merged as they are, later ones over earlier ones, without classes or types.

    A file that cannot be read or is no YAML is left out here: the parser names it.

    Raises:
        UserError: a file says a key twice, or is larger than any configuration.
    """
    merged: dict[str, Any] = {}
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
            require_plain_yaml(text, file)
            content = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(content, dict):
            merged = _merged(merged, content)
    return merged


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def require_plain_yaml(text: str, name: str) -> None:
    """Checks a YAML text before anything builds its values.

    Args:
        text: of a file, or of a value on the command line.
        name: what to call it in the error.

    Raises:
        UserError: a key stands twice in one block, or the aliases multiply into more than a configuration needs.
        yaml.YAMLError: it is no YAML.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _count_values(root, name, {}, 0)
    except RecursionError as error:
        raise _too_large(name, f"blocks nested deeper than {DEEPEST}") from error


def _count_values(node: yaml.Node, name: str, counted: dict[int, int], depth: int) -> int:
    """Values that the node stands for, with each alias counted again; checks the keys on the way."""
    if id(node) in counted:
        return counted[id(node)]
    if depth > DEEPEST:
        raise _too_large(name, f"blocks nested deeper than {DEEPEST}")
    counted[id(node)] = MOST_VALUES + 1  # what holds itself has no end
    count = 1
    if isinstance(node, yaml.MappingNode):
        _require_distinct(node, name)
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for part in child if isinstance(child, tuple) else (child,):
            count += _count_values(part, name, counted, depth + 1)
    if count > MOST_VALUES:
        raise _too_large(name, f"more than {MOST_VALUES:,} values once its aliases (*name) are written out")
    counted[id(node)] = count
    return count


def _require_distinct(node: yaml.MappingNode, name: str) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        if (key.tag, key.value) in lines:
            raise UserError(
                f"{name}: the key {key.value!r} in line {line} was given in line {lines[key.tag, key.value]} already:"
                " expected each key of a block once. Remove one of the two."
            )
        lines[key.tag, key.value] = line


def _too_large(name: str, what: str) -> UserError:
    return UserError(f"{name} is no configuration: got {what}. Write out what the run needs.")
