"""A hidden package is as one that is not installed, and only while it is hidden."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import pytest

from slicemod.hidden_packages import hidden


def test_a_hidden_package_is_not_installed_and_is_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = version("iniconfig")
    for name in [name for name in sys.modules if name.split(".")[0] == "iniconfig"]:
        monkeypatch.delitem(sys.modules, name)
    with hidden(["iniconfig"]):
        assert find_spec("iniconfig") is None
        with pytest.raises(ModuleNotFoundError):
            import_module("iniconfig")
        with pytest.raises(PackageNotFoundError):
            version("iniconfig")
    assert import_module("iniconfig").__name__ == "iniconfig"
    assert version("iniconfig") == installed


def test_what_is_loaded_already_is_not_hidden() -> None:
    with hidden(["pytest"]):
        assert import_module("pytest") is pytest
        assert version("pytest") == pytest.__version__
