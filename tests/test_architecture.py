"""The order of the files in ARCHITECTURE.md holds, and importing the package stays cheap."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slicemod.swap import HOST_MODULES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "slicemod"

# A file imports only from files above it; what is left of a folder counts as one. `slicemod` itself, the public names,
# comes where the last file that it imports has come.
ORDER = (
    "user_error.py",
    "rounding.py",
    "torch_internals.py",
    "watched.py",
    "operator.py",
    "half_precision.py",
    "memory/",
    "card.py",
    "call.py",
    "plan.py",
    "layers/",
    "kernels/",
    "config.py",
    "choose.py",
    "known_calls.py",
    "dispatch.py",
    "explained.py",
    "graph_operators.py",
    "functional.py",
    "sdpa_report.py",
    "sdpa_mode.py",
    "reference.py",
    "attend.py",
    "attention.py",
    "on_cpu/",
    "feed_forward/",
    "vae/",
    "on_cpu/prepare.py",
    "swap.py",
    "adapters/",
    "public.py",
    "whole_file.py",
    "arguments.py",
    "printing.py",
    "hidden_packages.py",
    "planning/",
    "__init__.py",
    "integrations/",
    "bench/",
    "training/common/",
    "training/digits/",
    "training/stable_diffusion/",
    "training/commands/",
    "training/",
    "cli.py",
)
NEEDED = {"torch", "einops"}
FILES = sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    """The entry of `ORDER` for a file: its own, or that of the innermost folder that has one."""
    inside = path.relative_to(PACKAGE)
    folders = [f"{folder.as_posix()}/" for folder in inside.parents[:-1]]
    return next((entry for entry in (inside.as_posix(), *folders) if entry in ORDER), inside.as_posix())


def resolve(module: str) -> Path:
    """The file of a dotted name under slicemod; `slicemod.name` that is no file is a public name."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    if path.with_suffix(".py").exists() and path != PACKAGE:
        return path.with_suffix(".py")
    return path / "__init__.py" if path.is_dir() else resolve(module.rpartition(".")[0])


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports_of(node)


def imports_of(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Dotted names of one import statement."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif node.module is not None:
        assert node.level == 0, f"relative import of {node.module}"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[Path]:
    return {resolve(name) for name in imports(path) if name.split(".")[0] == "slicemod"} - {path}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_files_above_it(path: Path) -> None:
    below = [
        name_of(imported)
        for imported in own_imports(path)
        if layer(imported) != layer(path) and ORDER.index(layer(imported)) > ORDER.index(layer(path))
    ]
    assert below == []


def test_no_folder_imports_in_circles() -> None:
    remaining = {path: {other for other in own_imports(path) if layer(other) == layer(path)} for path in FILES}
    while free := [path for path, needs in remaining.items() if not needs]:
        for path in free:
            del remaining[path]
        for needs in remaining.values():
            needs.difference_update(free)
    assert sorted(map(name_of, remaining)) == []


def test_every_file_has_its_place_in_the_order() -> None:
    assert {layer(path) for path in FILES} == set(ORDER)


def test_the_order_is_that_of_architecture_md() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([a-z0-9_/]+(?:\.py|/))`", text, flags=re.MULTILINE)
    assert table == [entry for entry in ORDER if entry != "__init__.py"]


def test_optimised_code_never_imports_the_reference() -> None:
    users = {layer(path) for path in FILES if PACKAGE / "reference.py" in own_imports(path)}
    assert users <= {"bench/"}


def run_by(path: Path, known: frozenset[Path] = frozenset()) -> frozenset[Path]:
    """The file, and whatever importing it imports; not what its functions import later."""
    known |= {path}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = imports_of(node) if isinstance(node, ast.Import | ast.ImportFrom) else []
        for name in names:
            if name.split(".")[0] == "slicemod" and (imported := resolve(name)) not in known:
                known = run_by(imported, known)
    return known


ENGINE = frozenset[Path]()
for start in ("public", *(f"adapters/{name}" for name in HOST_MODULES)):
    ENGINE = run_by(PACKAGE / f"{start}.py", ENGINE)


@pytest.mark.parametrize("path", sorted(ENGINE), ids=name_of)
def test_the_engine_needs_torch_and_einops_alone(path: Path) -> None:
    foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"slicemod"}
    assert foreign <= NEEDED


def test_importing_the_package_brings_in_no_framework() -> None:
    program = "import json, sys; from slicemod import *; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(ran.stdout))
    assert loaded >= NEEDED
    unwanted = {"diffusers", "lightning", "sklearn", "matplotlib", "torchmetrics", "jsonargparse", "PIL", "rich", "ldm"}
    assert loaded & unwanted == set()
    assert ran.stderr == ""


@pytest.mark.parametrize("folder", ["slicemod", "tests", "train_scripts"])
def test_no_file_is_a_dumping_ground(folder: str) -> None:
    names = {path.stem for path in (ROOT / folder).rglob("*.py")}
    assert names
    assert names & {"utils", "util", "helpers", "helper", "common", "misc", "shared", "tools"} == set()


def test_all_public_names_exist_and_are_all_that_design_promises() -> None:
    import slicemod

    assert all(hasattr(slicemod, name) for name in slicemod.__all__)
    assert set(slicemod.__all__) >= {
        "AttentionShape",
        "MemoryAwareCrossAttention",
        "NotEnoughMemoryError",
        "SliceConfig",
        "SlicePlan",
        "SwapReport",
        "free_memory",
        "plan_slices",
        "restore_attention",
        "sliced_attention",
        "sliced_sdpa",
        "swap_attention",
    }
