"""Small configurations of diffusers' model classes, from diffusers' own tests."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin

Made = Callable[[], dict[str, Any]]
TIME = torch.tensor([3.0])  # a step of the schedule, which many models are called with
_PACKAGE = "diffusers_own_tests"  # the name of the checkout's folder `tests` here, where `tests` is slicemod's own


@dataclass(frozen=True)
class Configuration:
    """One way to build a model class, and what to call it with.

    Attributes:
        name: the class of diffusers' tests that it is from; the model class's own name for one of slicemod's.
        model_class: the class, or a function that makes a model.
        arguments: makes what the class is built with.
        inputs: makes what the model is called with, the same each time.
    """

    name: str
    model_class: Any
    arguments: Made
    inputs: Made


def model_classes() -> dict[str, type]:
    """diffusers' public model classes by name, but for bases."""
    public = {name: getattr(diffusers, name, None) for name in dir(diffusers)}
    return {
        name: kind
        for name, kind in public.items()
        if isinstance(kind, type) and issubclass(kind, ModelMixin) and kind is not ModelMixin
    }


def own_configurations(checkout: Path) -> tuple[list[Configuration], dict[str, str]]:
    """The configurations in `tests/models` of a checkout of diffusers.

    Returns:
        The configurations, and the files of tests that could not be imported, with the reason.
    """
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(checkout / "tests")]
    sys.modules[_PACKAGE] = package
    found: dict[str, Configuration] = {}
    failed: dict[str, str] = {}
    for path in sorted((checkout / "tests" / "models").rglob("test_*.py")):
        dotted = ".".join((_PACKAGE, *path.relative_to(checkout / "tests").with_suffix("").parts))
        try:
            with _without_packages_of_tests():
                module = importlib.import_module(dotted)
        except (ImportError, AttributeError, RuntimeError) as error:  # of what this version of diffusers lacks
            failed[path.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        for configuration in _in_module(module):
            found.setdefault(configuration.name, configuration)
    torch.use_deterministic_algorithms(False)  # which the imported files turn on
    return list(found.values()), failed


def _in_module(module: types.ModuleType) -> Iterator[Configuration]:
    """Classes that say what to build and call themselves, and not by a class that they inherit from."""
    for name, kind in vars(module).items():
        own = isinstance(kind, type) and kind.__module__ == module.__name__
        if own and {"get_init_dict", "get_dummy_inputs"} <= vars(kind).keys():
            tests = kind()
            yield Configuration(name, tests.model_class, tests.get_init_dict, tests.get_dummy_inputs)


@contextmanager
def _without_packages_of_tests() -> Iterator[None]:
    """Packages that only tests use, which are not run here, need not be installed to import the files."""
    missing = [name for name in ("datasets", "parameterized", "requests_mock") if find_spec(name) is None]
    for name in missing:
        module: Any = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__getattr__ = _anything
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def _anything(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything()


class _Anything:
    """What a file of tests may use of a package while it is imported: decorators that change nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return lambda test: test

    def __getattr__(self, name: str) -> Any:
        return _anything(name)
