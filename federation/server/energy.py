"""A federation's use of electricity: this process's, measured here, and the hospitals', as they report it."""

from pathlib import Path
from typing import Any

from federation.protocol.answers import Result
from runs.energy import GRID, NAME, Meter, read_records
from storage.files import write_json

SERVER = "server"  # a record's `what`; a hospital's is "hospital LABEL"
NOT_MEASURED = ("Flower's SuperLink and SuperNodes, which pass messages on",)


class FederationEnergy:
    """Sums the electricity that the server and each hospital use.

    out: the run's folder; hospitals: each hospital's use so far, by label, updated in place; resumed: whether the
    records in `out` belong to this run.
    """

    def __init__(self, out: Path, hospitals: dict[str, dict[str, Any]], resumed: bool):
        self.path, self.hospitals, self.meter = out / NAME, hospitals, Meter(SERVER)
        self.before = [one for one in read_records(self.path) if one["what"] == SERVER] if resumed else []

    def add(self, label: str, told: Result) -> None:
        """Add what a hospital used for one message."""
        if told.energy is None:
            return
        one = self.hospitals.setdefault(label, {"kwh": [0.0, 0.0], "cpu_seconds": 0.0, "method": ""})
        one["kwh"] = [before + more for before, more in zip(one["kwh"], told.energy.kwh)]
        one["cpu_seconds"] += told.energy.cpu_seconds
        one["method"] = told.energy.method

    def write(self) -> list[dict]:
        """Write the run's `energy.json`; its records."""
        hospitals = [
            {
                "what": f"hospital {label}",
                **one,
                "co2_g": [GRID * kwh for kwh in one["kwh"]],
                "grid_g_per_kwh": GRID,
            }
            for label, one in sorted(self.hospitals.items())
        ]
        server = self.meter.record()
        server["not_in_it"] += NOT_MEASURED
        records = [*self.before, server, *hospitals]
        write_json(self.path, records)
        return records
