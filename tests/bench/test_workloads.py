"""Works: their modules share weights, their oracle is exact, their figures are those of what is run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slicemod.bench.peers import FULL, SDPA
from slicemod.bench.workloads import LayerWork, UnetWork, find_works
from slicemod.user_error import UserError
from tests.bench.tiny import CALL, CROSS, SELF, every_work, write_unet


def test_flops_count_projections_and_attention() -> None:
    # to_q and to_out on 53 queries, to_k and to_v on 7 tokens of 19 channels, two products of 53 x 7 over 26 channels
    forward = 2 * 2 * (2 * 53 * 26 * 26 + 2 * 7 * 19 * 26 + 2 * 53 * 7 * 26)
    assert CROSS.flops(training=False) == forward
    assert CROSS.flops(training=True) == 3 * forward
    assert CALL.flops(training=False) == 4 * 2 * 61 * 61 * 11


def test_what_float64_says_is_what_every_row_gives(tmp_path: Path) -> None:
    for work in every_work(tmp_path):
        base, inputs = work.build().double(), tuple(_double(given) for given in work.inputs())
        module = work.computed_by(FULL, base)
        assert module is not None
        checks = work.exact(base, inputs)
        assert checks
        for check in checks:
            with torch.no_grad():
                found = module.get_submodule(check.path)(*check.args)
            assert check.wanted.dtype == torch.float64
            torch.testing.assert_close(found[..., check.rows, :], check.wanted, rtol=1e-9, atol=1e-9)


def _double(given: object) -> object:
    if isinstance(given, dict):
        return {name: tensor.double() for name, tensor in given.items()}
    return given.double() if isinstance(given, torch.Tensor) and given.is_floating_point() else given


def test_a_unet_is_checked_at_one_layer_of_each_kind(tmp_path: Path) -> None:
    work = UnetWork(str(write_unet(tmp_path / "unet")), 64, 1)
    checks = work.exact(work.build(), work.inputs())
    assert sorted((check.args[0].shape[1], check.args[-1].shape[1]) for check in checks) == [
        (16, 16), (16, 77), (64, 64), (64, 77)
    ]  # fmt: skip
    assert (
        sum(count for _, count in work.attention()) == 2 * 7
    )  # two down, one in the middle, four up, each self and text


def test_peers_share_the_weights_of_a_unet(tmp_path: Path) -> None:
    work = UnetWork(str(write_unet(tmp_path / "unet")), 64, 1)
    base = work.build()
    one, other = work.computed_by(SDPA, base), work.computed_by(FULL, base)
    assert one is not None
    assert other is not None
    places = [[parameter.data_ptr() for parameter in module.parameters()] for module in (base, one, other)]
    assert places[0] == places[1] == places[2]


def test_scores_are_those_of_all_layers_in_training_and_of_the_largest_otherwise() -> None:
    assert SELF.scores_bytes(2, training=False) == SELF.scores_bytes(2, training=True) == 2 * 67 * 67 * 2
    unet = UnetWork("sd15", 512, 1)
    largest = 8 * 4096 * 4096 * 4
    assert unet.scores_bytes(4, training=False) == largest
    assert unet.scores_bytes(4, training=True) > 5 * largest


def test_layers_of_a_model_are_found_at_every_resolution() -> None:
    works = find_works(["sd15-layers", "sdxl-unet"], [512, 1024], batch=2, largest=3)
    layers = [work for work in works if isinstance(work, LayerWork)]
    assert [(work.queries, work.channels, work.context) for work in layers] == [
        (4096, 320, None), (16384, 320, None), (1024, 640, None), (4096, 640, None), (4096, 320, (77, 768)),
        (16384, 320, (77, 768)),
    ]  # fmt: skip
    assert works[-1] == UnetWork("sdxl", 1024, 2)
    assert works[0].name == "sd15 8x40 self at 1/8, 512 px"


def test_no_two_layers_have_the_same_name() -> None:
    works = find_works(["sd15-layers", "sdxl-layers"], [512, 1024], batch=1, largest=99)
    names = [work.name for work in works]
    assert len(names) > 20
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize(
    ("names", "sizes", "named"),
    [
        (["sd15"], [512], "--work: expected such as sd15-layers.*got 'sd15'"),
        (["sd16-unet"], [512], "sd16"),
        (["sd15-unet"], [500], "--resolution: expected multiples of 64.*got 500"),
    ],
)
def test_what_does_not_exist_is_named(names: list[str], sizes: list[int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        find_works(names, sizes, batch=1, largest=4)
