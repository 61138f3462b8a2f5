"""Written by `slicemod install webui`, and taken out by `slicemod uninstall webui`.

The code is in slicemod, so that this file need not change when slicemod is upgraded.
"""

import sys

SOURCE = "slicemod"

try:
    from slicemod.integrations.webui.extension import register
except ImportError as error:
    raise ImportError(
        f"slicemod cannot be imported by the Python that the webui runs in, {sys.executable}: {error}. Install it "
        f'there, then restart the webui: "{sys.executable}" -m pip install --no-deps "{SOURCE}" einops'
    ) from error

register()
