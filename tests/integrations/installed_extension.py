"""slicemod's extension in a webui's folder, for as long as a test runs there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from slicemod.cli import main
from slicemod.integrations.programs import PROGRAMS


@contextmanager
def loaded_extension(folder: str) -> Iterator[None]:
    """Install it, and let the webui find and load it. An extension that was there before stays afterwards."""
    was_there = (Path(folder) / PROGRAMS["webui"].folder).exists()
    assert main(["install", "webui", folder]) == 0
    try:
        import_module("modules.extensions").list_extensions()
        import_module("modules.scripts").load_scripts()
        import_module("modules.script_callbacks").ui_settings_callback()
        yield
    finally:
        if not was_there:
            assert main(["uninstall", "webui", folder]) == 0
