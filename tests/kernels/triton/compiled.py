"""What compilers make of the Triton kernels for GPUs that need not be here, and the table of it in docs/hardware.md.

`python -m tests.kernels.triton.compiled --into docs/hardware.md` fills the table in.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from slicemod.kernels.outputs import empty_heads
from slicemod.kernels.triton.launches import BackwardCall, Call, Launch, backward_launches, forward_launch

KIB = 1024
SHARED = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB that a program may have
WIDTHS = (40, 64, 80, 160, 512)  # of heads of Stable Diffusion's layers, and of its autoencoder
FEATURES = ("plain", "causal", "bool", "gradient and dropout")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_BATCH, _HEADS, _TOKENS = 2, 8, 4096


class Compiled(NamedTuple):
    """One kernel, compiled.

    Attributes:
        kernel: its name.
        registers: of a thread.
        spills: instructions that keep a register in memory (on NVIDIA), or registers that are kept there (on AMD).
        shared: bytes of shared memory of a program.
        products: instructions of tensor cores.
        loads: instructions that load from memory.
        wide_loads: those that load 16 bytes at once.
    """

    kernel: str
    registers: int
    spills: int
    shared: int
    products: int
    loads: int
    wide_loads: int


class _Planned:
    """Stands for Triton's driver of a card that is not here, as far as compiling asks it."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # what is compiled is kept by device

    def get_current_stream(self, _device: str) -> int:
        return 0


@cache
def compiled(card: str, dtype: torch.dtype, width: int, features: str) -> tuple[Compiled, ...]:
    """The kernels of a training step of one layer, started as they would be, but for the start itself."""
    amd = card.startswith("gfx")
    driver.set_active(_Planned(target_of(card)))
    found = []
    for launch in launches(card, dtype, width, features):
        made = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
        facts = _of_amd(made.asm["amdgcn"]) if amd else _of_nvidia(made.asm["cubin"])
        registers, spills, products, loads, wide = facts
        name = launch.kernel.__name__.removesuffix("_kernel")
        found.append(Compiled(name, registers, spills, made.metadata.shared, products, loads, wide))
    return tuple(found)


def target_of(card: str) -> GPUTarget:
    """What Triton compiles for."""
    return (
        GPUTarget("hip", card, 64) if card.startswith("gfx") else GPUTarget("cuda", int(card.removeprefix("sm_")), 32)
    )


def launches(card: str, dtype: torch.dtype, width: int, features: str) -> Iterator[Launch]:
    """The kernels of a training step, ready to be started."""
    query, key, value, output, grad = (_layer_like(width, dtype) for _ in range(5))
    mask = {
        "bool": torch.empty(1, 1, _TOKENS, _TOKENS, dtype=torch.bool, device="meta"),
        "gradient and dropout": torch.empty(1, _HEADS, _TOKENS, _TOKENS, dtype=dtype, device="meta"),
    }.get(features)
    drops = "dropout" in features
    seed = torch.empty((), dtype=torch.int64, device="meta") if drops else None
    call = Call(query, key, value, mask, seed, 0.1 if drops else 0.0, features == "causal", width**-0.5)
    sums = torch.empty(_BATCH, _HEADS, _TOKENS, device="meta")
    yield forward_launch(call, output, sums, card)
    gradients = [empty_heads(tensor, width) for tensor in (query, key, value)]
    of_mask = torch.empty_like(mask) if mask is not None and drops else None
    yield from backward_launches(call, BackwardCall(grad, output, sums, [*gradients, of_mask]), card)


def _layer_like(width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(_BATCH, _TOKENS, _HEADS, width, dtype=dtype, device="meta").transpose(1, 2)


def _of_nvidia(cubin: bytes) -> tuple[int, int, int, int, int]:
    """Registers, spills, products, loads and wide loads, by the disassembler that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output_of("cuobjdump", "-res-usage", file.name)
        code = _output_of("nvdisasm", "-c", file.name)
    (registers,) = re.findall(r"REG:(\d+)", usage)
    patterns = r"\b(?:STL|LDL)\b", r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", r"\b(?:LDG|LDGSTS)\b", r"\bLDG(?:STS)?\S*\.128\b"
    spills, products, loads, wide = (len(re.findall(pattern, code)) for pattern in patterns)
    return int(registers), spills, products, loads, wide


def _output_of(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _of_amd(code: str) -> tuple[int, int, int, int, int]:
    (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", code)
    (spills,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", code)
    patterns = r"\bv_mfma", r"\b(?:global|buffer)_load_", r"\b(?:global|buffer)_load_dwordx4\b"
    products, loads, wide = (len(re.findall(pattern, code)) for pattern in patterns)
    return int(registers), int(spills), products, loads, wide


def table() -> str:
    """Registers and KiB of shared memory of each kernel in float16, with the features that take the most."""
    lines = [
        f"Compiled by Triton {triton.__version__} in float16, with an additive mask, its gradient, and dropout: "
        "registers of a thread, and KiB of shared memory of a program.",
        "",
        f"| kernel, channels of a head | {' | '.join(SHARED)} |",
        f"|---|{'---:|' * len(SHARED)}",
    ]
    rows: dict[str, list[str]] = {}
    for width in WIDTHS:
        for card in SHARED:
            for made in compiled(card, torch.float16, width, FEATURES[-1]):
                spilled = f", {made.spills} spilled" if made.spills else ""
                cell = f"{made.registers}, {made.shared / KIB:.0f}{spilled}"
                rows.setdefault(f"{made.kernel.replace('_', ' ')}, {width}", []).append(cell)
    lines += [
        f"| {name} | {' | '.join(cells)} |"
        for name, cells in sorted(rows.items(), key=lambda row: row[0].split(",")[0])
    ]
    return "\n".join(lines)


def _fill(page: Path, content: str) -> None:
    mark = re.compile(r"(<!-- compiled kernels -->\n).*?(<!-- end -->)", re.DOTALL)
    text = page.read_text(encoding="utf-8")
    if len(mark.findall(text)) != 1:
        raise SystemExit(
            f"{page}: expected one block `<!-- compiled kernels -->` to `<!-- end -->`; got another number."
        )
    page.write_text(mark.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, help="a page whose block is filled in")
    options = parser.parse_args()
    found = table()
    print(found)
    if options.into is not None:
        _fill(options.into, found)
