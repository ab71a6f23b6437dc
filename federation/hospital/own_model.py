"""The file of a hospital's own model, where normalisation layers stay at the hospitals (`--keep-norm-local`)."""

from dataclasses import asdict

from checkpoint import describe, save_checkpoint
from federation.hospital.data import HospitalData
from federation.hospital.identity import Identity
from federation.hospital.reports import Scored
from federation.protocol.settings import FederationSettings
from tasks import stored
from training import TrainingSettings
from transunet import TransUNet


def write_own_model(
    model: TransUNet,
    score: Scored,
    rounds: int,
    identity: Identity,
    training: TrainingSettings,
    federation: FederationSettings,
    data: HospitalData,
) -> None:
    """Write the model as `LABEL_federated_best.pth`. rounds: those that it took part in. With a promise to the patients
    the file has no statistics of the images."""
    about: dict = {"name": data.dataset.name, "split_sha256": data.split_sha256 or data.split.sha256()}
    if not identity.own_data:
        about["split"] = {
            "seed": training.seed,
            "val_fraction": federation.val_fraction,
            "test_fraction": federation.test_fraction,
        }
    mean = {"mean": score.val_dice, "median": None, "ci95": None}
    description = describe(
        model,
        None if identity.patient_privacy else data.images(),
        training={
            **asdict(training),
            **asdict(federation),
            "rounds_done": rounds,
            "selected_by": "nothing: the last model",
        },
        origin={
            "kind": "federated",
            "hospital": identity.label,
            "rounds": rounds,
            "strategy": federation.strategy,
            "partition": "own data" if identity.own_data else federation.partition,
        },
        data=about,
        scores={"val": {"patients": score.val_patients, "volume_dice": mean}} if score.val_patients else {},
        task=stored(data.dataset.task),
    )
    save_checkpoint(identity.file("federated_best.pth"), model.state_dict(), description)
