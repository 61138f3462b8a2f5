"""What the extension does when a webui loads it."""

from __future__ import annotations

from importlib import import_module

from slicemod.integrations.webui import forge, optimization


def register() -> None:
    """Register slicemod with the webui that this runs in: AUTOMATIC1111's, or Forge.

    Raises:
        RuntimeError: it is neither.
    """
    if hasattr(import_module("modules.sd_hijack"), "list_optimizers"):
        optimization.register()
        return
    try:
        import_module("backend.attention")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "slicemod: expected AUTOMATIC1111's webui, with list_optimizers in modules.sd_hijack, or Forge, with "
            f"backend.attention; got neither ({error}). Take the folder out by `slicemod uninstall webui PATH`."
        ) from error
    forge.register()
