"""What a model has to be so that it is known what to feed it; asked before any work is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from slicemod.training.stable_diffusion.text_encoders import TextEmbeddings
from slicemod.user_error import UserError

TIME_IDS = 6  # of SDXL: height and width of the image, top and left of the crop, height and width drawn


def require_known_kind(unet: Mapping[str, Any], autoencoder: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    """Checks the configs of a model's parts.

    Raises:
        UserError: the model takes or gives something else than SD1.x, SD2.x and SDXL do.
    """
    wrong = next(_obstacles(unet, autoencoder, scheduler), None)
    if wrong is not None:
        raise UserError(
            f"model.source: {wrong}. Expected a model that makes latents from noise and text, as SD1.x, SD2.x and SDXL"
            " do. Name the model that this one was made from."
        )


def _obstacles(unet: Mapping[str, Any], autoencoder: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Iterator[str]:
    kind = unet.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        yield f"the UNet is a {kind}"
    latents, taken, given = autoencoder["latent_channels"], unet["in_channels"], unet["out_channels"]
    if taken != latents:
        inpainting = ", a mask and a masked image besides, as inpainting models do" if taken == 2 * latents + 1 else ""
        yield f"the UNet takes {taken} channels, where a latent has {latents}{inpainting}"
    if given != latents:
        yield f"the UNet gives {given} channels, where a latent has {latents}"
    if unet.get("addition_embed_type") not in (None, "text_time"):
        yield f"the UNet looks at {unet['addition_embed_type']} (addition_embed_type)"
    for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim"):
        if unet.get(name) is not None:
            yield f"the UNet has {name} {unet[name]}"
    if "beta_schedule" not in scheduler:
        yield f"the scheduler, {scheduler.get('_class_name')}, has no beta_schedule to add noise by"
    for name in ("latents_mean", "shift_factor"):
        if autoencoder.get(name) is not None:
            yield f"the autoencoder's latents have a {name}"


def require_matching_text(unet: Mapping[str, Any], text: TextEmbeddings) -> None:
    """Checks that embeddings are what a UNet looks at.

    Raises:
        UserError: they are of another width.
    """
    pairs = [("embeddings", unet["cross_attention_dim"], text.context.shape[-1])]
    if unet.get("addition_embed_type") == "text_time":
        summary = unet["projection_class_embeddings_input_dim"] - TIME_IDS * unet["addition_time_embed_dim"]
        pairs.append(("summary", summary, 0 if text.pooled is None else text.pooled.shape[-1]))
    for what, wanted, got in pairs:
        if wanted != got:
            raise UserError(
                f"model.source: expected text encoders whose {what} is {wanted} wide, as the UNet looks at, got {got}."
                " Name a folder whose parts belong together."
            )
