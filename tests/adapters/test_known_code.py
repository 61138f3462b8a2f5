"""Which code is known, however it is laid out, and that nothing else passes for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ldm.modules import attention as ldm_attention
from ldm.modules.diffusionmodules import model as ldm_model
from torch import Tensor, nn

from slicemod.adapters.known_code import KNOWN, digest, forward_methods, is_known

LDM = [
    ldm_attention.CrossAttention,
    ldm_attention.MemoryEfficientCrossAttention,
    ldm_attention.SpatialSelfAttention,
    ldm_model.AttnBlock,
    ldm_model.MemoryEfficientAttnBlock,
]


@pytest.mark.parametrize("kind", LDM, ids=lambda kind: kind.__name__)
def test_the_attention_of_stable_diffusion_is_known(kind: type) -> None:
    assert is_known(kind)


class Plain(nn.Module):
    def forward(self, x, scale=2.5):  # type: ignore[no-untyped-def]
        # The halves, and then what is left.
        first, second = self.halves(x, scale)  # type: ignore[no-untyped-call]
        return torch.cat([first, second], dim=1)

    def halves(self, x, scale):  # type: ignore[no-untyped-def]
        return (scale * x).chunk(2)


class LaidOut(nn.Module):
    def forward(self, x: Tensor, scale: float = 2.5) -> Tensor:
        """The halves."""
        (first, second) = self.halves(
            x,
            scale,
        )
        return torch.cat([first, second], dim=1)

    def halves(self, x: Tensor, scale: float) -> Any:
        return (scale * x).chunk(2)


class OtherNumber(Plain):
    def halves(self, x, scale):  # type: ignore[no-untyped-def]
        return (scale * x).chunk(3)


class OtherOrder(nn.Module):
    def forward(self, x, scale=2.5):  # type: ignore[no-untyped-def]
        first, second = self.halves(x, scale)
        return torch.cat([second, first], dim=1)

    halves: Any = Plain.halves


def digest_of(kind: type) -> str | None:
    return digest(tuple(forward_methods(kind).values()))


def test_layout_comments_and_annotations_make_no_difference() -> None:
    assert list(forward_methods(Plain)) == ["forward", "halves"]
    assert digest_of(Plain) == digest_of(LaidOut)
    assert digest_of(Plain) is not None


@pytest.mark.parametrize("other", [OtherNumber, OtherOrder], ids=lambda kind: kind.__name__)
def test_other_code_is_another_one_also_in_what_forward_calls(other: type) -> None:
    assert digest_of(other) not in (None, digest_of(Plain))


def test_code_without_a_source_is_not_known() -> None:
    space: dict[str, Any] = {}
    exec(compile("def forward(self, x): return x", "no file", "exec"), space)
    assert digest_of(type("Made", (nn.Module,), {"forward": space["forward"]})) is None
    assert None not in KNOWN
    assert not is_known(type("Made", (nn.Module,), {"forward": space["forward"]}))


def test_a_module_without_a_forward_of_its_own_has_no_code() -> None:
    assert forward_methods(nn.Module) == {}
    assert not is_known(nn.ModuleList)
