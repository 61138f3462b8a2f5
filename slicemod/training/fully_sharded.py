"""Fully sharded training: every process keeps its part of the weights, their gradients and the optimizer's state."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

LAYERS = (BasicTransformerBlock, ResnetBlock2D)  # gathered whole while they run


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for ``fully_shard``, over all processes; `--trainer.strategy fsdp` means this one.

    Lightning's own "fsdp" wraps the model into the older FullyShardedDataParallel, which runs on no CPU. Checkpoints
    are single files, which one process or several continue from.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Makes one group of all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(unet: UNet2DConditionModel, mesh: DeviceMesh) -> None:
    """Shards a UNet in place over a mesh of one dimension; does nothing the second time."""
    if isinstance(unet, FSDPModule):
        return
    for layer in unet.modules():
        if isinstance(layer, LAYERS):
            fully_shard(layer, mesh=mesh)
    fully_shard(unet, mesh=mesh)  # the rest, gathered throughout the step
