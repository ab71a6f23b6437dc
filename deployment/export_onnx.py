"""Write a checkpoint as one ONNX graph that contains every step from the stored pixels to the probability.

    python deployment/export_onnx.py --checkpoint models/demo/transunet_centralized_best.pth --out models/transunet.onnx

Inputs: `volume` uint8 (S, H, W, 3), all slices of a patient; `first` and `count` int64, the slices to
segment. Output: `probability` float32 (count, H, W). The statistics of the normalisation come from the whole
volume, so blocks give the same result as the whole. The file is kept only if onnxruntime computes the same
with it as inference.py.

Further outputs let a page warn of unusual scans like appearance/: `foreground_mean` and
`foreground_deviation` float32 (3,); and `appearance` float32 (6,), `blank` and `copies` bool (3,), which are
empty unless `first` is 0.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  torch's exporter needs it
    from onnx import TensorProto, compose, helper, numpy_helper
except ImportError:
    HAS_ONNX = False
else:
    HAS_ONNX = True

from appearance import doubts, features
from checkpoint import Checkpoint, load_checkpoint
from common import MedFLError, __version__, git_commit, run_script, typed
from deployment.app.card import card_rows
from inference import BLOCK, predict_volume, probability, to_mask
from phantoms.patients import make_phantoms
from preprocessing import volume_statistics
from scans.pictures import read_volume
from storage.files import atomic_write
from transunet import TransUNet

FORMAT = "2"  # format of the file's properties; deployment/browser/model.js reads this one
BOUND, BOUND_HALF = 1e-4, 1e-2  # a file is kept only up to this difference of a probability
PIXELS = 1e-4  # and up to this share of differing mask pixels
LARGE = 256  # weights of at least this many values are stored in half precision; biases and scales are not
SEED = 9  # seed of the phantoms for the comparison
# What is measured of the whole volume with the first block, each in a branch of its own: what it needs meanwhile,
# several times the volume, is freed before the next one begins.
SEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "silhouette": features.silhouette,
    "roughness": lambda volume: features.roughness(volume)[None],
    "symmetry": lambda volume: features.symmetry(volume)[None],
    "blank": features.blank,
    "copies": features.copies,
}
SIZES = ((1, 256, 256), (9, 256, 256), (3, 200, 168), (2, 64, 97))  # slices, rows, columns


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model, a .pth file")
    parser.add_argument("--out", type=Path, required=True, help="the .onnx file to write")
    parser.add_argument(
        "--single", action="store_true", help="store the weights in single precision: twice the size"
    )
    return parser.parse_args()


class WholeWay(nn.Module):
    """inference.predict_volume as one module."""

    def __init__(self, model: TransUNet):
        super().__init__()
        self.model = model

    def forward(self, volume: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """volume: (S, H, W, 3) uint8; chosen: (n,) int64, numbers of slices; (n, H, W) float32, and the
        volume's statistics, (3,) float32 each."""
        mean, deviation = volume_statistics(volume)
        return probability(self.model, volume.index_select(0, chosen), mean, deviation), mean, deviation


class Measure(nn.Module):
    """One of `SEEN`."""

    def __init__(self, name: str):
        super().__init__()
        self.measure = SEEN[name]

    def forward(self, volume: Tensor) -> Tensor:
        """volume: (S, H, W, 3) uint8; (n,)."""
        return self.measure(volume)


@dataclass(frozen=True)
class Difference:
    """The difference between a graph and inference.py: the largest difference of a probability, the number of
    differing mask pixels, and of all pixels."""

    probability: float
    pixels: int
    of: int


def export(checkpoint: Checkpoint, half: bool = True) -> tuple[bytes, Difference]:
    """The file's content and its difference from inference.py. half: store the weights in half precision.
    Raises MedFLError if it differs too much, or if onnx is missing."""
    if not HAS_ONNX:
        raise MedFLError(
            "onnx, onnxscript and onnxruntime are needed; install them with `pip install -r "
            "requirements-export.txt`"
        )
    graph = build_graph(checkpoint.model)
    if half:
        halve(graph.graph)
    helper.set_model_props(graph, properties(checkpoint))
    onnx.checker.check_model(graph)
    content = graph.SerializeToString(deterministic=True)
    difference = compare(checkpoint, content)
    bound = BOUND_HALF if half else BOUND
    if not (difference.probability < bound and difference.pixels <= PIXELS * difference.of):
        remedy = "export with --single" if half else "please report it with the checkpoint's card"
        raise MedFLError(
            f"the graph's probabilities differ from the model's by up to {difference.probability:.1e} and its "
            f"masks in {difference.pixels} of {difference.of:,} pixels, more than {bound:g} and "
            f"{PIXELS * difference.of:.0f}, so nothing was written; {remedy}"
        )
    return content, difference


