"""How a federation is run: the settings that the server decides and sends to every hospital."""

import json
import math
from dataclasses import asdict, dataclass, fields

from common import MedFLError, setting
from partition import KINDS
from split import TEST_FRACTION, VAL_FRACTION
from training import TrainingSettings

STRATEGIES = ("fedavg", "fedprox")
# of the training's settings, those that mean something in a federation; epochs are rounds here, minutes don't exist
TRAINING_OPTIONS = ["model", "image_size", "norm", "pretrained", "encoder_weights", "batch_size", "lr", "encoder_lr_factor",
                    "weight_decay", "schedule", "warmup_steps", "freeze_encoder_epochs", "clip", "ema_decay", "patience",
                    "precision", "seed"]


@dataclass(frozen=True)
class FederationSettings:
    """Everything that decides how hospitals train together, each default once."""

    clients: int = setting(2, "hospitals in the federation")
    rounds: int = setting(5, "rounds of training")
    partition: str = setting("site", "how one dataset is divided among simulated hospitals", KINDS)
    alpha: float = setting(0.5, "of the partition dirichlet: small makes unlike hospitals")
    val_fraction: float = setting(VAL_FRACTION, "share of the patients to choose by")
    test_fraction: float = setting(TEST_FRACTION, "share of the patients kept for the test")
    strategy: str = setting("fedavg", "how updates become one model", STRATEGIES)
    proximal_mu: float = setting(0.01, "of fedprox: the pull towards the round's model")
    local_epochs: int = setting(1, "passes over a hospital's training slices a round")
    round_timeout: float = setting(1800.0, "longest wait for a round's answers in seconds")
    max_update_norm_ratio: float = setting(10.0, "an update longer than this many times the round's median is left out")
    min_update_cosine: float = setting(-0.5, "an update whose cosine with the others' mean is below this is left out")
    min_clients: int | None = setting(None, "hospitals that a round needs, half of --clients if none is given", kind=int)

    def __post_init__(self) -> None:
        for name in ("clients", "rounds", "alpha", "local_epochs", "round_timeout", "max_update_norm_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise MedFLError(f"--{name.replace('_', '-')} is {getattr(self, name)}; choose a number above 0")
        if not 0 <= self.proximal_mu < math.inf:
            raise MedFLError(f"--proximal-mu is {self.proximal_mu}; choose 0 or more")
        if not (0 <= self.val_fraction < 1 and 0 <= self.test_fraction < 1 and self.val_fraction + self.test_fraction < 1):
            raise MedFLError("--val-fraction and --test-fraction lie from 0 to below 1 and leave somebody to train; choose others")
        if not -1 <= self.min_update_cosine <= 1:
            raise MedFLError(f"--min-update-cosine is {self.min_update_cosine}; choose a number from -1 (off) to 1")
        if self.min_clients is not None and not 1 <= self.min_clients <= self.clients:
            raise MedFLError(f"--min-clients is {self.min_clients}; choose a number from 1 to --clients ({self.clients})")

    @property
    def quorum(self) -> int:
        """Hospitals that a round needs."""
        return self.min_clients or math.ceil(self.clients / 2)


def to_json(training: TrainingSettings, federation: FederationSettings) -> str:
    """Both settings as a message carries them."""
    return json.dumps({"training": {**asdict(training), "encoder_weights": None, "pretrained": False},  # the server has loaded them
                       "federation": asdict(federation)})


def from_json(text: str) -> tuple[TrainingSettings, FederationSettings]:
    """The settings of a message. Raises MedFLError where they are another MedFL's or out of range."""
    try:
        content = json.loads(text)
        known = [({f.name for f in fields(kind)}, kind, content[part]) for kind, part in
                 ((TrainingSettings, "training"), (FederationSettings, "federation"))]
        if any(set(values) != names for names, _, values in known):
            raise KeyError("settings of another MedFL")
        return tuple(kind(**values) for _, kind, values in known)
    except (ValueError, KeyError, TypeError) as error:
        raise MedFLError("the server sent settings that this MedFL does not know; use the same version on both sides") from error
