"""FSDP2: weights, gradients and optimiser states in shards, one on each rank.

In training one decoder layer at a time is whole. While a batch is collected, and in evaluation, all of the model is: ranks
decode different lengths, and would otherwise wait for each other at every layer of every token. So a batch costs one
gathering of the model, and each rank must have room for all weights, but not for gradients and optimiser states.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lit_rl.checks import ConfigurationError

T = TypeVar("T")


class FSDP2(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with all ranks in one data-parallel group; `--trainer.strategy fsdp2`.

    Args:
        save_distributed_checkpoint: Write a folder of shards. Else a checkpoint is one file, for which rank 0 needs the
            memory, and which any strategy and any number of ranks can load.
        kwargs: As in ModelParallelStrategy.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2, description="FSDP2: weights, gradients and optimiser states in shards")


def refuse_unsupported(strategy: Strategy, model: nn.Module, adapters: bool) -> None:
    """Raises ConfigurationError for a strategy under which this model cannot run."""
    name = type(strategy).__name__
    if name.startswith(("FSDPS", "DeepSpeed")):
        raise ConfigurationError(
            f"{name} is not supported: set the Trainer's strategy to fsdp2, which shards as much, or to ddp"
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
        raise ConfigurationError(
            f"tensor_parallel_size is {size}: it must be 1, since each rank samples by itself. The strategy fsdp2 is that."
        )
    if getattr(model, "is_loaded_in_4bit", False):
        raise ConfigurationError(
            "weights in 4 bits cannot be sharded, and are small: set the Trainer's strategy to ddp"
        )
    if adapters and strategy._save_distributed_checkpoint:
        raise ConfigurationError(
            "adapters are saved in one file: set the strategy's save_distributed_checkpoint to false"
        )
    if not hasattr(FSDPModule, "set_reshard_after_forward"):
        raise ConfigurationError(
            f"fsdp2 needs a newer torch than {torch.__version__}: pip install --upgrade torch, or use ddp"
        )


def shard(model: nn.Module, mesh: Any) -> None:
    """Shards each decoder layer, and then the rest, over a one-dimensional mesh. The weights are rank 0's, as in DDP."""
    if is_sharded(model) or next(model.parameters(), None) is None:
        return
    layers = set(getattr(model, "_no_split_modules", None) or [])
    for unit in [*(m for m in model.modules() if type(m).__name__ in layers), model]:
        unit.to(mesh.device_type)
        for tensor in (*unit.parameters(), *unit.buffers()):
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor.detach(), 0)
        fully_shard(unit, mesh=mesh)
    model.is_whole = False  # type: ignore[assignment]
    model.run_as_forward = lambda function: function()  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_as_forward")


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def plain_class(model: nn.Module) -> type:
    """The class that a model had before it was sharded."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def run_as_forward(model: nn.Module, function: Callable[[], T]) -> T:
    """function(), which may call parts of the model and read its weights, as the model's own forward may."""
    return model.run_as_forward(function) if is_sharded(model) else function()  # type: ignore[operator,no-any-return]


def gather(model: nn.Module) -> None:
    """Makes a sharded model whole on every rank, so that no pass communicates, until `release`. All ranks must call it.
    Other models are whole anyway."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(False)
        with torch.inference_mode(False):  # or the tensors made here could not be trained with
            for unit in model.modules():
                if isinstance(unit, FSDPModule):
                    unit.unshard()
        model.is_whole = True  # type: ignore[assignment]


def release(model: nn.Module) -> None:
    """Each rank keeps its shard alone."""
    if isinstance(model, FSDPModule):
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.set_reshard_after_forward(unit is not model, recurse=False)  # the root's, backward needs at once
                unit.reshard()
        model.is_whole = False  # type: ignore[assignment]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """`gather`, and `release` at the end of the block, unless the model is whole already."""
    if getattr(model, "is_whole", True):
        yield
        return
    gather(model)
    try:
        yield
    finally:
        release(model)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights, in CPU memory on rank 0; nothing on the others. All ranks must call it."""
    return get_model_state_dict(  # type: ignore[return-value]
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def load_shards(weights: dict[str, Tensor], folder: Path) -> None:
    """Reads a checkpoint that is a folder of shards into these tensors, in one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be
        dcp.load({"state_dict": weights}, checkpoint_id=folder, no_dist=True)
