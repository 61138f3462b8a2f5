"""The programs that slicemod installs itself into: how their folders are told, and what goes where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slicemod.user_error import UserError


@dataclass(frozen=True)
class Program:
    """A program that loads folders with Python code of others.

    Attributes:
        title: its name for people.
        folder: where slicemod's folder goes, below the program's.
        template: the file of slicemod that becomes the code in there.
        code: the name of this code in slicemod's folder.
        looks_for: one of these lists of files and folders tells a program's folder.
        nested: folders in which packages for Windows have the program.
        obstacle: why a folder that looks right has no place for slicemod; None if it has.
        next_steps: what remains to do there.
    """

    title: str
    folder: str
    template: str
    code: str
    looks_for: tuple[tuple[str, ...], ...]
    nested: tuple[str, ...]
    obstacle: Callable[[Path], str | None]
    next_steps: str

    def root(self, path: Path) -> Path:
        """The program's own folder in what the user named.

        Raises:
            UserError: it is no folder of this program.
        """
        for folder in (path, *(path / name for name in self.nested)):
            if any(all((folder / part).exists() for part in parts) for parts in self.looks_for):
                return folder
        expected = ", or ".join(" and ".join(parts) for parts in self.looks_for)
        inside = f", there or in {' or '.join(self.nested)}"
        raise UserError(
            f"PATH: expected the folder of {self.title}, which has {expected}{inside}; got {path}, "
            f"{'which has not' if path.is_dir() else 'which is no folder'}. Name the folder that the program was "
            "installed into."
        )


def _too_old_for_overrides(root: Path) -> str | None:
    attention = root / "comfy" / "ldm" / "modules" / "attention.py"
    if not attention.exists() or "optimized_attention_override" in attention.read_text(encoding="utf-8"):
        return None
    return (
        "is a ComfyUI of before September 2025: its comfy/ldm/modules/attention.py has no "
        "optimized_attention_override, through which a node chooses the attention of a model. Update ComfyUI."
    )


def is_forge(root: Path) -> bool:
    """Whether the webui in this folder is a Forge, which has attention of its own."""
    return (root / "backend" / "attention.py").exists() and (root / "backend" / "nn").is_dir()


def _no_choice_of_attention(root: Path) -> str | None:
    if is_forge(root):
        return None
    hijack = root / "modules" / "sd_hijack.py"
    if hijack.exists() and "\ndef list_optimizers(" in hijack.read_text(encoding="utf-8"):
        return None
    return (
        "is a webui whose attention extensions cannot choose: it has no list_optimizers in modules/sd_hijack.py, as "
        "AUTOMATIC1111's has since version 1.3, and no backend/attention.py, as Forge has. Update it, or see "
        "docs/hosts.md for other programs, such as SD.Next."
    )


PROGRAMS = {
    "comfyui": Program(
        title="ComfyUI",
        folder="custom_nodes/comfyui-slicemod",
        template="comfyui/custom_node.py",
        code="__init__.py",
        looks_for=(
            ("comfy/ldm/modules/attention.py", "custom_nodes", "main.py"),
            ("custom_nodes", "models", "user", "input", "output"),  # what the desktop version lets a user choose
        ),
        nested=("ComfyUI",),
        obstacle=_too_old_for_overrides,
        next_steps='Restart ComfyUI; the nodes "Sliced attention" and "Attention plans" are in the category slicemod.',
    ),
    "webui": Program(
        title="AUTOMATIC1111's webui or Forge",
        folder="extensions/sd-webui-slicemod",
        template="webui/extension_script.py",
        code="scripts/slicemod_attention.py",
        looks_for=(("modules/script_callbacks.py", "modules/shared_options.py", "extensions", "webui.py"),),
        nested=("webui", "stable-diffusion-webui"),
        obstacle=_no_choice_of_attention,
        next_steps="Restart the webui; choose slicemod in Settings, Optimizations.",
    ),
}
