"""What slicemod's extension touches of AUTOMATIC1111's webui and of Forge, which are no packages of a registry.

Written after the webui's version 1.10.1 and Forge of June 2025: names, signatures and decisions of settings, callbacks,
optimizations and hypernetworks, and the layers of LDM and sgm whose `forward` is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.comfyui.stand_in import attention_pytorch


class OptionInfo:
    def __init__(
        self,
        default: Any = None,
        label: str = "",
        component: Any = None,
        component_args: Any = None,
        onchange: Callable[[], Any] | None = None,
        section: tuple[str, str] | None = None,
    ) -> None:
        self.default, self.label, self.component, self.component_args = default, label, component, component_args
        self.onchange, self.section, self.comment_after = onchange, section, ""

    def info(self, text: str) -> OptionInfo:
        self.comment_after += text
        return self


class Options:
    """Settings; a change whose callback raises is taken back."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {"cross_attention_optimization": "Automatic", "upcast_attn": False}
        self.data_labels: dict[str, OptionInfo] = {}

    def __getattr__(self, name: str) -> Any:
        if name in self.data:
            return self.data[name]
        if name in self.data_labels:
            return self.data_labels[name].default
        raise AttributeError(name)

    def add_option(self, key: str, info: OptionInfo) -> None:
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)

    def set(self, key: str, value: Any) -> bool:
        old, self.data[key] = self.data.get(key), value
        onchange = self.data_labels[key].onchange
        try:
            if onchange is not None:
                onchange()
        except Exception:  # noqa: BLE001 - as the webui does
            self.data[key] = old
            return False
        return True


class CrossAttention(nn.Module):
    """LDM's, with the webui's own `forward`, which knows hypernetworks."""

    def __init__(self, query_dim: int, context_dim: int | None = None, heads: int = 3, dim_head: int = 7) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads, self.scale = heads, dim_head**-0.5
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_dim or query_dim, inner, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **_more: Any) -> Tensor:
        shared = sys.modules["modules.shared"]
        for_keys, for_values = apply_hypernetworks(shared.loaded_hypernetworks, x if context is None else context)
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.to_q(x), self.to_k(for_keys), self.to_v(for_values))
        )
        scores = query @ key.transpose(-1, -2) * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask.flatten(1)[:, None, None], -torch.finfo(scores.dtype).max)
        out: Tensor = self.to_out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return out


class AttnBlock(nn.Module):
    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, **_more: Any) -> Tensor:
        normed = self.norm(x)
        query, key, value = (to(normed).flatten(2) for to in (self.q, self.k, self.v))  # (B, C, N)
        weights = (query.transpose(1, 2) @ key * query.shape[1] ** -0.5).softmax(-1)
        out: Tensor = x + self.proj_out((value @ weights.transpose(1, 2)).view(x.shape))
        return out


def apply_hypernetworks(hypernetworks: list[tuple[nn.Module, nn.Module]], context: Tensor) -> tuple[Tensor, Tensor]:
    for_keys = for_values = context
    for of_keys, of_values in hypernetworks:
        for_keys, for_values = of_keys(for_keys), of_values(for_values)
    return for_keys, for_values


