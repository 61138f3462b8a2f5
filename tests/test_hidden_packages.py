"""A hidden package is as one that is not installed, and only while it is hidden."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import pytest

from slicemod.hidden_packages import hidden


def test_a_hidden_package_is_not_installed_and_is_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = version("hatchling")
    for name in [name for name in sys.modules if name.split(".")[0] == "hatchling"]:
        monkeypatch.delitem(sys.modules, name)
    with hidden(["hatchling"]):
        assert find_spec("hatchling") is None
        with pytest.raises(ModuleNotFoundError):
            import_module("hatchling")
        with pytest.raises(PackageNotFoundError):
            version("hatchling")
    assert import_module("hatchling").__name__ == "hatchling"
    assert version("hatchling") == installed


def test_what_is_loaded_already_is_not_hidden() -> None:
    with hidden(["pytest"]):
        assert import_module("pytest") is pytest
        assert version("pytest") == pytest.__version__
