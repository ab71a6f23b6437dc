"""Measures what an attacker learns about single patients from a federation: the same attacks against each defence.

    python data/make_phantoms.py --patients 40 --slices 8 --size 64 --seed 5 --out data/audited
    python data/make_phantoms.py --patients 12 --slices 8 --size 64 --seed 7 --out data/others
    python train_centralized.py --data-dir data/others --norm group --image-size 64 --steps 150 --out models/others
    python benchmarks/privacy_audit.py --data-dir data/audited --init models/others/transunet_centralized_best.pth
    python benchmarks/privacy_audit.py --data-dir data --init models/others/transunet_centralized_best.pth

The product's own rounds and hospitals run in this process; half of the patients take no part. The attacker
knows the scans and mask of the patient in question, and tries:

- membership by one update: whether the hospital that sent the update trained on the patient, by the cosine between
  the update and the change that only this patient would make (AUC; 0.5 is chance)
- membership by the sum: the same, by the change of the model in a round, which every hospital sees
- membership by the final model: by the patient's loss
- holder: which hospital holds a patient of the federation, by the same cosine with each hospital's update
- inversion: a slice reconstructed from its gradient (Geiping et al. 2020, arXiv:2003.14053), in the attacker's best
  case: a step over one slice whose mask is known; the correlation with the true slice
- subtraction: a patient's figures, from a hospital's image means without and with the patient

An update is what the server receives from one hospital; with secure aggregation it is masked. Privacy of hospitals
does not change the update: its noise is in the sum and in the model.
"""

import argparse
import contextlib
import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from appearance.features import MEASURES, describe_volume
from benchmarks.local_federation import LocalHospital, run
from checkpoint import THRESHOLD, load_start
from common import run_script
from dataset import Dataset, load_dataset
from evaluation.scoring import score_patients
from federation.hospital.data import HospitalData
from federation.hospital.statistics import ToldStatistics
from federation.privacy.accountant import multiplier_for
from federation.privacy.patients import CHANCE, STEPS, PrivateLearner
from federation.protocol.answers import PatientPrivacy
from federation.protocol.messages import read
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import from_record, pack, unpack, values_of
from preprocessing import network_input, resize
from training import Learner, TrainingSettings, segmentation_loss
from transunet import TransUNet

PLAIN, SECURE, HOSPITALS, PATIENTS = (
    "plain",
    "secure aggregation",
    "privacy of hospitals",
    "privacy of patients",
)
LOOKED_AT = 8  # slices of a patient, evenly spread, that the attacker uses
SMOOTH = 1e-3  # weight of the total variation in an inversion


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="a dataset (default data)")
    parser.add_argument("--init", type=Path, help="a model to begin with, made with --norm group")
    parser.add_argument("--image-size", type=int, default=64, help="side of the network's input (default 64)")
    parser.add_argument("--hospitals", type=int, default=3, help="hospitals (default 3)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument(
        "--epsilons",
        type=float,
        nargs="+",
        default=[8.0],
        help="epsilons of both kinds of privacy (default 8)",
    )
    parser.add_argument("--delta", type=float, default=1e-3, help="delta of both (default 1e-3)")
    parser.add_argument("--dp-clip", type=float, default=2.0, help="clip of privacy of hospitals (default 2)")
    parser.add_argument("--slices", type=int, default=3, help="slices to reconstruct (default 3)")
    parser.add_argument("--steps", type=int, default=300, help="steps of an inversion (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, weights and order (default 0)")
    return parser.parse_args()


@dataclass
class Seen:
    """What one hospital sent in one round, as the server reads it: the weights before it, (n,), and their change by
    the update, (n,)."""

    hospital: int
    number: int
    sent: Tensor
    change: Tensor


@dataclass
class Trial:
    """A federation and its patients. weights: those of the last model. members: patients by hospital. others: patients
    who took no part."""

    seen: list[Seen]
    before: Tensor
    weights: Tensor
    members: list[tuple[str, ...]]
    others: tuple[str, ...]


