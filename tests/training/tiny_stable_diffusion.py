"""Small random models of Stable Diffusion's classes, images to train them on, and a configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from slicemod.training.common.checkpoints import write_safetensors
from slicemod.training.stable_diffusion.content_hash import text_digest
from slicemod.training.stable_diffusion.lightning_module import StableDiffusion
from slicemod.training.stable_diffusion.text_encoders import CutCaption, TextEmbeddings

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENS, WIDTH, POOLED = 7, 24, 12
SIZES = {"cat.png": (40, 32), "dog.png": (32, 40), "sea.jpg": (33, 33), "sky.webp": (64, 64), "sun.png": (36, 30)}

SYMBOLS = [
    "<|startoftext|>",
    "<|endoftext|>",
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"),
]

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"attention_head_dim": 2},
    "sd21": {"attention_head_dim": [2, 4], "use_linear_projection": True},
    "sdxl": {
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": POOLED + 6 * 4,
    },
}


def write_tiny_model(folder: Path, kind: str, *, channels: tuple[int, int] = (8, 16), in_channels: int = 4) -> Path:
    """Writes unet/, vae/ and scheduler/ of a small random model of ``kind``, sd15, sd21 or sdxl."""
    torch.manual_seed(3)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        in_channels=in_channels,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **UNETS[kind],
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    ).save_pretrained(folder / "vae")
    DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction" if kind == "sd21" else "epsilon",
    ).save_pretrained(folder / "scheduler")
    return folder


def write_text_parts(folder: Path) -> None:
    """Writes what stands for text_encoder/ and tokenizer/ where they are only copied: tensors by CLIP's names."""
    write_safetensors(folder / "text_encoder" / "model.safetensors", clip_tensors(1, 6), {"format": "pt"})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")


def clip_tensors(layers: int, width: int) -> dict[str, Tensor]:
    """A CLIP text encoder's, by transformers' names."""
    each = {"layer_norm1": 1, "layer_norm2": 1, "mlp.fc1": 2, "mlp.fc2": 2} | {
        f"self_attn.{part}_proj": 2 for part in ("q", "k", "v", "out")
    }
    tensors = {
        f"encoder.layers.{layer}.{name}.{kind}": torch.randn(*[width] * (ndim if kind == "weight" else 1))
        for layer in range(layers)
        for name, ndim in each.items()
        for kind in ("weight", "bias")
    }
    for name in ("embeddings.position_embedding.weight", "embeddings.token_embedding.weight"):
        tensors[name] = torch.randn(11, width)
    return tensors | {f"final_layer_norm.{kind}": torch.randn(width) for kind in ("weight", "bias")}


def write_images(folder: Path) -> Path:
    """Writes five captioned images of several shapes."""
    folder.mkdir(parents=True)
    for number, (name, size) in enumerate(SIZES.items()):
        colour = (50 * number, 255 - 40 * number, 90)
        picture = Image.new("RGB", size, colour)
        picture.paste((255, 0, 200), (3, 5, 11, 19))
        picture.save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"a photo of a {name[:3]}\n")
    return folder


