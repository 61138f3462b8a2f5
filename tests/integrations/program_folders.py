"""Folders that look like those of the programs that slicemod installs itself into."""

from __future__ import annotations

from pathlib import Path

ATTENTION = "comfy/ldm/modules/attention.py"


def written(root: Path, files: dict[str, str]) -> Path:
    """A folder with these files, and folders where a name ends in a slash."""
    for name, text in files.items():
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(text, encoding="utf-8")
    return root


def comfyui(root: Path) -> Path:
    files = {ATTENTION: 'transformer_options["optimized_attention_override"]', "custom_nodes/": "", "main.py": ""}
    return written(root, files)


def webui(root: Path, hijack: str = "optimizers = []\n\n\ndef list_optimizers():\n    ...\n") -> Path:
    files = {
        "modules/script_callbacks.py": "",
        "modules/shared_options.py": "",
        "modules/sd_hijack.py": hijack,
        "extensions/": "",
        "webui.py": "",
    }
    return written(root, files)


def forge(root: Path) -> Path:
    return written(webui(root, "# def list_optimizers():\n"), {"backend/attention.py": "", "backend/nn/": ""})
