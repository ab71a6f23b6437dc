"""How a federation is run: the settings that the server decides and sends to every hospital."""

import math
from dataclasses import dataclass, fields

from common import MedFLError, setting
from federation.protocol.secure_aggregation import LEAST
from federation.protocol.weights import ENCODER, NORM, REST
from partition import KINDS
from split import TEST_FRACTION, VAL_FRACTION

STRATEGIES = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedmedian", "fedtrimmedavg", "krum")
LOOK_AT_SINGLE_UPDATES = ("fedmedian", "fedtrimmedavg", "krum")
SMALLEST_BATCH = 4  # of a hospital: BatchNorm takes its statistics of it
MOST_RATE = 2.0  # times --lr, at which hospitals train
SERVER_RATES = {"fedavgm": 1.0, "fedadam": 0.01, "fedyogi": 0.01}  # where none is given
# of the training's settings, those that mean something in a federation; epochs are rounds here, minutes don't
# exist
TRAINING_OPTIONS = [
    "model",
    "image_size",
    "norm",
    "classes",
    "encoder",
    "batch_size",
    "lr",
    "encoder_lr_factor",
    "weight_decay",
    "schedule",
    "warmup",
    "freeze_encoder_epochs",
    "clip",
    "ema_decay",
    "patience",
    "precision",
    "seed",
]


