"""How weights travel: as one vector of a state dict's floating-point tensors, whole or in part, in full or
half precision.

A vector has a value for every such tensor; masks say which of them are of the encoder, of normalisation
layers, or statistics. In half precision a hospital sends what it changed and not what it has: a change is
small, and keeps more of its digits that way.
"""

import hashlib
from collections.abc import Collection, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from torch import nn

from common import MedFLError

WEIGHTS = "weights"  # the one array of a message
ENCODER, NORM, REST = (
    "encoder",
    "norm",
    "rest",
)  # parts that a message can leave out; the rest is all but the encoder
NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
)  # FedBN's layers (Li et al. 2021, arXiv:2102.07623) and their kin
HEAD = 1_000  # bytes beside an array's values; numpy takes 128
FULL = "float32"
ON_THE_WAY = {
    FULL: np.float32,
    "float16": np.float16,
    "bfloat16": np.int16,
}  # numpy has no bfloat16: its bits travel
MASKED = np.uint32  # under the masks of secure aggregation
TYPES = {np.dtype(kind).name for kind in (*ON_THE_WAY.values(), MASKED)}


Record = ArrayRecord | MetricRecord | ConfigRecord  # what can lie in a message where its weights should be


def pack(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A state dict's floating-point tensors one after the other, (n,) float32. Counters (BatchNorm's) stay at
    home.

    They travel as one vector, because Flower sends every tensor in requests of its own: with `tiny`'s 200 a
    round's exchange between two hospitals took 30 s and more, as one vector it takes 6 s.
    """
    return torch.cat(
        [value.detach().float().cpu().flatten() for value in weights.values() if value.is_floating_point()]
    )


def unpack(vector: torch.Tensor, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a vector, in the names and shapes of the state dict `like`, whose counters are kept.

    Raises MedFLError where the sizes differ.
    """
    floating = {name: value for name, value in like.items() if value.is_floating_point()}
    sizes = [value.numel() for value in floating.values()]
    if vector.numel() != sum(sizes):
        raise MedFLError(
            "the weights that came are of another architecture; use the same version of MedFL everywhere"
        )
    pieces = (
        piece.reshape(value.shape).clone() for piece, value in zip(vector.split(sizes), floating.values())
    )
    return {**like, **dict(zip(floating, pieces))}


def _mask(model: nn.Module, names: Collection[str]) -> torch.Tensor:
    """Which values of the model's vector are of these tensors, (n,) bool."""
    return torch.cat(
        [
            torch.full((value.numel(),), name in names)
            for name, value in model.state_dict().items()
            if value.is_floating_point()
        ]
    )


def statistics_mask(model: nn.Module) -> torch.Tensor:
    """Which values of the model's vector nobody trains, (n,) bool: running means and variances."""
    trained = {name for name, _ in model.named_parameters()}
    return _mask(model, model.state_dict().keys() - trained)


def variance_mask(model: nn.Module) -> torch.Tensor:
    """Which values of the model's vector are running variances of normalisation layers, (n,) bool."""
    return _mask(model, {name for name in model.state_dict() if name.endswith(".running_var")})


def norm_mask(model: nn.Module) -> torch.Tensor:
    """Which values of the model's vector are of normalisation layers, found by their type, (n,) bool.
    LayerNorm, which keeps nothing of the data, is none of them."""
    layers = {name for name, module in model.named_modules() if isinstance(module, NORMS)}
    return _mask(model, {name for name in model.state_dict() if name.rpartition(".")[0] in layers})


def part_mask(model: nn.Module, without: Collection[str]) -> torch.Tensor:
    """Which values of the model's vector travel if these parts are
    left out (`ENCODER`, `NORM`, `REST`), (n,) bool."""
    kept = torch.ones(len(pack(model.state_dict())), dtype=torch.bool)
    encoder = _mask(model, {name for name in model.state_dict() if name.startswith("encoder.")})
    if ENCODER in without:
        kept &= ~encoder
    if REST in without:
        kept &= encoder
    if NORM in without:
        kept &= ~norm_mask(model)
    return kept