class Attacker:
    """Knows the network, and the scans and masks of all patients in question."""

    def __init__(self, dataset: Dataset, model: TransUNet):
        self.dataset, self.model = dataset, model.train()

    def slices(self, patient: str) -> tuple[Tensor, Tensor]:
        """The network's input, (s, 3, side, side), and the masks, (s, 1, side, side), of a patient."""
        volume, truth = self.dataset.volume(patient)
        some = np.linspace(0, len(volume) - 1, min(LOOKED_AT, len(volume))).round().astype(int)
        volume, truth, side = volume[some], truth[some], self.model.image_side
        images = network_input(torch.from_numpy(volume.copy()), *self.dataset.statistics(patient), side)
        return images, resize(torch.from_numpy(truth / np.float32(255))[:, None], (side, side))

    def at(self, weights: Tensor) -> None:
        """Load these weights, (n,)."""
        self.model.load_state_dict(unpack(weights, self.model.state_dict()))

    def loss(self, patient: str) -> float:
        """The patient's loss with the loaded weights."""
        images, masks = self.slices(patient)
        with torch.no_grad():
            return float(segmentation_loss(self.model(images), masks)[0])

    def wanted(self, patient: str) -> Tensor:
        """The direction, (n,) of length 1, in which only this patient would change the loaded weights."""
        images, masks = self.slices(patient)
        self.model.zero_grad()
        segmentation_loss(self.model(images), masks)[0].backward()
        gradients = {
            name: weight.grad for name, weight in self.model.named_parameters() if weight.grad is not None
        }
        wanted = -pack({name: gradients[name] for name in self.model.state_dict()})
        return wanted / wanted.norm()


def auc(members: list[float], others: list[float]) -> float:
    """How often a member's score is above that of a patient who took no part."""
    ranks = rankdata([*members, *others])[: len(members)]
    return float((ranks.sum() - len(members) * (len(members) + 1) / 2) / (len(members) * len(others)))


def federate(
    arguments: argparse.Namespace, start: Tensor, folder: Path, promise: float | None, **settings
) -> Trial:
    """Run a federation, and keep what the server receives. promise: epsilon of the hospitals' patients."""
    federation = FederationSettings(
        clients=arguments.hospitals,
        rounds=arguments.rounds,
        partition="iid",
        val_fraction=0.0,
        test_fraction=0.5,
        **settings,
    )
    training = TrainingSettings(
        image_size=arguments.image_size, norm="group", encoder="random", seed=arguments.seed
    )
    seen: list[Seen] = []
    hospitals = [LocalHospital(folder, k, arguments.data_dir) for k in range(arguments.hospitals)]
    data = [HospitalData(one.identity, federation, arguments.seed) for one in hospitals]
    for k, one in enumerate(hospitals):
        if promise is not None:
            privacy = PatientPrivacy(epsilon=promise, delta=arguments.delta)
            one.identity = one.identity.model_copy(update={"patient_privacy": privacy})
            one.identity.save(one.folder)

        def keep(incoming, reply, k=k):
            if incoming.metadata.message_type == "train":
                sent, answer = from_record(incoming.content["arrays"]), reply.content["arrays"]
                if federation.secure_aggregation:  # the server can't unmask it, and reads the masked numbers
                    change = torch.from_numpy(values_of(answer, np.uint32) / 2.0**32 - 0.5).float()
                else:
                    change = from_record(answer) - sent
                seen.append(Seen(k, read(incoming.content)["round"], sent, change))
            return reply

        one.change = keep
    with contextlib.redirect_stdout(io.StringIO()):  # the hospitals' terminals
        state, _ = run(hospitals, training, federation, folder / "out", start, say=lambda _: None)
    last = next(one.sent for one in reversed(seen) if one.number == arguments.rounds)
    members = [one.split.train for one in data]
    others = tuple(patient for one in data for patient in one.split.test)
    return Trial(seen, last, state.weights, members, others)


