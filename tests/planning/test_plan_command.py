"""`slicemod plan`: tables, JSON and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slicemod import AttentionShape, plan_slices
from slicemod.planning.plan_command import run
from slicemod.user_error import UserError

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.yaml")


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert run(["plan", *arguments, "--json"]) == 0
    printed: dict[str, object] = json.loads(capsys.readouterr().out)
    return printed


def test_every_row_is_the_plan_of_plan_slices(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _json(capsys, "sd15", "--resolution", "512", "1024", "--memory", "2GiB", "--policy", "exact", "--train")
    rows = printed["layers"]
    assert isinstance(rows, list)
    assert {row["resolution"] for row in rows} == {512, 1024}
    for row in rows:
        plan = plan_slices(AttentionShape(**row["shape"]), 2 * 2**30, policy="exact", training=True)
        assert row["plan"]["peak_bytes"] == plan.peak_bytes <= 2 * 2**30
        assert (row["plan"]["axis"], row["plan"]["steps"]) == (plan.axis, plan.steps)


def test_slices_reach_further_than_full_attention(capsys: pytest.CaptureFixture[str]) -> None:
    limits = _json(capsys, "sd15", "--memory", "4GiB")["largest_resolution"]
    assert isinstance(limits, dict)
    assert 512 <= limits["full attention"] < limits["sliced, heuristic"]


def test_what_does_not_fit_is_said_in_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "sd15", "--resolution", "512", "4096", "--memory", "1GiB"]) == 0
    printed = capsys.readouterr().out
    assert "too little" in printed
    assert "16x4096x4096x40" in printed


def test_a_config_plans_with_its_own_pixels_a_latent(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _json(capsys, DIGITS, "--resolution", "512", "--device", "cpu", "--memory", "64MiB", "--batch", "1")
    rows = printed["layers"]
    assert isinstance(rows, list)
    assert max(row["shape"]["queries"] for row in rows) == (512 // 4 // 2) ** 2  # attention starts one level down


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sd15", "--memory", "lots"], "--memory: .*expected .*got 'lots'"),
        (["sd15", "--resolution", "500"], "--resolution: expected multiples of 64"),
        (["sd15", "--batch", "0"], "--batch: expected 1 or more"),
        (["sd15", "--policy", "best"], "--policy"),
        ([], "model"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(["plan", *arguments])