def common_mask(model: nn.Module, norm_local: bool) -> torch.Tensor:
    """Which values of the model's vector are the same at all hospitals, (n,) bool: all, or all but those of
    normalisation layers where these stay."""
    return part_mask(model, [NORM] if norm_local else [])


def weights_sha256(weights: torch.Tensor, of: torch.Tensor) -> str:
    """SHA-256, in hexadecimal, of these of the weights, (n,) float32. of: which, (n,) bool."""
    return hashlib.sha256(weights[of].contiguous().numpy().tobytes()).hexdigest()


def in_precision(vector: torch.Tensor, precision: str) -> torch.Tensor:
    """The vector, float32, as it is after travelling in this
    precision ("float32", "float16" or "bfloat16")."""
    return vector.to(getattr(torch, precision)).float()


def to_record(vector: torch.Tensor, precision: str = FULL) -> ArrayRecord:
    """A vector as a message carries it."""
    values = vector.to(getattr(torch, precision))
    return array_record((values.view(torch.int16) if precision == "bfloat16" else values).numpy())


def array_record(values: np.ndarray) -> ArrayRecord:
    """A vector of any type as a message carries it."""
    return ArrayRecord({WEIGHTS: Array(values)})


def check_form(arrays: ArrayRecord) -> None:
    """Raises MedFLError unless arrays from elsewhere are one vector of a type that travels. Names and types cost their
    sender a few bytes each: an array under 100,000 names would be hashed as often, and a type can have a million
    fields."""
    if list(arrays) != [WEIGHTS]:
        raise MedFLError("its message has no weights")
    one = arrays[WEIGHTS]
    if one.dtype not in TYPES or [type(side) for side in one.shape] != [int]:
        raise MedFLError("its weights have another shape or type than they should")


def values_of(arrays: Record | None, kind: type) -> np.ndarray:
    """The vector of this type that a message carries, (n,). Raises
    MedFLError where it carries anything else."""
    if not isinstance(arrays, ArrayRecord) or list(arrays) != [WEIGHTS]:
        raise MedFLError("its message has no weights")
    try:
        values = arrays[WEIGHTS].numpy()
    except Exception as error:  # bytes from elsewhere: numpy and Flower each raise their own kinds
        raise MedFLError("its weights can't be decoded") from error
    said = arrays[WEIGHTS]  # which is what counts as sent, and what was signed
    if (
        values.ndim != 1
        or values.dtype != kind
        or (said.dtype, tuple(said.shape)) != (str(values.dtype), values.shape)
    ):
        raise MedFLError("its weights have another shape or type than they should")
    return values


def from_record(arrays: Record | None, precision: str = FULL) -> torch.Tensor:
    """The vector that a message carries, (n,) float32. Raises MedFLError where it carries anything else."""
    vector = torch.from_numpy(np.array(values_of(arrays, ON_THE_WAY[precision])))
    return (vector.view(torch.bfloat16) if precision == "bfloat16" else vector).float()


def model_hash(vector: torch.Tensor, metadata: str) -> str:
    """SHA-256, in hexadecimal, of weights, (n,) float32, and what is said of them."""
    total = hashlib.sha256(vector.contiguous().numpy().data)
    total.update(metadata.encode())
    return total.hexdigest()


def most_bytes(model: nn.Module) -> int:
    """The most bytes that the arrays of an answer take: a value of 32 bits for each weight, and what is said of
    them."""
    return 4 * len(pack(model.state_dict())) + HEAD


def payload(arrays: ArrayRecord | None) -> int:
    """Bytes of the numbers that travel."""
    return sum(
        int(np.prod(a.shape, dtype=np.int64)) * np.dtype(a.dtype).itemsize for a in (arrays or {}).values()
    )