def attack(attacker: Attacker, trial: Trial, rounds: int) -> dict[str, str]:
    """Membership, holder and Dice of a federation, in words, by column."""
    members = [patient for at_one in trial.members for patient in at_one]
    everybody = [*members, *trial.others]
    aucs, holders = [], np.zeros((len(members), len(trial.members)))
    for number in sorted({1, rounds}):
        updates = {one.hospital: one for one in trial.seen if one.number == number}
        attacker.at(next(iter(updates.values())).sent)
        scores = {k: {} for k in updates}  # type: dict[int, dict[str, float]]
        summed: dict[str, float] = {}
        for patient in tqdm(everybody, desc=f"round {number}", unit="patient", leave=False, disable=None):
            wanted = attacker.wanted(patient)
            for k, one in updates.items():
                scores[k][patient] = float(wanted @ one.change / one.change.norm())
            summed[patient] = float(wanted @ (trial.weights - trial.before))
        for k, score in scores.items():
            others = [score[patient] for patient in trial.others]
            aucs.append(auc([score[patient] for patient in trial.members[k]], others))
            holders[:, k] += (np.array([score[p] for p in members]) - np.mean(others)) / np.std(others)
    truth = [k for k, at_one in enumerate(trial.members) for _ in at_one]
    right = int((holders.argmax(axis=1) == truth).sum())
    attacker.at(trial.weights)
    losses = {patient: attacker.loss(patient) for patient in everybody}
    rows = score_patients(attacker.model, attacker.dataset, trial.others, THRESHOLD)
    attacker.model.train()
    return {
        "one update": f"{np.mean(aucs):.2f}",
        "the sum": f"{auc([summed[p] for p in members], [summed[p] for p in trial.others]):.2f}",
        "final model": f"{auc([-losses[p] for p in members], [-losses[p] for p in trial.others]):.2f}",
        "holder": f"{right} of {len(members)} ({len(members) / len(trial.members):.0f} by chance)",
        "Dice": f"{np.mean([row['dice'] for row in rows]):.3f}",
    }


def inverted(
    attacker: Attacker, weights: list[Tensor], goal: list[Tensor], mask: Tensor, steps: int
) -> Tensor:
    """A slice, (1, 3, side, side), whose gradient for these weights points in the direction of `goal`."""
    side = attacker.model.image_side
    slice_ = torch.randn(1, 3, side, side).mul_(0.1).requires_grad_()
    optimiser = torch.optim.Adam([slice_], lr=0.1)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    length = torch.stack([one.norm() for one in goal]).norm()
    for _ in tqdm(range(steps), desc="inversion", unit="step", leave=False, disable=None):
        with sdpa_kernel(SDPBackend.MATH):  # only this backend has a second derivative
            loss = segmentation_loss(attacker.model(slice_), mask)[0]
        made = torch.autograd.grad(loss, weights, create_graph=True)
        product = sum(((a * b).sum() for a, b in zip(made, goal)), torch.zeros(()))
        cosine = product / (torch.stack([one.norm() for one in made]).norm() * length)
        rough = slice_.diff(dim=2).abs().mean() + slice_.diff(dim=3).abs().mean()
        (slice_.grad,) = torch.autograd.grad(1 - cosine + SMOOTH * rough, slice_)
        slice_.grad.sign_()
        optimiser.step()
        rate.step()
    return slice_.detach()


