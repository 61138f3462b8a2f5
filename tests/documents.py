"""What README and the pages under docs/ hold that can be run: Python blocks and commands."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAMS = ("slicemod", "make", "pip", "python", "torchrun", "srun")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def python_blocks(page: Path) -> list[str]:
    """The Python blocks of a page, in their order."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Lines of console blocks, and those of indented blocks that call one of `PROGRAMS`, comments cut off.

    `slicemod sample ... --steps 5` stands for the arguments of the last `slicemod sample` and some more.
    """
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))  # lines that go on
    lines = [
        line
        for block in re.findall(r"^```(?:console|bash|sh)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    lines += re.findall(rf"^ {{4}}((?:{'|'.join(PROGRAMS)}) .*)$", text, re.MULTILINE)
    found: list[str] = []
    for line in (re.sub(r"\s+#.*", "", line).strip() for line in lines):
        head, dots, rest = line.partition(" ... ")
        last = next((earlier for earlier in reversed(found) if dots and earlier.startswith(head)), head)
        found += [f"{last} {rest}" if dots else line] if line else []
    return found
