"""What older versions of PyTorch cannot do themselves, for the tests that need it."""

from __future__ import annotations

import pytest
import torch


def _since(version: str, what: str) -> pytest.MarkDecorator:
    reason = f"PyTorch {torch.__version__} cannot do this, {version} can: {what}"
    return pytest.mark.skipif(torch.__version__ < version, reason=reason)


enters_objects_in_graphs = _since("2.14", "enter a context manager, made outside of the graph, in it")
refuses_masks_of_causal_calls = _since("2.14", "refuse a mask together with is_causal on a CPU")
exports_forwards_that_are_objects = _since("2.11", "export strictly where the forward of a module is no plain function")
