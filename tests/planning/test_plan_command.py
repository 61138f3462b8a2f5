"""`slicemod plan`: tables, JSON, the picture and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slicemod import AttentionShape, plan_slices
from slicemod.planning.plan_command import run
from slicemod.user_error import UserError

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.yaml")
STEP = ["--policy", "exact", "--kernel", "math", "--part", "unet"]
QUICK = [DIGITS, "--resolution", "256", "512", "--memory", "64MiB", *STEP]


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["plan", *arguments, "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def test_every_layer_has_the_plan_of_plan_slices(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _json(capsys, *QUICK, "--train")
    assert [step["pixels"] for step in printed["resolutions"]] == [256, 512]
    step = printed["resolutions"][0]
    for layer in step["layers"]:
        plan = plan_slices(AttentionShape(**layer["shape"]), step["budget"], policy="exact", training=True)
        assert layer["plan"]["peak_bytes"] == plan.peak_bytes <= step["budget"]
        assert (layer["plan"]["axis"], layer["plan"]["steps"]) == (plan.axis, plan.steps)


def test_parts_add_up_to_the_peak(capsys: pytest.CaptureFixture[str]) -> None:
    training = _json(capsys, *QUICK, "--train")["resolutions"][0]["peaks"]["fused"]
    inference = _json(capsys, *QUICK, "--batch", "1")["resolutions"][0]["peaks"]["fused"]
    for peak in (training, inference):
        assert peak.pop("total") == sum(peak.values())
    assert training["optimizer"] == 2 * training["weights"] == 2 * inference["weights"]
    assert inference["optimizer"] == inference["gradients"] == 0


def test_slices_reach_further_than_full_attention(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _json(capsys, *QUICK)
    limits = printed["largest_resolution"]
    assert 0 < limits["full attention"] < limits["slicemod"]
    assert (printed["batch"], printed["memory"], printed["training"]) == (2, 2**26, False)
    assert _json(capsys, *QUICK, "--train")["batch"] == 1


def test_the_tables_show_shapes_plans_and_the_whole_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *QUICK, "--train", "--batch", "2", "--memory", "256MiB"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "on cuda (simulated)",
        "8 x 1024 x 1024 x 16",
        "B*H x N x M x D",
        "query",
        "gradients   optimizer",
        "full attention",
        "largest square image within 256.0 MiB, slicemod: ",
        "256 x 256: the rest of the step leaves attention a budget of",
    ):
        assert expected in printed


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *QUICK, "--resolution", "4096"]) == 0
    printed = capsys.readouterr().out
    assert "none fits" in printed
    assert "4096 x 4096: memory: expected more than" in printed


def test_a_device_without_a_known_fused_kernel_is_planned_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *QUICK, "--device", "mps"]) == 0
    assert "fused: it is not known whether PyTorch has a fused kernel on mps" in capsys.readouterr().out


@pytest.mark.slow
def test_sdxl_is_planned_at_4096(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _json(capsys, "sdxl", "--resolution", "4096", "--memory", "16GiB", "--part", "unet")
    (step,) = printed["resolutions"]
    assert step["layers"][0]["shape"]["queries"] == (4096 // 16) ** 2
    assert step["peaks"]["slicemod"]["total"] <= 2**34 < step["peaks"]["full attention"]["total"]


def test_the_readmes_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    assert run(["plan", "sd15", "--memory", "8GiB", "--plot", str(picture)]) == 0
    assert "largest square image within 8.00 GiB" in capsys.readouterr().out
    committed = Path(__file__).parents[2] / "docs" / "images" / "plan.png"
    for path in (picture, committed):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.read_bytes()[16:24] == picture.read_bytes()[16:24]  # the same width and height


def test_of_a_prepared_whole_the_unet_alone_takes_less(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [DIGITS, "--resolution", "32", "--memory", "64MiB", "--device", "cpu", "--dtype", "float32"]
    plain, prepared = (_json(capsys, *asked, *more)["resolutions"][0]["parts"] for more in ([], ["--prepared"]))
    changed = [part["name"] for part, other in zip(plain, prepared, strict=True) if part != other]
    assert changed == ["UNet, a step"]
    assert run(["plan", *asked, "--prepared"]) == 0
    assert "float32, on cpu (simulated), prepared; slicemod:" in " ".join(capsys.readouterr().out.split())


def test_the_whole_names_the_part_that_limits(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _json(capsys, "sd15", "--resolution", "512", "2048")
    assert (printed["part"], printed["dtype"], printed["batch"], printed["memory"]) == ("whole", "float16", 2, 2**33)
    small, large = printed["resolutions"]
    assert [part["name"] for part in small["parts"]] == ["text encoder", "UNet, a step", "VAE decoding"]
    for plan in (small, large):
        for way, whole in plan["whole"].items():
            totals = {
                part["name"]: part["weights"] + part["stays_loaded"] + part["peaks"][way] for part in plan["parts"]
            }
            assert whole["peak"] == max(totals.values())
            assert whole["limit"] == max(totals, key=lambda name: totals[name])
            assert whole["fits"] == (whole["peak"] <= 2**33)
    limits = printed["largest_image"]
    assert limits["full attention"]["limit"] == "UNet, a step"
    assert limits["fused"]["limit"] == "VAE decoding"  # the UNet alone would go through with 3584 pixels
    assert limits["full attention"]["pixels"] < limits["fused"]["pixels"] < 3584


def test_the_tables_of_the_whole_begin_with_the_largest_image(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", DIGITS, "--resolution", "256", "--memory", "64MiB", "--offload", "model"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    expected = ["offload model", "largest square image within 64.0 MiB", "VAE decoding", "stays loaded", "the most at"]
    places = [printed.index(text) for text in expected]
    assert places == sorted(places)


def test_a_transformer_is_planned_as_its_pipeline_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _json(capsys, "pixart-sigma", "--resolution", "1024", "--part", "transformer", "--memory", "4GiB")
    assert (printed["dtype"], printed["batch"]) == ("bfloat16", 2)
    assert set(printed["largest_resolution"]) == {"fused", "slicemod"}
    (step,) = printed["resolutions"]
    assert {layer["shape"]["queries"] for layer in step["layers"]} == {(1024 // 16) ** 2}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sd15", "--memory", "lots"], "--memory: .*expected .*got 'lots'"),
        (["sd15", "--resolution", "500"], "--resolution: expected multiples of 64 .*got 500. Take 512"),
        (["sd15", "--resolution", "65536"], "--resolution: expected .* up to 16384"),
        (["sd15", "--batch", "0"], "--batch: expected 1 or more"),
        (["sd15", "--policy", "best"], "--policy"),
        (["sd15", "--checkpoint-blocks"], "--checkpoint-blocks: expected together with train"),
        (["sd15", "--checkpoint-layers"], "--checkpoint-layers: expected together with train"),
        (["sd15", "--feed-forward"], "--feed-forward: expected together with train"),
        (["sd15", "--prepared"], "--prepared: expected together with device cpu, .*; got cuda. Choose cpu or leave it"),
        (["sd15", "--prepared", "--device", "mps"], "--prepared: expected together with device cpu, .*; got mps"),
        (["sd15", "--prepared", "--device", "cpu", "--train"], "--prepared: expected without train"),
        (["sd15", "--prepared", "--device", "cpu", "--offload", "sequential"], "--prepared: expected offload none or"),
        (
            ["wan-1.3b", "--prepared", "--device", "cpu", "--dtype", "float32", "--part", "transformer"],
            "--prepared: expected a model that .*; patch_embedding: it is another convolution than .* Leave it",
        ),
        (["flux-dev", "--train", "--feed-forward"], "--feed-forward: expected a UNet"),
        (["flux-dev", "--train", "--checkpoint-layers"], "--checkpoint-layers: expected a UNet"),
        (["sd15", "--kernel", "native"], '--kernel: expected a call that it computes, .*on cuda. Take kernel="auto"'),
        (["sd15", "--kernel", "native", "--part", "unet"], "--kernel: .*it runs on CPUs"),
        pytest.param(
            ["sd15", "--kernel", "triton", "--device", "cpu"], "--kernel: .*it runs on GPUs", marks=pytest.mark.slow
        ),
        (["sd15", "--uncached"], "--uncached: expected to be changed together with train"),
        (["sd15", "--train", "--offload", "model"], "--offload: expected none with train"),
        (["sd15", "--frames", "5"], "--frames: expected 1, since a UNet makes images"),
        (["sd15", "--plot", "no/such/folder.png"], "--plot: expected a file in a folder that exists; got no/such"),
        (["sd15", "--plot", "plan.txt"], "--plot: .* ends in .png"),
        ([], "model"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(["plan", *arguments])
