"""How a picture is made, or a model trained: what a plan of the whole depends on besides the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from slicemod.planning.plan_options import DEVICES, DTYPES
from slicemod.planning.step_source import StepSource
from slicemod.planning.transformers import TransformerSource
from slicemod.planning.unet_step import StepKind
from slicemod.user_error import FieldError, UserError

Offload = Literal["none", "model", "sequential"]


@dataclass(frozen=True)
class PictureKind:
    """How a picture is made, or a model trained.

    Attributes:
        dtype: of weights and activations, such as "float16"; None takes float16 for UNets and bfloat16 for
            transformers.
        device: "cuda", "cpu" or "mps"; it need not be there.
        batch: items in the batch of the UNet or transformer; None takes one image, with guidance in inference.
        train: a step of training, instead of a picture.
        cached: in training, latents and embeddings are made beforehand, as `slicemod fit` does it. Otherwise text
            encoders and autoencoder stay loaded and run in every step.
        checkpoint_blocks: in training, with the model's own gradient checkpointing.
        feed_forward: in training, with feed-forwards in slices, as `swap_attention(unet, feed_forward=True)` has them.
            In inference slicemod's way always has them.
        offload: "none", or "model" or "sequential", which are diffusers' `enable_model_cpu_offload` and
            `enable_sequential_cpu_offload`: one part is loaded at a time, or one layer.
        prepared: in inference on a CPU, after `prepare_for_cpu` on the UNet or transformer. This machine's CPU decides
            how that computes.

    Raises:
        UserError: values that are not known, or do not go together.
    """

    dtype: str | None = None
    device: str = "cuda"
    batch: int | None = None
    train: bool = False
    cached: bool = True
    checkpoint_blocks: bool = False
    offload: Offload = "none"
    feed_forward: bool = False
    prepared: bool = False

    def __post_init__(self) -> None:
        for name, known in (("dtype", (None, *DTYPES)), ("device", DEVICES), ("offload", get_args(Offload))):
            if getattr(self, name) not in known:
                expected = ", ".join(str(value) for value in known)
                raise FieldError(f"{name}: expected one of {expected}; got {getattr(self, name)!r}. Correct it.")
        if self.batch is not None and self.batch < 1:
            raise FieldError(f"batch: expected 1 or more items; got {self.batch}.")
        if self.checkpoint_blocks and not self.train:
            raise FieldError("checkpoint_blocks: expected together with train; got it alone. Add train or leave it.")
        if self.feed_forward and not self.train:
            raise FieldError(
                "feed_forward: expected together with train, since inference always has them; got it alone. Add train "
                "or leave it."
            )
        if self.prepared:
            self._check_prepared()
        if not self.cached and not self.train:
            raise FieldError("cached: expected to be changed together with train; got it alone. Add train or leave it.")
        if self.offload != "none" and self.train:
            raise FieldError(
                f"offload: expected none with train, since diffusers offloads in inference alone; got "
                f"{self.offload!r}. Leave one of them."
            )

    def _check_prepared(self) -> None:
        if self.device != "cpu":
            raise FieldError(
                f"prepared: expected together with device cpu, since prepare_for_cpu is for CPUs; got {self.device}. "
                "Choose cpu or leave it."
            )
        if self.train:
            raise FieldError(
                "prepared: expected without train, since prepare_for_cpu is for inference; got both. Leave one of them."
            )
        if self.offload == "sequential":
            raise FieldError(
                "prepared: expected offload none or model, since prepare_for_cpu leaves layers alone whose weights "
                "come and go; got sequential. Leave one of them."
            )

    @classmethod
    def of(cls, given: PictureKind | Mapping[str, Any] | None) -> PictureKind:
        """The record itself, or one of a dict of its fields.

        Raises:
            UserError: a field that does not exist, or a value as above.
        """
        if isinstance(given, PictureKind):
            return given
        names = [field.name for field in fields(cls)]
        if unknown := set(given or {}) - set(names):
            raise UserError(f"kind: expected fields of {', '.join(names)}; got {', '.join(sorted(unknown))}.")
        return cls(**(given or {}))

    def step(self, source: StepSource) -> StepKind:
        """The step of the UNet or transformer."""
        default = "bfloat16" if isinstance(source, TransformerSource) else "float16"
        dtype: torch.dtype = getattr(torch, self.dtype or default)
        batch = (1 if self.train else source.guidance_batch) if self.batch is None else self.batch
        return StepKind(
            dtype,
            batch,
            self.device,
            self.train,
            self.checkpoint_blocks,
            streams_weights=self.offload == "sequential",
            prepared=self.prepared,
        )

    @property
    def together(self) -> bool:
        """All parts are loaded all the time."""
        return not self.cached if self.train else self.offload == "none"
