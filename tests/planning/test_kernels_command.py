"""`slicemod kernels`: tables, JSON, the built kernel and errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slicemod import kernels
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.table_in_use import table_in_use, using_table
from slicemod.planning.kernels_command import run
from slicemod.user_error import UserError

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits.yaml")
ON_CUDA = ["--device", "cuda", "--budget", "64MiB"]


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["kernels", *arguments, "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def test_json_has_every_kernel_and_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _json(capsys, "--device", "cpu", "--budget", "64MiB")
    assert [kernel["kernel"] for kernel in printed["kernels"]] == [kernel.name for kernel in kernels.KERNELS]
    assert (printed["device"], printed["dtype"], printed["budget"]) == ("cpu", "float32", 2**26)
    assert [(model["model"], model["pixels"]) for model in printed["models"]] == [("sd15", 512), ("sdxl", 1024)]
    for model, layers in zip(printed["models"], (32, 140), strict=True):
        assert sum(layer["layers"] for layer in model["layers"] if not layer["training"]) == layers
        for layer in model["layers"]:
            assert layer["peak_bytes"] == layer["plan"]["peak_bytes"] <= 2**26
            better = [kernel.name for kernel in kernels.KERNELS]
            assert list(layer["passed_over"]) == better[: better.index(layer["kernel"])]


def test_resolution_dtype_and_model_are_heeded(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", DIGITS, "sd15", "--resolution", "256", "64", "--dtype", "bfloat16"]
    printed = _json(capsys, *ON_CUDA, *options)
    assert [(Path(model["model"]).name, model["pixels"]) for model in printed["models"]] == [
        ("digits.yaml", 256),
        ("digits.yaml", 64),
        ("sd15", 256),
        ("sd15", 64),
    ]
    largest = printed["models"][2]["layers"][0]["shape"]
    assert (largest["queries"], largest["keys"], largest["itemsize"], largest["upcast"]) == (1024, 1024, 2, True)


def test_the_tables_show_kernels_layers_and_each_reason_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["kernels", *ON_CUDA, "--model", "sd15"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "no: it runs on CPUs",
        "sd15 at 512 x 512, float16, a budget of 64.0 MiB for each call",
        "16 x 4096 x 4096 x 40",
        "native (1), fused-float32 (2)",
    ):
        assert expected in printed
    assert printed.count("(1) it runs on CPUs, and the call is on cuda") == 1


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["kernels", "--device", "cuda", "--budget", "16", "--model", "sd15"]) == 0
    assert "none fits" in capsys.readouterr().out


@pytest.mark.skipif(native_obstacle() is not None, reason="there can be no native kernel here")
def test_build_says_where_the_library_lies(capsys: pytest.CaptureFixture[str]) -> None:
    library = native_library()
    assert library is not None
    assert _json(capsys, "--build") == {"native": str(library.path)}
    assert run(["kernels", "--build"]) == 0
    assert capsys.readouterr().out == f"the native kernel is in {library.path}\n"


def test_a_machine_without_the_native_kernel_says_why() -> None:
    code = """
from slicemod.cli import main
assert main(["kernels", "--build"]) == 2
assert main(["kernels", "--device", "cpu", "--model", "sd15"]) == 0
"""
    environment = os.environ | {"SLICEMOD_NATIVE": "0", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.search("^slicemod kernels: --build: native attention: .* SLICEMOD_NATIVE is 0$", ran.stderr, re.MULTILINE)
    assert "no: SLICEMOD_NATIVE is 0" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--budget", "lots"], "--budget: .*got 'lots'"),
        (["--resolution", "500"], "--resolution: expected multiples of 64 .*got 500. Take 512"),
        (["--model", "sd99"], "sd99"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "abacus"], "--device"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(["kernels", *arguments])


def test_the_example_in_the_docs_has_the_layers_that_the_command_shows(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```text\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert run(["kernels", "--device", "cpu", "--model", "sd15", "--budget", "64MiB"]) == 0
    printed = capsys.readouterr().out
    # Which kernel takes a layer, and with how many bytes, depends on the machine.
    alike = r"^ (?:mode .* passed over|(?:inference|training) +\d+ +\d+ x \d+ x \d+ x \d+)"
    wanted = [" ".join(line.split()) for line in re.findall(alike, printed, flags=re.MULTILINE)]
    assert [" ".join(line.split()) for line in re.findall(alike, example, flags=re.MULTILINE)] == wanted
    assert all(f"\n {kernel.name} " in example for kernel in kernels.KERNELS)


@pytest.mark.skipif(native_library() is None, reason=f"no native kernel: {native_obstacle()}")
def test_it_says_which_table_kernels_are_chosen_by(capsys: pytest.CaptureFixture[str]) -> None:
    line = "which kernel is faster is from"
    with using_table(replace(table_in_use().table, processor="an abacus"), "of a test"):
        assert run(["kernels", "--device", "cpu", "--model", "sd15", "--budget", "64MiB"]) == 0
        assert f"{line} the table of a test: " in (printed := capsys.readouterr().out)
        assert "on an abacus with " in printed
        assert _json(capsys, "--device", "cpu", "--model", "sd15")["table"]["source"] == "of a test"
    assert run(["kernels", *ON_CUDA, "--model", "sd15"]) == 0
    assert line not in capsys.readouterr().out
