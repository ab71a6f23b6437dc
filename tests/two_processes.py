"""What each of two processes does for test_data_parallel.py: a run, and one that is interrupted after an epoch."""

import sys
from pathlib import Path

import torch

from dataset import load_dataset
from runs.central import CentralTraining
from runs.data_parallel import Processes, loss_of_all
from split import make_split
from training import TrainingSettings

SETTINGS = {"model": "mini", "image_size": 32, "batch_size": 7, "epochs": 2, "encoder": "random"}


def central(phantoms: Path, out: Path, resume: bool = False, processes: Processes | None = None):
    """A run on these phantoms."""
    dataset = load_dataset(phantoms, progress=False)
    split = make_split({p.name: p.site for p in dataset.patients}, 0)
    settings, cpu = TrainingSettings(**SETTINGS), torch.device("cpu")
    return CentralTraining(dataset, split, settings, cpu, out, resume, processes=processes)


def gradients(subject: CentralTraining) -> torch.Tensor:
    """The gradients of all weights in the first step, (n,) float32."""
    learner, processes = subject.learner, subject.processes
    learner.model.train()
    learner.network = processes.network(learner.model)
    learner.set_gradients(*next(processes.epoch(subject.batches, 1)))
    return torch.cat([weight.grad.flatten() for weight in learner.model.parameters()])


def of_several_classes() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and masks (6, 2, 8, 8) of two classes."""
    torch.manual_seed(0)
    logits, classes = torch.randn(6, 2, 8, 8), torch.randint(0, 3, (6, 8, 8))
    return logits, torch.stack([classes == 1, classes == 2], dim=1).float()


def main(phantoms: Path, out: Path) -> None:
    processes = Processes()
    logits, masks = (values[processes.share(6)] for values in of_several_classes())
    loss, _ = loss_of_all(logits.requires_grad_(), masks)
    loss.backward()
    torch.save((loss.item(), logits.grad), out / f"classes_{processes.rank}.pt")
    step = gradients(central(phantoms, out / "step", processes=processes))
    if processes.first:
        torch.save(step, out / "step.pt")
    central(phantoms, out / "whole", processes=processes).run()
    begun = central(phantoms, out / "parts", processes=processes)
    begun._finished = lambda: begun.progress.epoch == 1
    begun.run()
    central(phantoms, out / "parts", resume=True, processes=processes).run()
    processes.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