@dataclass(frozen=True)
class FederationSettings:
    """Everything that decides how hospitals train together, each default once."""

    clients: int = setting(2, "hospitals in the federation")
    rounds: int = setting(30, "rounds of training")  # 0: hospitals score a model and train none
    partition: str = setting("site", "how one dataset is divided among simulated hospitals", KINDS)
    alpha: float = setting(0.5, "of the partition dirichlet: small makes unlike hospitals")
    val_fraction: float = setting(VAL_FRACTION, "share of the patients for validation")
    test_fraction: float = setting(TEST_FRACTION, "share of the patients kept for the test")
    strategy: str = setting("fedavg", "how updates become one model", STRATEGIES)
    proximal_mu: float = setting(
        10.0,
        "of fedprox: the pull towards the round's model; a step draws weights back by this times "
        "the learning rate",
    )
    server_lr: float | None = setting(
        None,
        "of fedavgm, fedadam and fedyogi: the server's step, 1.0 of fedavgm and 0.01 of the "
        "others if none is given",
        kind=float,
    )
    server_momentum: float = setting(0.9, "of fedavgm: weight of the past steps")
    beta_1: float = setting(0.9, "of fedadam and fedyogi: weight of the past in the mean of the changes")
    beta_2: float = setting(0.99, "of fedadam and fedyogi: weight of the past in the mean of their squares")
    tau: float = setting(1e-3, "of fedadam and fedyogi: added to the root of that mean")
    trim: float = setting(
        0.2, "of fedtrimmedavg: share of the hospitals left out at each end, value by value"
    )
    malicious: int = setting(1, "of krum: hostile hospitals that it is to withstand")
    pretraining: bool = setting(
        False,
        "hospitals train the encoder alone, on scans without their masks (masked autoencoding), and the run ends with "
        "encoder.safetensors for --encoder",
    )
    keep_norm_local: bool = setting(False, "each hospital keeps its own normalisation layers (FedBN)")
    update_dtype: str = setting(
        "float32",
        "in what weights travel; half precision halves the bytes",
        ("float32", "float16", "bfloat16"),
    )
    dp_epsilon: float | None = setting(
        None,
        "differential privacy of hospitals: what all rounds may spend, noise derived from it; hides from who sees "
        "the models whether a hospital, and so its patients, took part, not from the server, which gets each update",
        kind=float,
    )
    dp_delta: float = setting(
        1e-5, "of differential privacy: chance that the bound does not hold; far below 1 / hospitals"
    )
    dp_clip: float | None = setting(
        None, "of differential privacy: a hospital's change is cut to this length", kind=float
    )
    dp_noise_multiplier: float | None = setting(
        None,
        "of differential privacy: the noise in clips, instead of derived from "
        "--dp-epsilon; with both, training ends when epsilon is spent",
        kind=float,
    )
    secure_aggregation: bool = setting(
        False,
        "the server learns the sum of the hospitals' updates and none by itself (SecAgg+); hides which hospital a "
        "patient is at, not that the patient took part; 3 hospitals or more",
    )
    secure_range: float = setting(
        8.0,
        "of secure aggregation: the largest change of a weight that it carries; a hospital whose "
        "update goes further is left out, and told",
    )
    local_epochs: int = setting(1, "passes over a hospital's training slices a round")
    local_steps: int | None = setting(
        None, "steps of each hospital a round, instead of --local-epochs", kind=int
    )
    lr_factor: float | None = setting(
        None,
        "hospitals' learning rate as a factor of --lr, because a mean over hospitals takes out "
        "noise; the root of --clients, and 2 at most, if none is given",
        kind=float,
    )
    moments: str = setting(
        "keep",
        "what becomes of a hospital's optimiser from round to round: its moments are kept at the "
        "hospital, or begin at zero",
        ("keep", "reset"),
    )
    round_timeout: float = setting(1800.0, "longest wait for a round's answers in seconds")
    max_update_norm_ratio: float = setting(
        10.0, "an update longer than this many times the round's median is left out"
    )
    cut_update_norm_ratio: float = setting(
        2.0, "an update longer than this many times the round's median is cut to that"
    )
    min_update_cosine: float = setting(
        -0.5, "an update whose cosine with the others' mean is below this is left out"
    )
    max_weight_ratio: float = setting(
        2.0, "a hospital counts at most this many times the median of the hospitals' slices"
    )
    withhold_model: bool = setting(
        False, "hospitals do not get the model at the end; else each gets the best and the last"
    )
    min_clients: int | None = setting(
        None, "hospitals that a round needs, half of --clients if none is given", kind=int
    )

    def __post_init__(self) -> None:
        for name in (
            "clients",
            "alpha",
            "local_epochs",
            "round_timeout",
            "max_update_norm_ratio",
            "cut_update_norm_ratio",
            "max_weight_ratio",
            "secure_range",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise MedFLError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; choose a number above 0"
                )
        if not 0 <= self.rounds < math.inf:
            raise MedFLError(
                f"--rounds is {self.rounds}; choose a number above 0 (0 only to score a model with --evaluate)"
            )
        if self.lr_factor is not None and not 0 < self.lr_factor < math.inf:
            raise MedFLError(f"--lr-factor is {self.lr_factor}; choose a number above 0")
        if self.local_steps is not None and self.local_steps < 1:
            raise MedFLError(f"--local-steps is {self.local_steps}; choose a number above 0")
        if not 0 <= self.proximal_mu < math.inf:
            raise MedFLError(f"--proximal-mu is {self.proximal_mu}; choose 0 or more")
        if not (
            0 <= self.val_fraction < 1
            and 0 <= self.test_fraction < 1
            and self.val_fraction + self.test_fraction < 1
        ):
            raise MedFLError(
                "--val-fraction and --test-fraction lie from 0 to below 1 and leave somebody to train; "
                "choose others"
            )
        if not -1 <= self.min_update_cosine <= 1:
            raise MedFLError(
                f"--min-update-cosine is {self.min_update_cosine}; choose a number from -1 (off) to 1"
            )
        if self.server_lr is not None and not 0 < self.server_lr < math.inf or not 0 < self.tau < math.inf:
            raise MedFLError("--server-lr and --tau are numbers above 0; choose others")
        if not all(0 <= share < 1 for share in (self.server_momentum, self.beta_1, self.beta_2)):
            raise MedFLError("--server-momentum, --beta-1 and --beta-2 lie from 0 to below 1; choose others")
        if not 0 < self.trim < 0.5 or self.malicious < 0:
            raise MedFLError("--trim lies between 0 and 0.5, and --malicious is 0 or more; choose others")
        self._check_privacy()
        self._check_secure_aggregation()
        if self.needed > self.clients:
            raise MedFLError(
                f"--strategy {self.strategy} {self._why_needed()} and needs {self.needed} hospitals, and "
                f"--clients is {self.clients}; take more hospitals, or another strategy"
            )
        if self.min_clients is not None and self.min_clients < self.needed:
            raise MedFLError(
                f"--strategy {self.strategy} {self._why_needed()} and needs {self.needed} hospitals in every "
                f"round; leave --min-clients out, or give {self.needed} or more"
            )
        if self.min_clients is not None and not 1 <= self.min_clients <= self.clients:
            raise MedFLError(
                f"--min-clients is {self.min_clients}; choose a number from 1 to --clients ({self.clients})"
            )

    def _check_privacy(self) -> None:
        given = {name: getattr(self, name) for name in ("dp_epsilon", "dp_clip", "dp_noise_multiplier")}
        for name, value in given.items():
            if value is not None and not 0 < value < math.inf:
                raise MedFLError(f"--{name.replace('_', '-')} is {value}; choose a number above 0")
        if self.private != (self.dp_clip is not None):
            raise MedFLError(
                "differential privacy takes --dp-clip, and --dp-epsilon or --dp-noise-multiplier; give both "
                "or none"
            )
        if not 0 < self.dp_delta < 1:
            raise MedFLError(f"--dp-delta is {self.dp_delta}; choose a number between 0 and 1, such as 1e-5")
        if self.private and self.strategy in LOOK_AT_SINGLE_UPDATES:
            raise MedFLError(
                f"--strategy {self.strategy} looks at each hospital's update, and differential privacy is "
                "worked out for a sum of all; take fedavg, fedprox or a strategy with a server's optimiser"
            )

    def _check_secure_aggregation(self) -> None:
        if not self.secure_aggregation:
            return
        if self.clients < LEAST:
            raise MedFLError(
                f"--secure-aggregation takes {LEAST} hospitals or more, because of two each knows the "
                f"other's update from the sum; --clients is {self.clients}"
            )
        sum_alone = "and with --secure-aggregation the server sees their sum alone"
        if self.strategy in LOOK_AT_SINGLE_UPDATES:
            raise MedFLError(
                f"--strategy {self.strategy} looks at each hospital's update, {sum_alone}; take fedavg, "
                "fedprox or a strategy with a server's optimiser"
            )
        names = ("max_update_norm_ratio", "cut_update_norm_ratio", "min_update_cosine")
        if any(getattr(self, f.name) != f.default for f in fields(self) if f.name in names):
            raise MedFLError(
                "--max-update-norm-ratio, --cut-update-norm-ratio and --min-update-cosine screen single "
                f"updates, {sum_alone}; leave them out"
            )
        if self.private:
            raise MedFLError(
                f"--dp-clip cuts each hospital's update at the server, {sum_alone}; choose one of the two"
            )
        if self.update_dtype != "float32":
            raise MedFLError(
                f"--update-dtype {self.update_dtype} is for single updates, {sum_alone}, in whole numbers of "
                "32 bits; leave it out"
            )

    @property
    def private(self) -> bool:
        """Whether the hospitals are protected by differential privacy."""
        return self.dp_epsilon is not None or self.dp_noise_multiplier is not None

    @property
    def quorum(self) -> int:
        """Hospitals that a round needs."""
        return self.min_clients or max(math.ceil(self.clients / 2), self.needed)

    @property
    def beginners(self) -> int:
        """Hospitals that a round needs to begin: with secure aggregation enough that none is uncovered,
        though some drop out."""
        return max(self.quorum, LEAST) if self.secure_aggregation else self.quorum

    @property
    def needed(self) -> int:
        """Updates without which the strategy would not do what it is for."""
        if self.strategy == "krum":
            return 2 * self.malicious + 3
        if self.strategy == "fedtrimmedavg":
            near = math.ceil(1 / self.trim)
            return max(3, near if int(self.trim * near) >= 1 else near + 1)  # as Flower rounds
        return 3 if self.strategy == "fedmedian" else 1

    def _why_needed(self) -> str:
        return {
            "krum": f"with --malicious {self.malicious} takes 2 x {self.malicious} + 3 updates to choose "
            f"from",
            "fedtrimmedavg": f"with --trim {self.trim} leaves out one update at each end",
        }.get(self.strategy, "takes the middle one of three updates or more")

    @property
    def server_rate(self) -> float:
        """The step of the server's optimiser: what was asked for, else the default of the strategy, which has
        one."""
        return self.server_lr or SERVER_RATES[self.strategy]

    def steps_a_round(self, batches: int) -> int:
        """Steps of a hospital whose pass over its slices has so many batches."""
        return self.local_steps or self.local_epochs * batches

    @property
    def rate_factor(self) -> float:
        """The hospitals' learning rate as a factor of the settings'."""
        return self.lr_factor or min(MOST_RATE, math.sqrt(self.clients))

    def batch_of_one(self, batch_size: int) -> int:
        """Slices in a step of one hospital, for a batch of all hospitals together."""
        return max(SMALLEST_BATCH, round(batch_size / self.clients))

    def left_out(self, frozen: bool) -> list[str]:
        """The parts of the weights that need not travel: nobody trains a frozen encoder, pretraining trains nothing
        else, and normalisation layers may stay."""
        if self.pretraining:
            return [REST]
        return [ENCODER] * frozen + [NORM] * self.keep_norm_local