def build_graph(model: TransUNet) -> "onnx.ModelProto":
    """The graph with the inputs `volume`, `first` and `count`."""
    volume, chosen = torch.zeros(3, 48, 40, 3, dtype=torch.uint8), torch.tensor([0, 1])
    outputs = ["probability", "foreground_mean", "foreground_deviation"]
    model_proto = traced(WholeWay(model), {"volume": volume, "chosen": chosen}, outputs)
    graph = model_proto.graph
    # torch can't trace a slice whose bounds are values; so `chosen` is traced, and made here of first and
    # count
    graph.input.remove(next(given for given in graph.input if given.name == "chosen"))
    graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.INT64, []) for name in ("first", "count")
    )
    graph.initializer.extend(
        numpy_helper.from_array(np.array(k), name) for name, k in (("none", 0), ("one", 1))
    )
    graph.node.insert(0, helper.make_node("Add", ["first", "count"], ["end"]))
    graph.node.insert(1, helper.make_node("Range", ["first", "end", "one"], ["chosen"]))
    add_appearance(graph)
    return model_proto


@cache
def measure_graph(name: str) -> "onnx.GraphProto":
    """One of `SEEN` as ONNX, the same for every model."""
    return traced(Measure(name), {"volume": torch.zeros(3, 48, 40, 3, dtype=torch.uint8)}, [name]).graph


def traced(module: nn.Module, given: dict[str, Tensor], outputs: list[str]) -> "onnx.ModelProto":
    """A module as ONNX. given: example inputs; all their sides but the channels may differ."""
    anything = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own use of its older parts
        program = torch.onnx.export(
            module.eval(),
            tuple(given.values()),
            dynamo=True,
            verbose=False,
            input_names=list(given),
            output_names=outputs,
            dynamic_shapes=tuple(
                dict.fromkeys(range(min(value.ndim, 3)), anything) for value in given.values()
            ),
        )
    assert program is not None  # with dynamo it returns a program
    model_proto = program.model_proto  # a new object at each access
    graph = model_proto.graph
    for told in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        told.ClearField("metadata_props")  # torch's notes about the code: paths of this machine, a megabyte
        told.ClearField("doc_string")
    return model_proto


def add_appearance(graph: "onnx.GraphProto") -> None:
    """Add the outputs `appearance`, `blank` and `copies` to a graph. They are empty unless `first` is 0, so
    that a page that works in blocks measures the volume once."""
    graph.node.append(helper.make_node("Equal", ["first", "none"], ["is_first"]))
    for name in SEEN:
        measured = compose.add_prefix_graph(measure_graph(name), f"{name}.", rename_inputs=False)
        del measured.input[:]  # of the surrounding graph: a branch may use its names
        type_ = TensorProto.BOOL if name in ("blank", "copies") else TensorProto.FLOAT
        nothing = helper.make_tensor(f"no.{name}", type_, [0], [])
        empty = helper.make_graph(
            [helper.make_node("Constant", [], [nothing.name], value=nothing)],
            "empty",
            [],
            [helper.make_tensor_value_info(nothing.name, type_, [0])],
        )
        graph.node.append(
            helper.make_node("If", ["is_first"], [name], then_branch=measured, else_branch=empty)
        )
    # frame and foreground, roughness, symmetry, height and width: features.APPEARANCE
    graph.initializer.extend(numpy_helper.from_array(np.array([k]), f"place.{k}") for k in (0, 2, 4))
    for half, (start, end) in {"frame": (0, 2), "sides": (2, 4)}.items():
        bounds = [f"place.{start}", f"place.{end}"]
        graph.node.append(helper.make_node("Slice", ["silhouette", *bounds], [half]))
    parts = ["frame", "roughness", "symmetry", "sides"]
    graph.node.append(helper.make_node("Concat", parts, ["appearance"], axis=0))
    for name, type_ in (
        ("appearance", TensorProto.FLOAT),
        ("blank", TensorProto.BOOL),
        ("copies", TensorProto.BOOL),
    ):
        graph.output.append(helper.make_tensor_value_info(name, type_, [None]))


