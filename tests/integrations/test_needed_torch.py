from __future__ import annotations

import re

import pytest

from slicemod.integrations import needed_torch
from slicemod.integrations.needed_torch import ensure_torch_is_new_enough

NEEDS = ["einops>=0.8", "torch>=2.9", "torchmetrics>=1.6; extra == 'train'"]


@pytest.mark.parametrize(
    ("installed", "above"), [("2.9.0", "2.10"), ("2.10.1+cu128", "2.11"), ("3.0.0a0+git1234", "3.1")]
)
def test_a_pytorch_is_new_enough_for_any_version_up_to_its_own(installed: str, above: str) -> None:
    ensure_torch_is_new_enough(installed, NEEDS)
    with pytest.raises(ImportError, match=re.escape(f"expected version {above} or newer; got {installed}")):
        ensure_torch_is_new_enough(installed, [f"torch>={above}"])


@pytest.mark.parametrize("installed", ["2.3.1+cu121", "2.8.0", "1.13.1", "none"])
def test_an_older_pytorch_is_named_with_what_is_needed(installed: str) -> None:
    with pytest.raises(ImportError) as raised:
        ensure_torch_is_new_enough(installed, NEEDS)
    assert str(raised.value) == f"PyTorch: expected version 2.9 or newer; got {installed}. Update PyTorch there"


def test_what_is_left_out_is_asked_of_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_torch_is_new_enough()  # as it is, it will do
    monkeypatch.setattr(needed_torch, "version", {"torch": "2.8.0"}.__getitem__)
    monkeypatch.setattr(needed_torch, "requires", {"slicemod": NEEDS}.__getitem__)
    with pytest.raises(ImportError, match=r"expected version 2\.9 or newer; got 2\.8\.0"):
        ensure_torch_is_new_enough()
