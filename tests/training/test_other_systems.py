"""What Windows lacks is not needed to import slicemod."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib, pkgutil, signal, sys
import lightning.pytorch, peft, torch  # others, which know another system by other signs than these names
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoModel, CLIPTextModel, CLIPTokenizer
del signal.SIGUSR1
sys.modules["resource"] = None  # an import of it is an ImportError
import slicemod
names = [module.name for module in pkgutil.walk_packages(slicemod.__path__, "slicemod.")]
names.remove("slicemod.adapters.sgm")  # needs Stability's package, which is on no registry
names.remove("slicemod.integrations.webui.extension_script")  # runs inside of the webui as it is imported
for name in names:
    importlib.import_module(name)
from slicemod.training.common import step_meter, stop_signals
assert step_meter._peak_resident() == {}
assert [number.name for number in stop_signals.SIGNALS] == ["SIGINT", "SIGTERM"]
print(len(names))
"""


@pytest.mark.slow
def test_every_module_can_be_imported_without_the_names_that_only_unix_has() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80
