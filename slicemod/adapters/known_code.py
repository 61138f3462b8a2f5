"""The code of `forward` that is known: to be plain attention, or a plain feed-forward, and nothing else.

Many packages have copies of the attention of CompVis LDM and Stability sgm, in modules of any name, and some copies
compute something else. The name of a class says little about this. So the code itself is compared, without its layout
and comments.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import Any

from slicemod.adapters.own_code import methods_from, owner_of

# Digests of `forward` together with the methods that it calls, and the packages in which they were found.
KNOWN = {
    # CrossAttention
    "b0029c5252cb5c99": "CompVis latent-diffusion and stable-diffusion, and most packages made from them",
    "7912d1b7a2dfb09b": "Stability stablediffusion, first version",
    "e1b563b8879ebcd9": "Stability stablediffusion, scores in float32",
    "bca67ffe7235e109": "Stability stablediffusion, stable-diffusion-sdkit, ControlNet",
    "bea0b5609ea5f142": "Stability generative-models (sgm), SUPIR",
    "d577fc3a2f0749be": "DiffBIR",
    "9e8bbfd5c6b483c6": "DiffBIR, an earlier version",
    "3ac5570b99a0c23e": "DiffBIR, an earlier version",
    "ddafa4f120744495": "stable-diffusion, optimized by basujindal",
    "c29e9e5646bcf03c": "VideoCrafter, an early version",
    "6a108dcddebe321f": "sd-scripts",
    "746da0f2982ac173": "sd-scripts, an earlier version",
    "c41fa1a0b066452a": "sd-scripts, for SDXL",
    # MemoryEfficientCrossAttention
    "f26dc137998c468b": "Stability stablediffusion, stable-diffusion-sdkit, ControlNet",
    "5a6c56ede3da3b09": "Stability generative-models (sgm), SUPIR",
    "b9e6ff0df2c551c4": "Stability generative-models (sgm), in batches",
    "412f3f5e899f267d": "DiffBIR, an earlier version",
    "d354d23e4db8d7ef": "DiffBIR",
    # AttnBlock
    "8c8b3fe3a2348e56": "CompVis taming-transformers, latent-diffusion, stable-diffusion, and packages made from them",
    "5a0faab245e4799f": "Stability generative-models (sgm), SUPIR",
    "5f54c92aacfb2b57": "Black Forest Labs flux, InvokeAI, sd-scripts",
    "7a98aec82c251a76": "Stability sd3.5, sd-scripts",
    "0d111d855c104721": "Stability sd3-ref",
    "2c7b87eda6a99594": "HunyuanImage in sd-scripts",
    "b87ea18ac22d02f3": "InvokeAI",
    "a108c26b65429525": "InvokeAI, an earlier version",
    "e6a13d9b890bfd72": "InvokeAI, an earlier version",
    "4a956c78325e6268": "stable-diffusion, optimized by Doggettx",
    "6220eb3cdf997ea4": "stable-diffusion, optimized by Doggettx, an earlier version",
    "9367b073a34bda5c": "ComfyUI",
    # MemoryEfficientAttnBlock
    "7af197bdc7484c6f": "Stability stablediffusion, stable-diffusion-sdkit, ControlNet",
    "bd28dc341a78bff9": "Stability generative-models (sgm), SUPIR",
    "4541db467f4fbcaf": "StableSR",
    "1f2e005f52e1000c": "DiffBIR, an earlier version",
    "ccfdd71f1fd98d48": "DiffBIR",
    # SpatialSelfAttention
    "567eb9aea96ffd46": "CompVis latent-diffusion, and packages made from it",
    "c25b4bcc641ee4c6": "InvokeAI",
}

# Digests of feed-forwards that call the parts of their `net` one after the other.
KNOWN_FEED_FORWARDS = {
    "21251b88a3d24e89": "diffusers",
    "8a10bc845cc06684": "CompVis latent-diffusion and stable-diffusion, Stability sgm, and packages made from them",
}

# Digests of activations with their projection that compute each token by itself.
KNOWN_ACTIVATIONS = {
    "c139ff191caeeb0f": "diffusers, GELU",
    "12e2462a06d651ac": "diffusers, GEGLU",
    "36f0ba0d7ac090a4": "diffusers, SwiGLU",
    "6c2c1c4cbcd0d5f6": "diffusers, ApproximateGELU",
    "3f4138280077dccf": "diffusers, LinearActivation",
    "71cf39891f321e91": "CompVis and Stability sgm, GEGLU",
}

# Digests of a VAE's encoder, decoder and their parts, which `adapters/vae.py` computes in strips.
KNOWN_VAE = {
    "c182f0e14c43622c": "diffusers, Decoder",
    "514e26c945519e35": "diffusers, Encoder",
    "1e4838983d8b5c5a": "diffusers, ResnetBlock2D",
    "64f580281092f207": "diffusers, ResnetBlock2D, before 0.37",
    "876c9650b607b3de": "diffusers, Upsample2D",
    "ccff0479b5a7d9c7": "diffusers, Downsample2D",
    "c5bd0f4f6fc918bb": "diffusers, UNetMidBlock2D",
    "9c3d6e0da32c0376": "diffusers, UpDecoderBlock2D",
    "af5d87802f8ecdc9": "diffusers, DownEncoderBlock2D",
    "dddd43302cc1bb73": "CompVis and Stability, Decoder",
    "759a5c53e2b77ae4": "CompVis and Stability, Encoder",
    "121d458a916e66a1": "CompVis and Stability, ResnetBlock",
    "821a1092b63d99b6": "CompVis and Stability, Upsample",
    "205acd4c402c1c20": "CompVis and Stability, Downsample",
}

_NOT_CODE = {"annotation", "returns", "type_comment", "decorator_list", "ctx", "kind", "type_params"}


def is_known(kind: type, known: Mapping[str, str] = KNOWN) -> bool:
    """Whether `forward` of the class, with the methods that it calls, is one of the known codes: of plain attention."""
    codes = forward_methods(kind)
    return bool(codes) and digest(tuple(codes.values())) in known


def forward_methods(kind: type) -> dict[str, CodeType]:
    """`forward` and the methods that it calls, by name. Empty if `forward` is not a plain function."""
    owner = owner_of(kind, "forward")
    forward = None if owner is None else vars(owner)["forward"]
    return dict(methods_from(kind, forward.__code__, "forward")) if isinstance(forward, FunctionType) else {}


@functools.lru_cache(maxsize=256)
def digest(codes: tuple[CodeType, ...]) -> str | None:
    """A digest that is the same for the same code in another layout. None if the source is not available."""
    try:
        sources = [textwrap.dedent(inspect.getsource(code)) for code in codes]
        plain = repr([_plain(ast.parse(source).body[0]) for source in sources])
    except (OSError, TypeError, SyntaxError):
        return None
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def _plain(node: Any) -> Any:
    """A syntax tree as tuples, without annotations, decorators and docstrings."""
    if isinstance(node, ast.AST):
        fields = (_plain(value) for name, value in ast.iter_fields(node) if name not in _NOT_CODE)
        return (type(node).__name__, *fields)
    if isinstance(node, list):
        return tuple(_plain(part) for part in node if not _is_text(part))
    return node


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
