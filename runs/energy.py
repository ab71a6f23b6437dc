"""The electricity that a run takes, and the method by which it was found.

A counter is read where there is one: RAPL for the processor, NVML for the GPU. Virtual machines have neither; then
the CPU time is multiplied by a stated range of watts, and the result is a range. CodeCarbon would give a single
figure there, from a default wattage (its issues 111, 477 and 533), which looks measured but is not.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from common import MedFLError, utc_now
from storage.files import write_json

try:
    import pynvml
except ImportError:
    pynvml = None

NAME = "energy.json"  # in a run's folder: a list of records
POWERCAP = Path("/sys/class/powercap")  # Linux
CORE_WATTS = (3.0, 15.0)  # of a busy core with its share of memory and supply, in a laptop and in a server
GRID = 480.0  # g CO2 per kWh: the world's mean of 2023 (Ember, Global Electricity Review 2024)
JOULES = 3.6e6  # of a kWh
UNMEASURED = ("disks, network, cooling", "other machines")


@dataclass(frozen=True)
class Counter:
    """A processor package's RAPL counter: its file, and the value, in microjoules, after which it starts again
    at 0."""

    path: Path
    wraps: int

    def read(self) -> int:
        return int(self.path.read_text())


def rapl_counters(folder: Path | None = None) -> list[Counter]:
    """The packages' counters that can be read here; none in a virtual machine or without the permission."""
    found = []
    for package in sorted((folder or POWERCAP).glob("intel-rapl:*")):
        if package.name.count(":") != 1:  # a part of a package, whose counter includes it
            continue
        try:
            counter = Counter(package / "energy_uj", int((package / "max_energy_range_uj").read_text()))
            counter.read()
        except (OSError, ValueError):
            continue
        found.append(counter)
    return found


class Meter:
    """Measures from its creation to `record`. gpu: whether an NVIDIA GPU is used."""

    def __init__(self, what: str, gpu: bool = False):
        self.what, self.counters = what, rapl_counters()
        self.gpus = _gpus() if gpu else []
        self.gpu_unknown = gpu and not self.gpus
        self.before = [counter.read() for counter in self.counters]
        self.gpu_before = [pynvml.nvmlDeviceGetTotalEnergyConsumption(device) for device in self.gpus]
        self.began, self.cpu_before, self.created = time.monotonic(), _cpu_seconds(), utc_now()

    def record(self) -> dict:
        """What was used: kwh and co2_g as [low, high], method, not_in_it (what was not measured), seconds,
        cpu_seconds."""
        seconds, cpu_seconds = time.monotonic() - self.began, _cpu_seconds() - self.cpu_before
        if self.counters:
            used = sum(
                (counter.read() - before) % (counter.wraps + 1) / 1e6
                for counter, before in zip(self.counters, self.before)
            )
            joules, method = [used, used], "RAPL counters of the processor, with whatever else ran on it"
        else:
            joules = [watts * cpu_seconds for watts in CORE_WATTS]
            low, high = CORE_WATTS
            method = f"CPU time times {low:g} to {high:g} W a core: no counter here"
        unknown = list(UNMEASURED)
        if self.gpus:
            after = [pynvml.nvmlDeviceGetTotalEnergyConsumption(device) for device in self.gpus]
            used = sum(now - before for now, before in zip(after, self.gpu_before)) / 1e3
            joules, method = [j + used for j in joules], f"{method}; NVML counter of the whole GPU"
        elif self.gpu_unknown:
            unknown.append("the GPU, which reports nothing here")
        kwh = [j / JOULES for j in joules]
        return {
            "what": self.what,
            "created": self.created,
            "kwh": kwh,
            "method": method,
            "not_in_it": unknown,
            "co2_g": [GRID * value for value in kwh],
            "grid_g_per_kwh": GRID,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
        }


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that ended."""
    told = os.times()
    return told.user + told.system + told.children_user + told.children_system


def _gpus() -> list:
    """NVML's handles of the GPUs, if all of them count their energy; otherwise an empty list."""
    if pynvml is None:
        return []
    try:
        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(k) for k in range(pynvml.nvmlDeviceGetCount())]
        for device in devices:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(device)
    except pynvml.NVMLError:
        return []
    return devices


def keep(record: dict, folder: Path, again: bool) -> list[dict]:
    """Write a record into the folder's `energy.json`. If `again`, it follows the earlier records of the same,
    interrupted run. Returns all records. Raises MedFLError if the file can't be read."""
    path = folder / NAME
    records = [*(read_records(path) if again else []), record]
    write_json(path, records)
    return records


def read_records(path: Path) -> list[dict]:
    """The records in a run's file, an empty list if there is no file. Raises MedFLError if it can't be read."""
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        summed(records)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MedFLError(f"{path} can't be read; move it away") from error
    return records


def summed(records: list[dict]) -> dict:
    """Several records as one: their sums, and every method that was used."""
    return {
        "kwh": [sum(record["kwh"][end] for record in records) for end in (0, 1)],
        "co2_g": [sum(record["co2_g"][end] for record in records) for end in (0, 1)],
        "method": " and ".join(sorted({record["method"] for record in records})),
        "grid_g_per_kwh": GRID,
        "cpu_seconds": sum(record["cpu_seconds"] for record in records),
    }


def in_words(energy: dict, dice: float | None = None) -> str:
    """A record or a sum in words. dice: the Dice of the resulting model, to add Dice per Wh."""
    wh = [1_000 * value for value in energy["kwh"]]
    text = (
        f"energy {_range(wh)} Wh ({energy['method']}), {_range(energy['co2_g'])} g CO2 at "
        f"{energy['grid_g_per_kwh']:g} g/kWh"
    )
    if dice is not None and wh[0] > 0:
        text += f", Dice per Wh {_range([dice / wh[1], dice / wh[0]])}"
    return text


def _range(values: list[float]) -> str:
    low, high = (f"{value:.3g}" for value in values)
    return low if low == high else f"{low} to {high}"
