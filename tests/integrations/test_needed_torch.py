from __future__ import annotations

import pytest

from slicemod.integrations.needed_torch import ensure_torch_is_new_enough

NEEDS = ["einops>=0.8", "torch>=2.9", "torchmetrics>=1.6; extra == 'train'"]


@pytest.mark.parametrize("installed", ["2.9.0", "2.10.1+cu128", "3.0.0a0+git1234"])
def test_a_newer_pytorch_is_new_enough(installed: str) -> None:
    ensure_torch_is_new_enough(installed, NEEDS)


@pytest.mark.parametrize("installed", ["2.3.1+cu121", "2.8.0", "1.13.1", "none"])
def test_an_older_pytorch_is_named_with_what_is_needed(installed: str) -> None:
    with pytest.raises(ImportError) as raised:
        ensure_torch_is_new_enough(installed, NEEDS)
    assert str(raised.value) == f"PyTorch: expected version 2.9 or newer; got {installed}. Update PyTorch there"


def test_this_python_has_a_pytorch_that_is_new_enough() -> None:
    ensure_torch_is_new_enough()