def write_text_encoder(folder: Path, number: str, width: int, *, projected: bool, length: int) -> None:
    """A small random CLIP text encoder that takes ``length`` tokens, and a vocabulary of letters."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(SYMBOLS), hidden_size=width, intermediate_size=13, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, projection_dim=POOLED, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    kind(config).save_pretrained(folder / f"text_encoder{number}")
    tokenizer = folder / f"tokenizer{number}"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({symbol: place for place, symbol in enumerate(SYMBOLS)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "pad_token": "<|endoftext|>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))


def whole_model(folder: Path, kind: str, *, length: int = 11) -> Path:
    """A small random model with text encoders."""
    write_tiny_model(folder, kind)
    if kind == "sdxl":
        write_text_encoder(folder, "", 8, projected=False, length=length)
        write_text_encoder(folder, "_2", WIDTH - 8, projected=True, length=length)
    else:
        write_text_encoder(folder, "", WIDTH, projected=False, length=length)
    return folder


def write_scheduler(folder: Path, kind: str, **settings: Any) -> None:
    """Writes scheduler/ anew: of another class of diffusers, with the schedule that is there."""
    there = DDPMScheduler.load_config(folder, subfolder="scheduler")
    getattr(diffusers, kind).from_config(there, **settings).save_pretrained(folder / "scheduler")


def write_checkpoint(path: Path, source: Path, **settings: Any) -> Path:
    """A checkpoint of a run of which nothing but the weights that it would train is made up."""
    model = StableDiffusion(str(source), **settings)
    draw = torch.Generator().manual_seed(11)
    state = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=draw) for name, tensor in model.state_dict().items()
    }
    content: dict[str, Any] = {"state_dict": state, "global_step": 3}
    model.on_save_checkpoint(content)
    torch.save(content, path)
    return path


class LetterEncoders:
    """Stands for the text encoders where their text does not matter: random embeddings that a caption chooses."""

    def __init__(self, *, pooled: bool) -> None:
        self.pooled = pooled

    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Random (B, 7, 24) and (B, 12)."""
        rows = [self._row(caption) for caption in captions]
        return TextEmbeddings(
            torch.stack([row[: TOKENS * WIDTH].view(TOKENS, WIDTH) for row in rows]),
            torch.stack([row[TOKENS * WIDTH :] for row in rows]) if self.pooled else None,
        )

    def digest(self) -> str:
        """Always the same."""
        return "letters"

    def cut(self, captions: Sequence[str]) -> list[CutCaption]:
        """None."""
        return []

    def to(self, device: Any) -> None:
        """Nothing to move."""

    def _row(self, caption: str) -> Tensor:
        draw = torch.Generator().manual_seed(int(text_digest(caption)[:12], 16))
        return torch.randn(TOKENS * WIDTH + POOLED, generator=draw)


def letter_encoders(pretrained: Any, max_tokens: int = 75) -> LetterEncoders:
    """In the place of ``load_text_encoders``."""
    return LetterEncoders(pooled=pretrained.unet_config().get("addition_embed_type") == "text_time")


def tiny_config(name: str, source: Path, images: Path, **changes: Any) -> dict[str, Any]:
    """configs/``name`` for a tiny model: its own settings, at small sizes and for few steps on the CPU."""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / name).read_text())
    config["model"]["source"] = str(source)
    config["model"].update(changes.pop("model", {}))
    config["attention"] = {"budget": "1MiB", "policy": "exact", "kernel": "math"}
    config["data"].update(
        folder=str(images), cache="cache", resolution=32, bucket_step=8, batch_size=2, val_count=1, max_ratio=1.5
    )
    config["data"].update(changes.pop("data", {}))
    schedule = (config["model"].get("lr_scheduler") or {}).get("init_args", {})
    if "total_steps" in schedule:
        schedule.update(total_steps=20, warmup_steps=2)
    config["trainer"].update(
        accelerator="cpu",
        precision="32-true",
        max_steps=4,
        accumulate_grad_batches=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    config["trainer"].update(changes.pop("trainer", {}))
    for callback in list(config["trainer"]["callbacks"]):
        settings = callback.setdefault("init_args", {})
        kind = callback["class_path"].rpartition(".")[2]
        if kind == "LastCheckpoint":
            settings.update(dirpath="checkpoints", every_n_train_steps=2)
        elif kind == "SampleImages":
            settings.update(prompts=["a photo of a cat", "the sea"], folder="samples", steps=2)
        elif kind.endswith("ProgressBar"):
            config["trainer"]["callbacks"].remove(callback)
    config["trainer"]["logger"] = [
        {"class_path": f"lightning.pytorch.loggers.{kind}", "init_args": {"save_dir": "logs", "name": name}}
        for kind, name in (("CSVLogger", "csv"), ("TensorBoardLogger", "tensorboard"))
    ]
    return config | changes


def write_config(folder: Path, config: dict[str, Any]) -> str:
    """Writes a configuration as ``folder``/tiny.yaml and returns its path."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)
