"""PyTorch's private names: each is there, its loss is told by name, and one file has them all."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from slicemod import torch_internals

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "slicemod"
SOURCE = Path(torch_internals.__file__).read_text(encoding="utf-8")
QUOTES = "'\""
NAMES = [
    node.args[0].value
    for node in ast.walk(ast.parse(SOURCE))
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Name)
    and node.func.id == "private"
    and isinstance(node.args[0], ast.Constant)
    and isinstance(node.args[0].value, str)
]


def skip_unless_asked(name: str) -> None:
    if name.startswith("torch.ops.mkldnn.") and not torch_internals.has_onednn:
        pytest.skip("this PyTorch was built without oneDNN")


@pytest.mark.parametrize("name", NAMES)
def test_pytorch_has_the_private_name(name: str) -> None:
    skip_unless_asked(name)
    found = torch_internals.private(name)  # its error names it
    assert found is attrgetter(name.removeprefix("torch."))(torch)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_gone_is_named_where_the_package_is_imported(name: str) -> None:
    skip_unless_asked(name)
    gone = f"{name}_of_old"
    changed = SOURCE.replace(f'"{name}"', f'"{gone}"')
    assert changed != SOURCE
    with pytest.raises(ImportError, match=f"^{gone}: expected in PyTorch"):
        exec(compile(changed, "torch_internals.py", "exec"), {"__name__": "changed"})  # our own text


def test_a_pytorch_without_onednn_will_do() -> None:
    code = """
import types, torch
torch.backends.mkldnn.is_available = lambda: False
torch.ops.mkldnn = types.SimpleNamespace()
from slicemod.half_precision import cpu_products
assert cpu_products(torch.bfloat16) is cpu_products(torch.float16) is None
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def private_names(tree: ast.Module) -> Iterator[str]:
    """Dotted names below `torch` with a part that begins with an underscore, imported or reached by attributes."""
    known: dict[str, str] = {}  # what is imported from PyTorch, by the name that it has in the file
    for node in ast.walk(tree):
        imported: list[tuple[str, str]] = []
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                imported.append((alias.asname or top, alias.name if alias.asname else top))
                yield from _if_private(alias.name)
        elif isinstance(node, ast.ImportFrom):
            imported = [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
            for _, name in imported:
                yield from _if_private(name)
        known |= {local: name for local, name in imported if name.partition(".")[0] == "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield from _if_private(_dotted(node, known))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            yield from _if_private(f"{_dotted(node.args[0], known)}.{ast.unparse(node.args[1]).strip(QUOTES)}")


def _if_private(name: str) -> Iterator[str]:
    parts = name.split(".")
    if parts[0] == "torch" and any(part.startswith("_") and not part.endswith("__") for part in parts):
        yield name


def _dotted(node: ast.expr, known: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, known)}.{node.attr}"
    return known.get(node.id, "") if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize(
    "code",
    [
        "import torch; torch._fused_sdp_choice()",
        "import torch._dynamo",
        "import torch.nn.functional as F; F._pad",
        "from torch._subclasses import fake_tensor",
        "from torch.nn.modules import module; module._has_any_global_hook",
        "def f():\n    from torch.autograd import forward_ad as ad\n    return ad._current_level",
        "import torch; getattr(torch.cpu, '_is_avx2_supported')",
        "import torch; torch.ops.aten._softmax_backward_data.out",
    ],
)
def test_a_private_name_is_found(code: str) -> None:
    assert list(private_names(ast.parse(code)))


def test_what_is_public_is_not_found() -> None:
    code = "import torch\nfrom torch import nn\nself._x = torch.nn.Linear(1, 1).__class__._y\nnn.Module.__call__"
    assert list(private_names(ast.parse(code))) == []


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "torch_internals.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_uses_a_private_name_of_pytorch(path: Path) -> None:
    assert list(private_names(ast.parse(path.read_text(encoding="utf-8")))) == []
