"""A round of a secure aggregation is asked for again, as by a server that was killed before it saved. Had one
hospital's optimiser been reset in between, the two sums would differ by what that made of its update alone."""

import json
import shutil

import pytest
from in_process import RealHospital

HOSPITALS = 3


class Photographer(RealHospital):
    """Keeps all files as they are when round 2 is asked for."""

    def answer(self, incoming):
        about = json.loads(incoming.content["about"]["json"])
        out = self.folder.parent
        if about.get("round") == 2 and "sealed" in about and not (out.parent / "before").exists():
            shutil.copytree(out, out.parent / "before")
        return super().answer(incoming)


@pytest.mark.parametrize("reset", [False, True])
def test_no_second_sum_where_one_hospital_begins_with_another_optimiser(federate, phantoms, tmp_path, reset):
    out = tmp_path / "out"
    hospitals = [Photographer(out, cid, phantoms) for cid in range(HOSPITALS)]
    settings = {
        "clients": HOSPITALS,
        "partition": "iid",
        "val_fraction": 0.0,
        "secure_aggregation": True,
    }
    first, _, _ = federate(2, hospitals=hospitals, **settings)
    kept = [path.relative_to(out) for path in out.rglob("*_sums.json")]
    for path in kept:  # the hospitals' own memory; all else is as it was
        shutil.copy(out / path, tmp_path / "before" / path)
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "before", out)
    if reset:  # as a request to score the last model does, sent to this one alone
        for path in (out / "models").glob("hospital-0_optimiser*"):
            path.unlink()
        with pytest.raises(AssertionError, match="got 0 updates|has no sum"):
            federate(2, hospitals=hospitals, resume=True, **settings)
        return
    again, _, _ = federate(2, hospitals=hospitals, resume=True, **settings)
    assert len(kept) == HOSPITALS
    assert float((first.weights - again.weights).abs().max()) < 1e-6