class Webui:
    """The webui's modules as they are imported, and its steps from the start on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opts = Options()
        self.optimizers: list[Any] = []
        self.current: Any = None
        self.callbacks: dict[str, list[Callable[..., Any]]] = {
            name: [] for name in ("list_optimizers", "ui_settings", "before_ui", "script_unloaded")
        }
        self.layers = {
            f"{library}.modules.{place}": {kind.__name__: type(kind.__name__, (kind,), {"forward": kind.forward})}
            for library in ("ldm", "sgm")
            for place, kind in (("attention", CrossAttention), ("diffusionmodules.model", AttnBlock))
        }
        self.left_autocast: list[bool] = []
        contents: dict[str, dict[str, Any]] = {
            "gradio": {"Textbox": object, "Dropdown": object, "Checkbox": object},
            "modules.shared": {"opts": self.opts, "OptionInfo": OptionInfo, "loaded_hypernetworks": []},
            "modules.devices": {"without_autocast": self.without_autocast},
            "modules.hypernetworks.hypernetwork": {"apply_hypernetworks": apply_hypernetworks},
            "modules.script_callbacks": {f"on_{name}": each.append for name, each in self.callbacks.items()},
            "modules.sd_hijack": {},
            "modules.sd_hijack_optimizations": {"SdOptimization": self._base()},
            **self.layers,
        }
        for name, names in contents.items():
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                parent = ".".join(parts[:end])
                if parent == name or not isinstance(sys.modules.get(parent), ModuleType):
                    monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
            vars(sys.modules[name]).update(names)

    def _base(self) -> type:
        layers, forwards = self.layers, {"CrossAttention": CrossAttention.forward, "AttnBlock": AttnBlock.forward}

        class SdOptimization:
            name: Any = None
            label: Any = None
            cmd_opt: Any = None
            priority = 0

            def title(self) -> Any:
                return self.name if self.label is None else f"{self.name} - {self.label}"

            def is_available(self) -> bool:
                return True

            def apply(self) -> None: ...

            def undo(self) -> None:
                for classes in layers.values():
                    for name, each in classes.items():
                        each.forward = forwards[name]  # type: ignore[attr-defined]

        return SdOptimization

    def without_autocast(self, disable: bool = False) -> AbstractContextManager[Any]:
        self.left_autocast.append(torch.is_autocast_enabled("cpu") and not disable)
        return torch.autocast("cpu", enabled=False) if self.left_autocast[-1] else nullcontext()

    def start(self) -> None:
        """List the optimizations, with one of the webui's own, and ask the extensions for their settings."""
        own = type("Own", (sys.modules["modules.sd_hijack_optimizations"].SdOptimization,), {"name": "sdp"})()
        found: list[Any] = [own]
        for callback in self.callbacks["list_optimizers"]:
            callback(found)
        self.optimizers = sorted(filter(lambda each: each.is_available(), found), key=lambda each: -each.priority)
        for callback in self.callbacks["ui_settings"]:
            callback()

    def choose(self, title: str) -> str:
        """What happens when the user chooses an optimization."""
        if self.current is not None:
            self.current.undo()
        chosen = next((each for each in self.optimizers if each.title() == title), self.optimizers[0])
        chosen.apply()
        self.current = chosen
        return str(chosen.name)

    def layer(self, library: str, kind: str, *sizes: int) -> Any:
        """A layer of one of the libraries, always with the same weights."""
        torch.manual_seed(7)
        (made,) = (
            classes[kind] for name, classes in self.layers.items() if name.startswith(library) if kind in classes
        )
        return made(*sizes)


def spatial_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Forge's attention of its VAE: `(B, C, height, width)`."""
    query, key, value = (each.flatten(2).transpose(1, 2) for each in (q, k, v))
    weights: Tensor = (query @ key.transpose(1, 2) * q.shape[1] ** -0.5).softmax(-1)
    out: Tensor = (weights @ value).transpose(1, 2).reshape(v.shape)
    return out


def add_forge(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Forge's modules of attention and models, which import functions of attention by name."""
    own = {"attention_function": attention_pytorch, "attention_function_single_head_spatial": spatial_attention}
    held: dict[str, dict[str, Any]] = {
        "backend": {},
        "backend.attention": own,
        "backend.nn": {},
        **{f"backend.nn.{name}": {"attention_function": attention_pytorch} for name in ("unet", "flux", "chroma")},
        "backend.nn.vae": {"attention_function_single_head_spatial": spatial_attention},
        "backend.nn.clip": {"attention_function": lambda *_args: "another function"},
    }
    for name, names in held.items():
        module = ModuleType(name)
        vars(module).update(names)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    return {name: sys.modules[name] for name in held}
