"""Wheel and sdist build; the wheel installs into an empty environment and works with torch and einops alone."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

import slicemod

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed"),
]


def build(source: Path, out: Path) -> list[Path]:
    """Builds sdist and wheel of a source tree without a network."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheel and the sdist of this clone."""
    return build(ROOT, tmp_path_factory.mktemp("built"))


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_a_wheel_and_an_sdist_are_built(built: list[Path]) -> None:
    version = slicemod.__version__
    assert [path.name for path in built] == [f"slicemod-{version}-py3-none-any.whl", f"slicemod-{version}.tar.gz"]


def test_wheel_and_sdist_hold_every_file_of_the_package(built: list[Path]) -> None:
    asked = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "slicemod"]
    listed = subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    sources = {name for name in listed if (ROOT / name).exists()}
    assert {"slicemod/py.typed", "slicemod/__init__.py"} <= sources
    assert sources <= names_in(built[0])
    with tarfile.open(built[1]) as archive:
        assert sources <= {name.partition("/")[2] for name in archive.getnames()}


def test_the_wheel_holds_the_package_alone(built: list[Path]) -> None:
    names = names_in(built[0])
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"slicemod", f"slicemod-{slicemod.__version__}.dist-info"}


def test_the_sdist_builds_the_same_wheel(built: list[Path], tmp_path: Path) -> None:
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    wheel = build(source, tmp_path / "again")[0]
    assert names_in(wheel) == names_in(built[0])


def required(name: str, found: set[str]) -> set[str]:
    """A distribution and all that it requires, extras aside, as far as it is installed here."""
    try:
        requires = distribution(name).requires or []
    except PackageNotFoundError:  # for another platform
        return found
    found.add(name)
    for requirement in requires:
        needed = re.split(r"[^\w.-]", requirement)[0]
        if "extra ==" not in requirement and needed not in found:
            required(needed, found)
    return found


@pytest.fixture(scope="module")
def python(built: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, and of this one's packages torch, einops and what they need."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, symlinks=True)
    interpreter = folder / "bin" / "python"
    asked = subprocess.run(
        [interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    packages = Path(asked.stdout.strip())
    assert list(packages.iterdir()) == []
    for name in required("torch", required("einops", set())):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            here, there = Path(str(found.locate_file(top))), packages / top
            if here.exists() and not there.exists():
                there.symlink_to(here)
    install = ["install", "--no-deps", "--no-index", "--quiet", str(built[0])]
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    return interpreter


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the empty environment's interpreter away from this clone, with none of this environment's paths."""
    return subprocess.run(
        [python, "-I", *arguments], cwd=python.parent, capture_output=True, text=True, check=False, timeout=300
    )


def test_it_works_with_torch_and_einops_alone(python: Path) -> None:
    program = """
import importlib.util, pathlib, sys
import slicemod, torch
assert pathlib.Path(slicemod.__file__).is_relative_to(sys.prefix), slicemod.__file__
assert not any(map(importlib.util.find_spec, ("diffusers", "lightning", "rich", "matplotlib", "yaml")))
layer = slicemod.MemoryAwareCrossAttention(32, heads=2, dim_head=16, slicing={"budget": "1MiB", "policy": "exact"})
layer(torch.randn(1, 67, 32)).sum().backward()
print(layer.to_q.weight.grad.shape)
"""
    ran = run(python, "-c", program)
    assert ran.returncode == 0, ran.stderr
    assert "torch.Size([32, 32])" in ran.stdout


def test_the_command_is_there_and_says_what_a_subcommand_lacks(python: Path) -> None:
    script = str(python.parent / "slicemod")
    assert run(python, script, "--version").stdout == f"slicemod {slicemod.__version__}\n"
    ran = run(python, script, "bench", "--quick")
    assert ran.returncode == 2
    *_, paragraph = ran.stderr.splitlines()  # torch warns that it has no NumPy
    assert re.fullmatch(r"slicemod bench: needs the package \w+, which is not installed\. .*`train`.*", paragraph)
