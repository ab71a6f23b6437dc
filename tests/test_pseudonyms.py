"""radiology/pseudonyms.py: names that are the same for the same key, and a
key that stays where it belongs."""

import csv
import os
import stat

import pytest

from common import MedFLError
from radiology.pseudonyms import KEY, TABLE, Pseudonyms, check_folders


def test_names_are_stable_by_key_and_lead_nowhere(tmp_path):
    first, again, other = Pseudonyms(tmp_path / "a"), Pseudonyms(tmp_path / "a"), Pseudonyms(tmp_path / "b")
    name = first.name("4711", "1.2.3")
    assert again.name("4711", "1.2.3") == name != other.name("4711", "1.2.3")
    person, study = name.split("_")
    assert first.name("4711", "1.2.4").split("_")[0] == person and first.name("4711", "1.2.4") != name
    assert first.name("4712", "1.2.3").split("_")[0] != person
    assert (
        first.name("", "1.2.3").split("_")[0] != first.name("", "1.2.4").split("_")[0]
    )  # without a number, who knows
    assert len(person) == 13 and len(study) == 9 and "4711" not in name


def test_the_table_leads_back_and_keeps_former_runs(tmp_path):
    for patient in ("4711", "4712"):
        pseudonyms = Pseudonyms(tmp_path)
        pseudonyms.name(patient, "1.2.3")
        pseudonyms.save()
    with open(tmp_path / TABLE, encoding="utf-8", newline="") as file:
        rows = {row["patient_id"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"4711", "4712"}
    assert (
        rows["4711"]["pseudonym"] == Pseudonyms(tmp_path).name("4711", "1.2.3")
        and rows["4711"]["study"] == "1.2.3"
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_table_that_a_spreadsheet_changed_does_not_cost_the_key(tmp_path):
    """It takes leading zeros away; without its key every patient would get another name."""
    pseudonyms = Pseudonyms(tmp_path)
    name = pseudonyms.name("0012", "1.2.3")
    pseudonyms.save()
    table = tmp_path / TABLE
    table.write_text(table.read_text().replace("0012", "12"))
    with pytest.raises(MedFLError, match="the key stays"):
        Pseudonyms(tmp_path).name("0012", "1.2.3")
    table.unlink()
    assert Pseudonyms(tmp_path).name("0012", "1.2.3") == name


def test_key_and_table_are_for_their_owner_alone(tmp_path):
    pseudonyms = Pseudonyms(tmp_path / "private")
    pseudonyms.name("4711", "1.2.3")
    pseudonyms.save()
    for path, mode in (
        (tmp_path / "private", 0o700),
        (tmp_path / "private" / KEY, 0o600),
        (tmp_path / "private" / TABLE, 0o600),
    ):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    (tmp_path / "private" / KEY).chmod(0o644)
    with pytest.raises(MedFLError, match="can be read by others"):
        Pseudonyms(tmp_path / "private")


@pytest.mark.parametrize(
    "text, sentence", [("no key", "not a key of MedFL"), ("ab" * 20, "is cut off"), ("", "is cut off")]
)
def test_a_damaged_key_is_told(tmp_path, text, sentence):
    Pseudonyms(tmp_path)
    (tmp_path / KEY).write_text(text)
    with pytest.raises(MedFLError, match=sentence):
        Pseudonyms(tmp_path)


@pytest.mark.parametrize(
    "source, out, private, sentence",
    [
        ("a", "a/out", "p", "--out is .* inside the archive"),
        ("a", "a", "p", "inside the archive"),
        ("a", "out", "a/p", "--private is .* inside the archive"),
        ("out/a", "out", "p", "which contains the archive"),
        ("a", "out", "out/p", "name another folder with --private"),
        ("a", "p/out", "p", "name another folder with --private"),
        ("a", "out", "out", "name another folder with --private"),
        ("a", "out", "x/../out/p", "name another folder with --private"),
    ],
)
def test_folders_that_would_mix_what_must_stay_apart_are_refused(tmp_path, source, out, private, sentence):
    with pytest.raises(MedFLError, match=sentence):
        check_folders(tmp_path / source, tmp_path / out, tmp_path / private)
    check_folders(tmp_path / "a", tmp_path / "out", tmp_path / "a_private")
