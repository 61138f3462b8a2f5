"""The arithmetic that the webui's policies share."""

from __future__ import annotations

import pytest

from slicemod.kernels.sliced.webui_policies import square_resolution


@pytest.mark.parametrize(
    ("available", "expected"), [(0.0, 0), (-1e9, 0), (2.5 * 64**4, 512), (2.5 * 64**4 - 1, 448), (2.5 * 128**4, 1024)]
)
def test_square_resolution_is_that_of_the_webui(available: float, expected: int) -> None:
    assert square_resolution(available, 2.5) == expected
