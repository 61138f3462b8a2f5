"""A run names its processor, its vector instructions and its versions, to the commit."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import slicemod
from slicemod.bench.machine import commit_of, describe_machine, processor_name
from slicemod.kernels.table_in_use import BUILT_IN, NO_TABLE, using_table

XEON = "processor : 0\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Intel(R) Xeon(R) Processor\n\nprocessor : 1\n"


def test_the_machine_names_its_versions() -> None:
    machine = describe_machine(torch.device("cpu"))
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["versions"]["slicemod"].startswith(slicemod.__version__)
    assert machine["device"] == "cpu"
    assert machine["processor"]
    assert ("avx512_bf16" in machine["half_precision"]) == bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (XEON, "Intel(R) Xeon(R) Processor of family 6, model 143"),
        (XEON.replace("Xeon(R) Processor", "Xeon(R) Gold 6430"), "Intel(R) Xeon(R) Gold 6430"),
    ],
    ids=["no number", "number"],
)
def test_a_name_without_a_number_gets_family_and_model(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert processor_name(tmp_path / "cpuinfo") == name


def test_a_run_says_which_table_its_kernels_were_chosen_by() -> None:
    cpu = torch.device("cpu")
    for table, source, said in (
        (replace(NO_TABLE, measured="2026-01-02"), "a file", "table measured 2026-01-02"),
        (replace(NO_TABLE, measured="2026-01-02"), BUILT_IN, "built-in table"),
        (NO_TABLE, "no native kernel, no table", None),
    ):
        with using_table(table, source):
            assert describe_machine(cpu)["kernels_by"] == said


def test_a_checkout_names_its_commit_and_whether_the_package_was_changed(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    module = package / "__init__.py"
    module.write_text("")

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        ran = subprocess.run(
            ["git", *identity, "-C", str(tmp_path), *arguments], capture_output=True, text=True, check=True
        )
        return ran.stdout.strip()

    git("init", "-q")
    assert commit_of(package) == ""  # as where a package lies in an environment inside of somebody's checkout
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "--short=10", "HEAD")
    (tmp_path / "results.json").write_text("")
    assert commit_of(package) == f" at {commit}"
    module.write_text("changed")
    assert commit_of(package) == f" at {commit}+"
