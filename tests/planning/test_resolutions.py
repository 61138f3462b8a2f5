"""Resolutions that a model does not take are refused by name."""

from __future__ import annotations

import pytest

from slicemod.planning.resolutions import HIGHEST_RESOLUTION, check_resolutions
from slicemod.user_error import UserError


@pytest.mark.parametrize(("pixels", "nearest"), [(0, 64), (500, 512), (2**14 + 64, 2**14), (-64, 64)])
def test_a_wrong_one_is_named_and_so_is_the_nearest(pixels: int, nearest: int) -> None:
    with pytest.raises(UserError, match=f"^resolution: .*got {pixels}. Take {nearest}."):
        check_resolutions([512, pixels], 64)


def test_only_multiples_of_the_step_will_do() -> None:
    def will_do(pixels: int) -> bool:
        try:
            check_resolutions([pixels], 32)
        except UserError:
            return False
        return True

    assert list(filter(will_do, range(HIGHEST_RESOLUTION + 33))) == list(range(32, HIGHEST_RESOLUTION + 1, 32))
