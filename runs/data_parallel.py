"""Central training by several processes: `torchrun --nproc-per-node 2 train_centralized.py ...`, also on more machines.

Each process takes a share of every batch, and together they make one step. Except for rounding, it is the step that a
single process makes with the whole batch: loss and BatchNorm use the whole batch, and torch's DistributedDataParallel
averages the gradients. Only the first process scores, writes and prints.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batches import TrainingBatches
from common import EXIT_BAD_INPUT, MedFLError
from training import shares_and_entropy

PATIENCE = timedelta(hours=6)  # for the first process, which scores while the others wait
TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it tells each of several processes


class Processes:
    """The processes of this run. Without torchrun there is one, and the methods below change nothing."""

    def __init__(self) -> None:
        self.count, self.rank = _told("WORLD_SIZE", 1), _told("RANK", 0)
        if self.count > 1:
            if missing := [name for name in TORCHRUN if not os.environ.get(name)]:
                raise MedFLError(
                    f"WORLD_SIZE is {self.count} in the environment, as for several processes, but {missing[0]} is not "
                    "set; start them by torchrun, or unset WORLD_SIZE to train by one"
                )
            if self.rank:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends
            gpu = torch.cuda.is_available()
            if gpu:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cuda:nccl,cpu:gloo" if gpu else "gloo", timeout=PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Run the block in the first process, and then in the others, which can use what the first wrote. If it fails
        in the first, which reports why, the others end."""
        if not self.first and not self.agree(None):
            sys.exit(EXIT_BAD_INPUT)
        done = False
        try:
            yield
            done = True
        finally:
            if self.first:
                self.agree(done)

    def agree(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        return told[0]

    def share(self, batch_size: int) -> slice:
        """This process's slices of a batch. Raises MedFLError if a batch has fewer slices than there are processes."""
        if batch_size < self.count:
            raise MedFLError(
                f"--batch-size is {batch_size}, but {self.count} processes share a batch; take fewer processes, or "
                "a larger batch"
            )
        edges = [batch_size * k // self.count for k in range(self.count + 1)]
        return slice(edges[self.rank], edges[self.rank + 1])

    def epoch(self, batches: TrainingBatches, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of an epoch's batches."""
        return batches.epoch(epoch, self.share(batches.batch_size))

    def network(self, model: nn.Module) -> nn.Module:
        """The model, wrapped so that its gradients are averaged. It must be wrapped again when other weights train."""
        if self.count == 1:
            return model
        return DistributedDataParallel(model, forward_sync_buffers=False)

    def whole_batches(self, model: nn.Module) -> None:
        """Let the model's BatchNorm layers see the batch of all processes. torch's SyncBatchNorm does so only on
        GPUs."""
        if self.count > 1:
            for layer in model.modules():
                if type(layer) is nn.BatchNorm2d:
                    layer.__class__ = WholeBatchNorm

    def close(self) -> None:
        """Leave the group of processes."""
        if self.count > 1:
            dist.destroy_process_group()


class Sum(torch.autograd.Function):
    """The sum over all processes, given to each of them. Its gradient is the sum of their gradients."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


class WholeBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the shares of all processes together."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, h, w) to the same shape."""
        if not self.training:
            return super().forward(input)
        values, axes = input.float(), (0, 2, 3)
        count = torch.full((1,), input.numel() / input.shape[1], device=input.device)
        total = Sum.apply(torch.cat([values.sum(axes), count]))
        mean, count = total[:-1] / total[-1], total[-1]
        centred = values - mean[:, None, None]
        variance = Sum.apply(centred.square().sum(axes)) / count
        assert self.running_mean is not None and self.running_var is not None  # as all layers here have
        assert self.num_batches_tracked is not None and self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def loss_of_all(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """`training.segmentation_loss` of the batch of all processes, from this process's share (b, classes, h, w).

    Sums go to all processes and gradients come back from all, so the mean of their gradients is the gradient of the
    whole batch.
    """
    shares, entropy = shares_and_entropy(logits, masks)
    number = torch.tensor(float(masks[:, 0].numel()), device=logits.device)
    sums = [values.sum((0, 2, 3)) for values in (shares * masks, shares, masks)]
    total = Sum.apply(torch.cat([torch.stack([entropy, number]), *sums]))
    both, proposed, true = total[2:].reshape(3, -1)
    dice = ((2 * both + 1) / (proposed + true + 1)).mean()
    return total[0] / total[1] + 1 - dice, dice


def _told(name: str, default: int) -> int:
    """A number of the environment. Raises MedFLError for what is none."""
    text = os.environ.get(name) or str(default)
    if not text.isdigit():
        raise MedFLError(
            f"{name} is {text} in the environment, and is a number where torchrun sets it; unset it"
        )
    return int(text)
