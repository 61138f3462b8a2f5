"""Written by `slicemod install webui`, and taken out by `slicemod uninstall webui`.

The code is in slicemod, so that this file need not change when slicemod is upgraded.
"""

import sys

SOURCE = "slicemod"

try:
    from slicemod.integrations.needed_torch import ensure_torch_is_new_enough

    ensure_torch_is_new_enough()
    from slicemod.integrations.webui.extension import register
except ImportError as error:
    raise ImportError(
        f"slicemod cannot be imported by the Python that the webui runs in, {sys.executable}: {error}. What installs "
        f'it there, before the webui is started again: "{sys.executable}" -m pip install --no-deps "{SOURCE}" einops'
    ) from error

register()
