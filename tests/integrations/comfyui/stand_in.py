"""What slicemod's nodes touch of ComfyUI, which is no package of a registry.

Written after ComfyUI 0.33: the decisions of `wrap_attn` and `attention_pytorch`, containers included, and the parts of
a ModelPatcher and of a sampler's run that nodes reach.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEY = "optimized_attention_override"


class Container:
    """A tensor that its reader takes away."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor

    def take(self) -> Tensor:
        assert self.tensor is not None
        tensor, self.tensor = self.tensor, None
        return tensor


def wrap_attn(func: Callable[..., Tensor]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        containers = args[:3] if isinstance(args[0], Container) else None
        options = kwargs.get("transformer_options")
        override = None if options is None or "_inside_attn_wrapper" in kwargs else options.get(KEY)
        kwargs.setdefault("_inside_attn_wrapper", True)
        if override is not None and containers is not None and hasattr(override, "container_function"):
            return override.container_function(*args, **kwargs)
        if containers is not None:
            args = tuple(container.take() for container in containers) + args[3:]
        return func(*args, **kwargs) if override is None else override(func, *args, **kwargs)

    return wrapper


@wrap_attn
def attention_pytorch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    batch, dim_head = q.shape[0], q.shape[-1]
    if not skip_reshape:
        dim_head //= heads
        shared = kwargs.get("enable_gqa", False)
        q, k, v = (
            each.reshape(batch, -1, each.shape[-1] // dim_head if shared else heads, dim_head).transpose(1, 2)
            for each in (q, k, v)
        )
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    more = {name: value for name, value in kwargs.items() if name in ("scale", "enable_gqa")}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **more)
    return out if skip_output_reshape else out.transpose(1, 2).reshape(batch, -1, heads * dim_head)


class TinyModel(nn.Module):
    """Attention of a UNet to itself and to text, and of a transformer, each as their blocks call it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.to_q, self.to_k, self.to_v = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        more = {"transformer_options": transformer_options}
        x = x + attention_pytorch(self.to_q(x), self.to_k(x), self.to_v(x), 3, **more)
        x = x + attention_pytorch(self.to_q(x), self.to_k(text), self.to_v(text), 3, mask=None, **more)
        q, k, v = (to(x).view(*x.shape[:2], 3, 8).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        out: Tensor = x + attention_pytorch(q, k, v, 3, skip_reshape=True, low_precision_attention=False, **more)
        return out


class ModelPatcher:
    """A model and its options; the options of a clone are its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}

    def clone(self) -> ModelPatcher:
        made = ModelPatcher(self.model)
        made.model_options = _copied(self.model_options)
        made.wrappers = {kind: {key: list(each) for key, each in of.items()} for kind, of in self.wrappers.items()}
        return made

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def set_model_optimized_attention(self, attention: Any) -> None:
        """What ComfyUI's own node for attention calls: no override that was there before is kept."""
        self.model_options["transformer_options"][KEY] = lambda _func, *args, **kwargs: attention(*args, **kwargs)


def _copied(options: dict[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in options.items()}


def sample(patcher: ModelPatcher, x: Tensor, text: Tensor, steps: int = 1) -> Tensor:
    """A sampler's run: its wrappers, then the steps."""

    def run() -> Tensor:
        out = x
        for _ in range(steps):
            out = patcher.model(out, text, transformer_options=patcher.model_options["transformer_options"])
        return out

    call: Callable[[], Tensor] = run
    for wrapper in [each for of in patcher.wrappers.get("outer_sample", {}).values() for each in of]:
        call = partial(wrapper, call)
    with torch.inference_mode():
        return call()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `comfy.ldm.modules.attention` and `comfy.patcher_extension` be imported, for one test."""
    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules", "comfy.ldm.modules.attention", "comfy.patcher_extension"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["comfy.ldm.modules.attention"], "wrap_attn", wrap_attn, raising=False)
    kinds = type("WrappersMP", (), {"OUTER_SAMPLE": "outer_sample"})
    monkeypatch.setattr(sys.modules["comfy.patcher_extension"], "WrappersMP", kinds, raising=False)
