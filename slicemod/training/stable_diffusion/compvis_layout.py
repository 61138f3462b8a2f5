"""Stable Diffusion's weights under the names of CompVis and sgm, in one file.

The inverse of what diffusers does when it reads such a file; every name here is one that diffusers and webuis expect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slicemod.user_error import UserError

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
SD1_TEXT, SD2_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
SDXL_TEXT = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_AUTOENCODER_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPENCLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
_OPENCLIP_ENDS = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def unet_to_compvis(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A diffusers UNet's state dict under CompVis names.

    Args:
        tensors: the state dict.
        config: the UNet's; ``layers_per_block`` has to be a number.

    Raises:
        UserError: a tensor has no place in that layout.
    """
    if not isinstance(config["layers_per_block"], int):
        raise UserError(
            f"The layout of CompVis and sgm has as many layers in each block of the UNet: expected a whole number of"
            f" layers_per_block, got {config['layers_per_block']}. Export a diffusers folder instead."
        )
    return {UNET + _unet_name(name, config): tensor for name, tensor in tensors.items()}


def autoencoder_to_compvis(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """An ``AutoencoderKL``'s state dict under CompVis names; its attention's matrices become 1x1 convolutions.

    Raises:
        UserError: a tensor has no place in that layout.
    """
    blocks = len(config["block_out_channels"])
    converted = {}
    for name, tensor in tensors.items():
        is_matrix = ".attentions." in name and tensor.ndim == 2
        converted[AUTOENCODER + _autoencoder_name(name, blocks)] = tensor[:, :, None, None] if is_matrix else tensor
    return converted


def text_encoders_to_compvis(encoders: Sequence[Mapping[str, Tensor]], *, openclip: bool) -> dict[str, Tensor]:
    """The state dicts of transformers' CLIP text encoders under CompVis or sgm names.

    Args:
        encoders: of SD1.x's or SD2.x's one, or of SDXL's two.
        openclip: the one encoder is SD2.x's, which open_clip trained.
    """
    if len(encoders) == 2:
        first, second = encoders
        return _clip(first, SDXL_TEXT[0]) | _openclip(second, SDXL_TEXT[1])
    return _openclip(encoders[0], SD2_TEXT) if openclip else _clip(encoders[0], SD1_TEXT)


def _clip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    # transformers 5.6 and later leave "text_model." out of the names
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def _openclip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    plain = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    converted = {}
    for name, tensor in plain.items():
        if name == "text_projection.weight":
            converted["text_projection"] = tensor.T
        elif name in _OPENCLIP_ENDS:
            converted[_OPENCLIP_ENDS[name]] = tensor
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [plain[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            converted[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            if match[2] not in ("self_attn.k_proj", "self_attn.v_proj"):  # went with q_proj
                if match[2] not in _OPENCLIP:
                    raise _no_place(name)
                converted[f"transformer.resblocks.{match[1]}.{_OPENCLIP[match[2]]}.{match[3]}"] = tensor
        elif name != "embeddings.position_ids":  # counts from 0; older files hold it
            raise _no_place(name)
    return {prefix + name: tensor for name, tensor in converted.items()}


def _unet_name(name: str, config: Mapping[str, Any]) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _UNET_ENDS:
        return f"{_UNET_ENDS[stem]}.{kind}"
    each = int(config["layers_per_block"]) + 1
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        side, block, part, layer, rest = match.groups()
        place = int(block) * each + int(layer) + (side == "down")  # the first input block is conv_in
        blocks = "input_blocks" if side == "down" else "output_blocks"
        return f"{blocks}.{place}.0.{_resnet_name(rest)}" if part == "resnets" else f"{blocks}.{place}.1.{rest}"
    if match := re.fullmatch(r"mid_block\.resnets\.(\d+)\.(.+)", name):
        return f"middle_block.{2 * int(match[1])}.{_resnet_name(match[2])}"
    if match := re.fullmatch(r"mid_block\.attentions\.(\d+)\.(.+)", name):
        return f"middle_block.{2 * int(match[1]) + 1}.{match[2]}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", name):
        return f"input_blocks.{(int(match[1]) + 1) * each}.0.op.{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", name):
        after = 2 if "CrossAttn" in config["up_block_types"][int(match[1])] else 1
        return f"output_blocks.{(int(match[1]) + 1) * each - 1}.{after}.conv.{match[2]}"
    raise _no_place(name)


def _resnet_name(rest: str) -> str:
    part, _, kind = rest.rpartition(".")
    if part not in _UNET_RESNET:
        raise _no_place(rest)
    return f"{_UNET_RESNET[part]}.{kind}"


def _autoencoder_name(name: str, blocks: int) -> str:
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return name
    half, _, rest = name.partition(".")  # encoder or decoder
    rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|\w+samplers\.0)\.(.+)", rest):
        side, block, layer, end = match.groups()
        place = int(block) if side == "down" else blocks - 1 - int(block)
        return f"{half}.{side}.{place}.{f'{side}sample' if layer is None else f'block.{layer}'}.{end}"
    if match := re.fullmatch(r"mid_block\.resnets\.(\d+)\.(.+)", rest):
        return f"{half}.mid.block_{int(match[1]) + 1}.{match[2]}"
    match = re.fullmatch(r"mid_block\.attentions\.0\.(.+)\.(weight|bias)", rest)
    if match and match[1] in _AUTOENCODER_ATTENTION:
        return f"{half}.mid.attn_1.{_AUTOENCODER_ATTENTION[match[1]]}.{match[2]}"
    if rest.startswith(("conv_in.", "conv_out.", "norm_out.")):
        return f"{half}.{rest}"
    raise _no_place(name)


def _no_place(name: str) -> UserError:
    return UserError(
        f"The tensor {name} has no place in the layout of CompVis and sgm: expected a UNet, autoencoder and text"
        " encoders of SD1.x, SD2.x or SDXL. Export a diffusers folder instead."
    )
