"""A training that several processes share, one for each device, by DistributedDataParallel.

Every process holds all data. From each batch it takes every world-th sample, starting at its rank.
So each sample is used once an epoch, and the sum of the gradients is that of the whole batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..data.dataset import Dataset
from . import means

if dist.is_available():
    # Its functions have the process group of the time of this import as a default argument, which
    # keeps that group for ever. DistributedDataParallel imports it after the group has started.
    # `destroy_process_group` then leaves the group's threads running, and they may abort a process
    # that ends ("terminate called without an active exception").
    import torch.distributed.nn.functional


def world() -> int:
    """The number of processes that share this training, or 1."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Shared:
    """The steps of an Autograd engine in one of several processes."""

    def __init__(self, engine: Any):
        self.engine, self.rank, self.world = engine, dist.get_rank(), dist.get_world_size()
        self.model = DistributedDataParallel(engine.model)

    def epoch(
        self,
        data: Dataset,
        order: torch.Tensor,
        batch_size: int,
        on_step: Callable[..., object] | None,
    ) -> Any:
        """As `Engine.epoch`. Loss and accuracy are those of all processes together."""
        values, correct = [], torch.zeros(2, dtype=torch.int64, device=order.device)
        for indices in order.split(batch_size):
            mine = indices[self.rank :: self.world]
            value, output, y = self._step(data, indices, mine)
            dist.all_reduce(value)
            values.append(value)
            if data.is_classification and len(mine):
                right = means.right(self.engine.loss, output.argmax(1), y)
                correct += torch.tensor(right, device=order.device)
            if on_step is not None and on_step() is False:
                raise ValueError("fit: on_step cannot end a training that several devices share")
        dist.all_reduce(correct)
        numbers = torch.stack(values).tolist() if values else []
        result = self.engine.result(numbers, None, data, order, batch_size)
        if not data.is_classification:
            return result
        return result._replace(accuracy=int(correct[0]) / max(int(correct[1]), 1))

    def _step(self, data: Dataset, whole: torch.Tensor, mine: torch.Tensor):
        """Train on this process's samples of a batch.

        Returns (its part of the batch's loss, its outputs, its targets).
        """
        engine = self.engine
        share = means.share(engine.loss, data.targets[mine], data.targets[whole])
        # A process without a sample computes one with share 0, because the others wait for it.
        x, y = data.batch(mine if len(mine) else whole[:1], engine.dtype)
        engine.optimizer.zero_grad()  # before the forward, which can then use their memory
        with engine.precision.context(x.device):
            output = self.model(x if engine.shape is None else x.view(len(x), *engine.shape))
            value = engine.loss(output, means.aligned(y, output)) * share
        # DistributedDataParallel averages over the processes, but the shares need the sum.
        engine.precision.step(value * self.world, engine.optimizer, engine.demands.clip_norm)
        return value.detach().float(), output.detach(), y
