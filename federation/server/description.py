"""The metadata of a federation's checkpoint: the settings, data and hospitals behind its model."""

from collections import Counter
from dataclasses import asdict

from appearance.features import pool_image_statistics
from checkpoint import describe
from federation.protocol.answers import Facts
from federation.protocol.settings import FederationSettings
from federation.server.judging import Scores, mean_dice
from federation.server.progress import Progress
from split import PARTS
from tasks import Task, of_all, stored
from training import TrainingSettings
from transunet import TransUNet


def describe_run(
    model: TransUNet,
    training: TrainingSettings,
    settings: FederationSettings,
    done: Progress,
    commit: str | None,
    scores: Scores,
    number: int,
) -> dict:
    """The metadata of a run's model after round `number`.

    Args:
        done: the run's progress. commit: of this working copy.
        scores: the model's scores on validation patients; empty without any.
    """
    told = list(done.hospitals.values())
    # differential privacy of hospitals adds noise only to the weights, so the metadata holds nothing that depends on
    # which hospitals took part: no label, count or device, and nothing about the images
    images = (
        None
        if settings.private
        else pool_image_statistics(
            [(facts.parts["train"].patients, facts.images) for facts in told if facts.images]
        )
    )
    mean, patients = mean_dice(scores)
    val = {"patients": patients, "volume_dice": {"mean": mean, "median": None, "ci95": None}}
    about = describe(
        model,
        images,
        training=_training(training, settings, done, told, bool(scores), number),
        origin=_origin(settings, done, told, number),
        data=_data(training, settings, told),
        scores={"val": val} if scores else {},
        task=stored(_task(told, settings.private)),
    )
    about["versions"].update(commit=commit, flwr=told[0].versions["flwr"] if told else None)
    return about


def _task(told: list[Facts], private: bool) -> Task | None:
    """The task of the model. All hospitals outline the same; the wording of most of them counts. If the run is private,
    the task holds only what is the same at all hospitals."""
    if private:
        return of_all(next((facts.task for facts in told if facts.outlined), None))
    return next((task for task, _ in Counter(facts.task for facts in told).most_common(1)), None)


def _training(
    training: TrainingSettings,
    settings: FederationSettings,
    done: Progress,
    told: list[Facts],
    scored: bool,
    number: int,
) -> dict:
    return {
        **asdict(training),
        **asdict(settings),
        "rounds_done": number,
        "seconds": round(done.seconds, 1),
        "device": None if settings.private else " ".join(sorted({facts.device for facts in told})),
        "selected_by": "patient-weighted validation mean volume Dice"
        if scored
        else "nothing: the last model",
    }


def _data(training: TrainingSettings, settings: FederationSettings, told: list[Facts]) -> dict:
    # the names of the hospitals' own data depend on which hospitals took part
    names = {"own data" if settings.private and facts.own_data else facts.data for facts in told}
    data: dict = {
        "name": " and ".join(sorted(names)),
        "split_sha256": next((facts.split_sha256 for facts in told if not facts.own_data), None),
        "split": {
            "seed": training.seed,
            "val_fraction": settings.val_fraction,
            "test_fraction": settings.test_fraction,
        },
    }
    for part in PARTS if not settings.private else ():
        data[part] = {
            "patients": sum(facts.parts[part].patients for facts in told),
            "slices": sum(facts.parts[part].slices for facts in told),
        }
    return data


def _origin(settings: FederationSettings, done: Progress, told: list[Facts], number: int) -> dict:
    simulated = any(not facts.own_data for facts in told)
    privacy = {
        "secure_aggregation": settings.secure_aggregation,
        "epsilon": done.epsilon,
        "delta": settings.dp_delta if settings.private else None,
        "patients": {} if settings.private else _patients_privacy(done),
    }
    return {
        "kind": "federated",
        "hospitals": settings.clients if settings.private else len(told),
        "labels": [] if settings.private else sorted(done.hospitals),
        "partition": settings.partition if simulated else "own data",
        "strategy": settings.strategy,
        "rounds": number,
        "started_from": done.started_from,
        "init_split_sha256": done.init_split,
        "norm_at_hospitals": settings.keep_norm_local,
        "privacy": privacy,
    }


def _patients_privacy(done: Progress) -> dict[str, dict[str, float]]:
    """The privacy that hospitals spent for their patients, by label; hospitals that also sent an update without such
    privacy are left out."""
    spent, bare = {}, set()
    for row in done.rows:
        if row["patient_epsilon"] is not None:
            spent[row["site"]] = row["patient_epsilon"]
        elif row["examples"] is not None:
            bare.add(row["site"])
    return {
        label: {"epsilon": spent[label], "delta": facts.patient_privacy.delta}
        for label, facts in done.hospitals.items()
        if facts.patient_privacy and label in spent.keys() - bare
    }
