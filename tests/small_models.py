"""Models of diffusers and transformers, small and with random weights, and how each is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model, how often it attends in a call, and the call, which returns one tensor."""

    make: Callable[[], Any]
    attends: int
    call: Callable[[Any], Any]
    checkpoints: bool = True  # by diffusers' own `enable_gradient_checkpointing`


def noise(*sizes: int) -> Tensor:
    """The same for the same sizes, with a gradient."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1)).requires_grad_()


TIME = torch.tensor([1.0])


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def call_flux(model: Any) -> Any:
    return model(
        hidden_states=noise(1, 11, 4),
        encoder_hidden_states=noise(1, 7, 32),
        pooled_projections=noise(1, 32),
        img_ids=torch.ones(11, 3),
        txt_ids=torch.ones(7, 3),
        timestep=TIME,
    ).sample


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        out_channels=4,
    )


def call_sd3(model: Any) -> Any:
    return model(
        hidden_states=noise(1, 4, 8, 8),
        encoder_hidden_states=noise(1, 7, 32),
        pooled_projections=noise(1, 24),
        timestep=TIME,
    ).sample


def wan() -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def call_wan(model: Any) -> Any:
    return model(hidden_states=noise(1, 4, 2, 8, 8), encoder_hidden_states=noise(1, 7, 16), timestep=TIME).sample


def qwen_image() -> Any:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


def call_qwen_image(model: Any) -> Any:
    return model(
        hidden_states=noise(1, 16, 16),
        encoder_hidden_states=noise(1, 7, 16),
        encoder_hidden_states_mask=torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        timestep=TIME,
        img_shapes=[(1, 4, 4)],
    ).sample


def ltx() -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=16,
    )


def call_ltx(model: Any) -> Any:
    return model(
        hidden_states=noise(1, 2 * 4 * 5, 4),
        encoder_hidden_states=noise(1, 7, 16),
        timestep=TIME,
        encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        num_frames=2,
        height=4,
        width=5,
    ).sample


def pixart() -> Any:
    return diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=2,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=8,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=8,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
        caption_channels=None,
    )


def call_pixart(model: Any) -> Any:
    return model(
        hidden_states=noise(1, 4, 8, 8),
        encoder_hidden_states=noise(1, 7, 8),
        timestep=TIME,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=23,
    )


def call_unet(model: Any) -> Any:
    return model(noise(1, 4, 8, 8), TIME, noise(1, 7, 23)).sample


def vae() -> Any:
    return diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )


def call_vae(model: Any) -> Any:
    """By two methods which are not `forward`."""
    return model.decode(model.encode(noise(1, 3, 8, 8)).latent_dist.mean).sample


def clip() -> Any:
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=13,
            attn_implementation="sdpa",
        )
    )


TOKENS = torch.tensor([[5, 17, 29, 31, 2, 1, 1]])


def call_clip(model: Any) -> Any:
    return model(input_ids=TOKENS, attention_mask=(TOKENS != 1).long()).last_hidden_state


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=13,
            attn_implementation="sdpa",
        )
    )


def call_llama(model: Any) -> Any:
    return model(input_ids=TOKENS, use_cache=False).logits


CASES: dict[str, Case] = {
    "flux": Case(flux, 2, call_flux),
    "sd3": Case(sd3, 2, call_sd3),
    "wan": Case(wan, 4, call_wan),
    "qwen-image": Case(qwen_image, 2, call_qwen_image),
    "ltx": Case(ltx, 2, call_ltx),
    "pixart": Case(pixart, 2, call_pixart),
    "unet": Case(unet, 8, call_unet),
    "vae": Case(vae, 2, call_vae, checkpoints=False),
    "clip": Case(clip, 2, call_clip, checkpoints=False),
    "llama": Case(llama, 2, call_llama, checkpoints=False),
}


def output_and_gradients(model: nn.Module, call: Callable[[Any], Any]) -> dict[str, Tensor]:
    model.zero_grad()
    output: Tensor = call(model)
    output.square().mean().backward()  # type: ignore[no-untyped-call]
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"output": output.detach(), **gradients}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5, msg=name)
