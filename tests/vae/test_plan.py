"""Plans of strips: they fit the budget, take no more than helps, and count what is held."""

from __future__ import annotations

import pytest

from slicemod.plan import NotEnoughMemoryError
from slicemod.vae.plan import Convolving, LayerSizes, plan_strips

DECODER = [
    LayerSizes("convolution", 4, 512),
    LayerSizes("resnet", 512, 512),
    LayerSizes("whole", 512, 512),
    LayerSizes("upsample", 512, 512),
    LayerSizes("resnet", 512, 256),
    LayerSizes("upsample", 256, 256),
    LayerSizes("resnet", 256, 128),
    LayerSizes("resnet", 128, 128),
    LayerSizes("convolution", 128, 3),
]
FLOAT32 = Convolving(4)


def test_the_budget_names_how_tall_the_strips_are() -> None:
    rows = [plan_strips(DECODER, (1, 61, 67), FLOAT32, budget * 2**20).rows for budget in (4, 8, 12)]
    assert rows[0][-2] < rows[1][-2] < rows[2][-2]
    for budget in (4, 8, 12):
        assert plan_strips(DECODER, (1, 61, 67), FLOAT32, budget * 2**20).strip_bytes <= budget * 2**20


def test_no_more_is_taken_than_runs_at_full_speed() -> None:
    plan = plan_strips(DECODER, (1, 256, 256), Convolving(2), 2**40)
    assert plan == plan_strips(DECODER, (1, 256, 256), Convolving(2), 2**30)
    assert plan.strip_bytes < plan_strips(DECODER, (1, 256, 256), Convolving(2, "cuda"), 2**40).strip_bytes


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_decoder_peaks_where_the_channels_are_halved_at_full_size(itemsize: int) -> None:
    plan = plan_strips(DECODER, (1, 512, 512), Convolving(itemsize), 2**40)
    activation = 128 * 2048 * 2048 * itemsize
    assert 0 < plan.peak_bytes - 3 * activation <= plan.strip_bytes + 9 * 128 * 256 * itemsize


def test_attention_sees_the_whole_image_and_the_last_strips_end_with_it() -> None:
    plan = plan_strips(DECODER, (1, 13, 7), FLOAT32, 2**21)
    assert plan.rows[2] == 13
    assert max(plan.rows) <= 4 * 13


def test_further_items_take_their_output_alone() -> None:
    one, three = (plan_strips(DECODER, (items, 61, 67), FLOAT32, 2**24) for items in (1, 3))
    assert three.rows == one.rows
    assert three.peak_bytes - one.peak_bytes == 2 * 3 * (4 * 61) * (4 * 67) * 4


def test_odd_sizes_shrink_as_the_convolution_shrinks_them() -> None:
    plan = plan_strips([LayerSizes("downsample", 3, 5)], (1, 31, 29), FLOAT32, 2**30)
    assert plan.rows == (15,)


def test_a_budget_below_a_row_is_an_error() -> None:
    with pytest.raises(NotEnoughMemoryError, match="for resnet of 256 channels and 268 pixels a row"):
        plan_strips(DECODER[6:], (1, 244, 268), FLOAT32, 2**20)