def gradients_seen(
    arguments: argparse.Namespace, attacker: Attacker, mode: str, epsilon: float, slices: list
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights, and what an attacker sees of their gradients over one slice, the first of `slices`, computed by the
    product's own code. The gradients of the other slices are part of the sum of all hospitals."""
    settings = TrainingSettings(image_size=arguments.image_size, norm="group", encoder="random")
    if mode == PATIENTS:
        noise = multiplier_for(epsilon, arguments.rounds * STEPS, arguments.delta, CHANCE)
        learner = PrivateLearner(attacker.model, settings, torch.device("cpu"), noise, 1)
        learner.set_gradients([slices[0][0]], [slices[0][1]])
        return list(learner.trained), [
            weight.grad.clone() for weight in learner.trained if weight.grad is not None
        ]
    plain = Learner(attacker.model, replace(settings, ema_decay=0.0), torch.device("cpu"))
    weights: list[Tensor] = list(attacker.model.parameters())
    total = [torch.zeros_like(weight) for weight in weights]
    for images, masks in slices if mode in (SECURE, HOSPITALS) else slices[:1]:
        plain.set_gradients(images, masks)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        length = float(torch.stack([one.norm() for one in gradients]).norm())
        cut = min(1.0, arguments.dp_clip / length) if mode == HOSPITALS else 1.0
        for one, gradient in zip(total, gradients):
            one.add_(gradient, alpha=cut)
    if mode == HOSPITALS:
        noise = multiplier_for(epsilon, arguments.rounds, arguments.delta)
        for one in total:
            one.add_(torch.randn_like(one), alpha=noise * arguments.dp_clip)
    return weights, total


def invert(
    arguments: argparse.Namespace, attacker: Attacker, start: Tensor, trial: Trial, mode: str, epsilon: float
) -> str:
    """How well slices are reconstructed: the mean correlation with the true slice, and with another patient's slice."""
    attacker.at(start)
    torch.manual_seed(arguments.seed)
    like, unlike = [], []
    for k in range(arguments.slices):
        slices = []
        for patients in trial.members:
            images, masks = attacker.slices(patients[k % len(patients)])
            fullest = int(masks.sum(dim=(1, 2, 3)).argmax())
            slices.append((images[fullest : fullest + 1], masks[fullest : fullest + 1]))
        other = attacker.slices(trial.others[k % len(trial.others)])[0]
        weights, goal = gradients_seen(arguments, attacker, mode, epsilon, slices)
        made = inverted(attacker, weights, goal, slices[0][1], arguments.steps).flatten()
        like.append(float(torch.corrcoef(torch.stack([made, slices[0][0].flatten()]))[0, 1]))
        unlike.append(float(torch.corrcoef(torch.stack([made, other[len(other) // 2].flatten()]))[0, 1]))
    return f"{np.mean(like):.2f} ({np.mean(unlike):.2f})"


def subtraction(dataset: Dataset, folder: Path) -> str:
    """The error of a patient's figures that come from subtracting two means, in deviations among patients: for exact
    means, and for the means that a hospital reports."""
    names = [patient.name for patient in dataset.patients][:9]
    few, more = (dataset.image_statistics(tuple(one)) for one in (names[:8], names))
    assert few is not None  # of eight patients
    own = describe_volume(torch.from_numpy(dataset.volume(names[8])[0].copy()))
    told = ToldStatistics(folder / "images.json")
    first, second = told.tell(tuple(names[:8]), few), told.tell(tuple(names), more)

    def error(before, after) -> float:
        found = [
            np.abs(9 * np.array(after[m]["mean"]) - 8 * np.array(before[m]["mean"]) - own[m])
            / np.maximum(few[m]["deviation"], 1e-9)
            for m in MEASURES
        ]
        return float(np.median(np.concatenate(found)))

    return (
        f"{error(few, more):.3f} deviations from exact means, {error(first, second):.3f} from reported ones"
    )


def main() -> None:
    arguments = parse()
    dataset = load_dataset(arguments.data_dir)
    torch.manual_seed(arguments.seed)
    model = (
        load_start(arguments.init, "tiny", arguments.image_size, "group").model
        if arguments.init
        else TransUNet("tiny", arguments.image_size, "group")
    )
    attacker, start = Attacker(dataset, model), pack(model.state_dict())
    kinds = [(PLAIN, 0.0), (SECURE, 0.0)]
    kinds += [(mode, epsilon) for mode in (HOSPITALS, PATIENTS) for epsilon in arguments.epsilons]
    with tempfile.TemporaryDirectory(prefix="medfl-audit-") as folder:
        print(f"a patient's figures by subtraction: off by {subtraction(dataset, Path(folder))}")
    head = ("defence", "one update", "the sum", "final model", "holder", "inversion (another's)", "Dice")
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}", flush=True)
    for mode, epsilon in kinds:
        settings: dict = {"secure_aggregation": True} if mode == SECURE else {}
        if mode == HOSPITALS:
            settings = {"dp_epsilon": epsilon, "dp_delta": arguments.delta, "dp_clip": arguments.dp_clip}
        with tempfile.TemporaryDirectory(prefix="medfl-audit-") as folder:
            promise = epsilon if mode == PATIENTS else None
            trial = federate(arguments, start, Path(folder), promise, **settings)
        found = attack(attacker, trial, arguments.rounds)
        found["inversion (another's)"] = invert(arguments, attacker, start, trial, mode, epsilon)
        name = f"{mode}, epsilon {epsilon:g}" if epsilon else mode
        print(f"| {name} | {' | '.join(found[column] for column in head[1:])} |", flush=True)


if __name__ == "__main__":
    run_script(main)
