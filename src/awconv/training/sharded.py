"""Training with parameters that are shared out among the processes (FSDP)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from awconv.tasks.sharding import by_name, by_number

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Sharded(ModelParallelStrategy):
    """Shares out parameters, gradients and the optimizer's state among all processes, by torch's ``fully_shard``.

    Lightning's own ``fsdp`` flattens parameters, and needs GPUs. Here they keep their shapes, by which weight decay is
    decided. Checkpoints are those of a training by one process, and such a training may go on from them.

    Args:
        timeout: how long a process waits for the others.
    """

    strategy_name = "fsdp"

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        if self._layer_sync is not None:  # trainer.sync_batchnorm, while the parameters are whole
            self._layer_sync.apply(self.lightning_module)  # type: ignore[arg-type]

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Gives all processes the buffers of the first, such as BatchNorm's statistics, as DDP does."""
        self._share_buffers()

    def on_validation_start(self) -> None:
        self._share_buffers()

    def on_test_start(self) -> None:
        self._share_buffers()

    def _share_buffers(self) -> None:
        assert self.model is not None
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.model.buffers():
            kinds.setdefault(buffer.dtype, []).append(buffer)
        for buffers in kinds.values():
            together = torch.cat([buffer.flatten() for buffer in buffers])
            distributed.broadcast(together, 0)
            for buffer, part in zip(buffers, together.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.model is not None
        state: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer, options=_FULL)  # type: ignore[assignment]
        return by_number(state) if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            of_groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
            set_optimizer_state_dict(self.model, optimizer, by_name(state, of_groups), options=_FULL)


def chosen(strategy: Any, timeout: timedelta) -> Strategy | None:
    """The strategy in place of Lightning's ``fsdp``; None for another one.

    Raises:
        ValueError: it is a kind of FSDP that awconv does not train with.
    """
    if strategy == "fsdp":
        return Sharded(timeout)
    if strategy == "fsdp_cpu_offload" or isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        given = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise ValueError(
            f"trainer.strategy must be fsdp to share out parameters, without further arguments, got {given}"
        )
    return None
