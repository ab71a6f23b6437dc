"""Energy: a counter where there is one, else a range that says so."""

import time

import pytest
from running import run_here

from checkpoint import load_checkpoint
from runs import energy
from runs.energy import Counter, Meter, in_words, keep, rapl_counters, summed


def package(folder, name: str, value: int, most: int = 999_999):
    (folder / name).mkdir(parents=True)
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")
    (folder / name / "energy_uj").write_text(f"{value}\n")
    return folder / name / "energy_uj"


def test_counters_of_packages_are_read_and_start_again_at_0(tmp_path, monkeypatch):
    first, second = package(tmp_path, "intel-rapl:0", 10), package(tmp_path, "intel-rapl:1", 999_990)
    package(tmp_path, "intel-rapl:0:0", 5)  # the cores of a package, which counts them already
    (tmp_path / "intel-rapl:2").mkdir()  # one that can't be read
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert rapl_counters() == [Counter(first, 999_999), Counter(second, 999_999)]
    meter = Meter("a try")
    first.write_text("500010\n")
    second.write_text("499990\n")  # 500,000 later, over the end
    record = meter.record()
    assert record["kwh"] == pytest.approx([1.0 / 3.6e6] * 2) and "RAPL" in record["method"]
    assert record["co2_g"][0] == pytest.approx(480 / 3.6e6)


def test_without_a_counter_the_figure_is_a_range_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    meter = Meter("a try", gpu=True)
    monkeypatch.setattr(meter, "cpu_before", meter.cpu_before - 3_600)  # an hour of one core
    record = meter.record()
    assert record["kwh"] == pytest.approx([0.003, 0.015], rel=0.01)
    assert "3 to 15 W a core: no counter here" in record["method"]
    assert "the GPU, which reports nothing here" in record["not_in_it"]
    assert in_words(record, dice=0.6) == (
        "energy 3 to 15 Wh (CPU time times 3 to 15 W a core: no counter here), 1.44 to 7.2 g CO2 at 480 g/kWh, "
        "Dice per Wh 0.04 to 0.2"
    )


def test_cpu_time_is_counted():
    meter = Meter("a try")
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    assert meter.record()["cpu_seconds"] >= 0.25


def test_an_interrupted_run_is_summed_and_a_new_one_begins_at_0(tmp_path):
    record = {"kwh": [1.0, 2.0], "co2_g": [480.0, 960.0], "method": "a", "cpu_seconds": 5.0}
    keep(record, tmp_path, again=True)
    both = keep({**record, "method": "b"}, tmp_path, again=True)
    total = summed(both)
    assert total["kwh"] == [2.0, 4.0] and total["method"] == "a and b" and total["cpu_seconds"] == 10
    assert len(keep(record, tmp_path, again=False)) == 1


def test_a_training_and_its_evaluation_tell_their_energy(phantoms, home, tmp_path):
    options = ("--data-dir", phantoms, "--image-size", 32, "--batch-size", 8, "--out", tmp_path)
    how = ("--model", "mini", "--encoder", "random", "--epochs", 1, "--energy")
    done = run_here("train_centralized.py", *options, *how)
    assert done.returncode == 0 and "Wh (" in done.stdout, done.stderr
    best = tmp_path / "transunet_centralized_best.pth"
    about = load_checkpoint(best).metadata["energy"]
    assert about["kwh"][1] >= about["kwh"][0] > 0 and about["method"] and (tmp_path / "energy.json").exists()
    scored = run_here("evaluate.py", "--checkpoint", best, "--data-dir", phantoms, "--energy")
    assert scored.returncode == 0 and "Wh a patient" in scored.stdout, scored.stderr
    assert "training: energy" in scored.stdout and "Dice per Wh" in scored.stdout