def halve(graph: "onnx.GraphProto") -> None:
    """Store the large weights in half precision. Computation stays in single precision: a cast follows each
    weight."""
    for weight in list(graph.initializer):
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < LARGE:
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        graph.node.insert(0, helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))


def properties(checkpoint: Checkpoint) -> dict[str, str]:
    """The file's content besides the graph: the checkpoint's metadata, its card, the constants of
    appearance/, and the versions of MedFL and of the model."""
    texts = {
        "metadata": checkpoint.metadata,
        "card": card_rows(checkpoint, checkpoint.sha256()),
        "plausibility": rules(checkpoint.task.channels),
        "version": {"medfl": __version__, "commit": git_commit(), "model": checkpoint.sha256()},
    }
    return {"medfl_format": FORMAT} | {
        name: json.dumps(value, allow_nan=False) for name, value in texts.items()
    }


def rules(channels: Sequence[str]) -> dict:
    """The constants and sentences of appearance/, with which the page in the browser warns of unusual
    scans. channels: of the model's task."""
    return {
        "channels": doubts.three(channels),
        "brain": doubts.of_brain(channels),
        "images": doubts.images_of(channels),
        "flair": features.FLAIR,
        "appearance": features.APPEARANCE,
        "limit": doubts.LIMIT,
        "limit_alone": doubts.LIMIT_ALONE,
        "sides": doubts.SIDES,
        "aspect": doubts.ASPECT,
        "sentences": doubts.SENTENCES,
    }


def compare(checkpoint: Checkpoint, content: bytes) -> Difference:
    """Compare the file in onnxruntime with inference.py, on phantoms of several sizes and numbers of slices,
    whole and in blocks."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest, pixels, of = 0.0, 0, 0
    for volume in _volumes():
        expected = predict_volume(checkpoint.model, volume)
        for block in {len(volume), min(BLOCK, len(volume)), 1}:
            parts = [(first, min(block, len(volume) - first)) for first in range(0, len(volume), block)]
            found = np.concatenate(
                [
                    session.run(None, {"volume": volume, "first": np.array(first), "count": np.array(count)})[
                        0
                    ]
                    for first, count in parts
                ]
            )
            largest = max(largest, float(np.abs(found - expected).max()))
            masks = [to_mask(values, checkpoint.threshold) for values in (found, expected)]
            pixels, of = pixels + int(np.count_nonzero(masks[0] != masks[1])), of + found.size
    return Difference(largest, pixels, of)


def _volumes() -> list[np.ndarray]:
    """Phantoms of `SIZES`, (S, H, W, 3) uint8."""
    with tempfile.TemporaryDirectory() as folder:
        root = make_phantoms(
            Path(folder), patients=1, slices=2 * max(slices for slices, *_ in SIZES), size=256, seed=SEED
        )
        patient = next(path for path in root.iterdir() if path.is_dir())
        volume = read_volume(
            [path for path in sorted(patient.glob("*.tif")) if not path.stem.endswith("_mask")]
        )
    middle = len(volume) // 2
    return [
        np.ascontiguousarray(volume[max(middle - slices // 2, 0) :][:slices, :rows, :columns])
        for slices, rows, columns in SIZES
    ]


def told(difference: Difference) -> str:
    """The difference in words."""
    return (
        f"largest difference of a probability from inference.py {difference.probability:.1e}, "
        f"{difference.pixels} of {difference.of:,} mask pixels differ"
    )


def main() -> None:
    arguments = parse()
    content, difference = export(load_checkpoint(arguments.checkpoint), not arguments.single)
    with atomic_write(arguments.out) as file:
        file.write(content)
    print(told(difference))
    print(f"wrote {arguments.out}, {len(content) / 1e6:.1f} MB")
    print(f"next: python deployment/serve_browser.py --checkpoint {typed(arguments.checkpoint)}")


if __name__ == "__main__":
    run_script(main)
