"""An exponential moving average of the weights, by Lightning's own callback."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from slicemod.user_error import UserError


class WeightAverage(WeightAveraging):
    """The average is what is validated, what checkpoints hold and what the weights are in the end.

    Lightning's ``EMAWeightAveraging`` adds two products, whose rounding moves weights that are not trained; this one
    interpolates, which leaves equal weights as they are.

    Args:
        decay: share of the average that each step keeps.
        device: where the average is kept, such as "cpu"; None is where the weights are.
    """

    def __init__(self, decay: float = 0.999, device: str | None = None) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"WeightAverage.decay must be from 0 to below 1, got {decay}: 0.999 is usual.")
        super().__init__(device=device, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copies the weights.

        Raises:
            UserError: they are sharded.
        """
        if pl_module.device_mesh is not None:
            raise UserError(
                "WeightAverage keeps a whole copy of the weights in every process, got a strategy that shards them."
                " Leave it out of trainer.callbacks, or use trainer.strategy: ddp."
            )
        super().setup(trainer, pl_module, stage)
