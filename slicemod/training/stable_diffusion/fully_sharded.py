"""Fully sharded training: every process keeps its part of the weights, their gradients and the optimizer's state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

LAYERS = (BasicTransformerBlock, ResnetBlock2D)  # gathered whole while they run


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for ``fully_shard``, over all processes; `--trainer.strategy fsdp` means this one.

    Lightning's own "fsdp" wraps the model into the older FullyShardedDataParallel, which runs on no CPU. Checkpoints
    are those of one process, and any number of processes continues from them.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Makes one group of all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's whole state on the first process, its parameters numbered as the optimizer has them.

        Lightning's own numbers all parameters of the model, and one process that trains a part of them reads others.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        named = get_optimizer_state_dict(self._module, own, options=options)
        return _renamed(named, {name: number for number, name in enumerate(self._trained)}) if named else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads weights and the optimizers' state into what this process keeps of them."""
        checkpoint: dict[str, Any] = torch.load(
            self.broadcast(checkpoint_path),
            map_location="cpu",
            mmap=os.name != "nt",  # Windows replaces no file that is still mapped into memory
            weights_only=weights_only,
        )
        module = self._module
        options = StateDictOptions(full_state_dict=True, strict=module.strict_loading)
        set_model_state_dict(module, checkpoint["state_dict"], options=options)
        names = dict(enumerate(self._trained))
        for optimizer, state in zip(
            self.optimizers, checkpoint["optimizer_states"] if self.optimizers else (), strict=True
        ):
            set_optimizer_state_dict(module, optimizer, _renamed(state, names), options=options)
        return checkpoint

    @property
    def _module(self) -> Any:
        return self.lightning_module

    @property
    def _trained(self) -> list[str]:
        return [name for name, parameter in self._module.named_parameters() if parameter.requires_grad]


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other names of its parameters."""
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}


def shard(unet: UNet2DConditionModel, mesh: DeviceMesh) -> None:
    """Shards a UNet in place over a mesh of one dimension; does nothing the second time."""
    if isinstance(unet, FSDPModule):
        return
    for layer in unet.modules():
        if isinstance(layer, LAYERS):
            fully_shard(layer, mesh=mesh)
    fully_shard(unet, mesh=mesh)  # the rest, gathered throughout the step
