"""One list of hostile names through every way in, and a look at every way out: terminal, HTML, Markdown, CSV,
pictures."""

import csv
import io
import json
import zipfile

import numpy as np
import pydicom
import pytest
import torch
from bombs import dicom, picture
from hostile_names import (
    NAMES,
    is_one_harmless_line,
    is_plain_markdown,
    runs_in_a_spreadsheet,
    tags,
)
from pydicom.uid import generate_uid
from running import ROOT, run_here
from streamlit.testing.v1 import AppTest

from borders import escaping
from borders.terminal import SteadyStream
from checkpoint import describe, load_checkpoint, save_checkpoint
from common import MedFLError, run_script, tell
from deployment.app.cases import read_case
from deployment.app.readout import Prediction, csv_text, slice_rows
from deployment.app.report import draw_report
from deployment.staging import model_card
from federation.protocol.answers import parse
from federation.protocol.log import say
from federation.protocol.page import table, write_page
from federation.protocol.requests import Over
from federation.server.history import COLUMNS, write_history
from radiology.pseudonyms import Pseudonyms
from transunet import TransUNet


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose dataset, hospitals and strategy have hostile names."""
    path = tmp_path_factory.mktemp("models") / "named_best.pth"
    torch.manual_seed(0)
    network = TransUNet("tiny", 32)
    origin = {
        "kind": "federated",
        "hospitals": len(NAMES),
        "labels": list(NAMES),
        "partition": NAMES[0],
        "strategy": NAMES[5],
        "rounds": 5,
        "privacy": {"patients": {name: {"epsilon": 1.0, "delta": 1e-3} for name in NAMES}},
    }
    about = describe(network, origin=origin, data={"name": " ".join(NAMES), "train": {"patients": 3}})
    save_checkpoint(path, network.state_dict(), json.loads(json.dumps(about)))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_each_way_out_shows_a_name_and_lets_it_do_nothing(name):
    assert is_one_harmless_line(escaping.terminal(name))
    assert not tags(escaping.web(name)) and '"' not in escaping.web(name)
    assert is_plain_markdown(escaping.markdown(name))
    assert is_plain_markdown(f"a {escaping.markdown(name)} b")
    table = io.StringIO()
    csv.writer(table).writerow(["first", escaping.cell(name), 3])
    assert not runs_in_a_spreadsheet(table.getvalue())
    assert escaping.cell(escaping.cell(name)) == escaping.cell(name)


def test_harmless_names_stay_as_they_are():
    for name in (
        "TCGA_CS_4941_19960909_12.tif",
        "Müller, Anna",
        "12.5",
        "-3.5e-2",
        "slice_1 (of 3)",
        "2001-02-03",
    ):
        assert escaping.terminal(name) == escaping.cell(name) == escaping.web(name) == name
        assert escaping.markdown(name) == name


def test_errors_and_lines_of_a_run_reach_the_terminal_as_text(capsys):
    for name in NAMES:

        def fail(told=name):
            raise MedFLError(f"{told} can't be read; copy it again")

        with pytest.raises(SystemExit):
            run_script(fail)
        assert is_one_harmless_line(capsys.readouterr().err.removesuffix("\n"))
    say("\n".join(name.replace("\n", " ") for name in NAMES))
    assert all(map(is_one_harmless_line, capsys.readouterr().out.splitlines()))


def test_what_a_script_prints_commands_no_terminal(capsys):
    """Whichever line a name stands in: tables, notes, the worst patients."""
    shown = io.StringIO()
    for name in NAMES:
        SteadyStream(shown).write(f"worst: {name} 0.028\n")
        tell([name])
        assert is_one_harmless_line(capsys.readouterr().out.removesuffix("\n"))
    assert all(is_one_harmless_line(line.replace("\t", " ")) for line in shown.getvalue().split("\n"))
    bar = io.StringIO()
    SteadyStream(bar).write("\r 50%\t1/2\n")
    assert bar.getvalue() == "\r 50%\t1/2\n"


def archive(folder):
    """A study for each name, in patient's number, description and file's name, and a file that is none."""
    for number, name in enumerate(NAMES):
        text = name.encode("utf-8", "replace").decode().replace("\\", "/")
        study, series = generate_uid(), generate_uid()
        for slice_number in range(4):
            file = dicom(
                PatientID=text[:60],
                SeriesDescription=f"FLAIR {text}"[:60],
                StudyInstanceUID=study,
                SeriesInstanceUID=series,
                ImagePositionPatient=[0, 0, 3.0 * slice_number],
            )
            file.SpecificCharacterSet = "ISO_IR 192"
            file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            file.save_as(folder / f"{number}_{slice_number}.dcm", enforce_file_format=True)
        (folder / f"{text.replace('/', '_')[:80]}.txt").write_text("no DICOM")


@pytest.mark.filterwarnings("ignore")
def test_an_archive_of_hostile_tags_is_told_of_as_text(tmp_path):
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    source, out = tmp_path / "archive", tmp_path / "prepared"
    source.mkdir()
    archive(source)
    asked = ("--dicom", source, "--out", out)
    told = run_here("data/prepare_hospital.py", *asked, "--dry-run")
    assert told.returncode == 0, told.stderr
    assert all(map(is_one_harmless_line, told.stdout.splitlines())) and f"{len(NAMES)} studies" in told.stdout
    done = run_here("data/prepare_hospital.py", *asked)
    assert "\x1b]0" not in done.stdout + done.stderr and "\x9b" not in done.stdout + done.stderr
    for name in ("report.csv", "patients.csv"):
        if (path := tmp_path / "archive_private" / name).exists():
            assert not runs_in_a_spreadsheet(path.read_text(encoding="utf-8")), name
    assert (tmp_path / "archive_private" / "report.csv").exists()


def test_the_table_of_names_leads_back_after_a_second_run(tmp_path):
    first = Pseudonyms(tmp_path / "private")
    before = [first.name(name, "1.2") for name in NAMES if "\ud800" not in name]
    first.save()
    again = Pseudonyms(tmp_path / "private")
    assert [again.name(name, "1.2") for name in NAMES if "\ud800" not in name] == before
    assert not runs_in_a_spreadsheet((tmp_path / "private" / "patients.csv").read_text(encoding="utf-8"))


def test_figures_and_history_hold_no_formula(tmp_path):
    names = [name.replace("/", "_") for name in NAMES]
    case = read_case([(f"{name}_{k}.png", picture((32, 32))) for k, name in enumerate(names[13:14])])
    case.slices = names
    case.volume = np.repeat(case.volume, len(names), axis=0)
    case.groups = np.arange(len(names))
    rows = slice_rows(case, Prediction(np.zeros((len(names), 32, 32), np.float32)), 0.5)
    assert not runs_in_a_spreadsheet(csv_text(rows))
    row = dict.fromkeys(COLUMNS, 1)
    write_history([{**row, "site": name} for name in names], tmp_path / "history.csv", "random")
    assert not runs_in_a_spreadsheet((tmp_path / "history.csv").read_text(encoding="utf-8"))
    pixels = np.zeros((8, 8, 3), np.uint8)
    name = names[10]  # half a formula of matplotlib, which it could not draw
    made = draw_report(name, [(name, pixels)] * 2, rows[:1], [(name, name)], [("Data", name)], [name], name)
    assert made[1:4] == b"PNG"


def test_a_models_words_stay_words_in_its_card(model):
    lines = model_card(load_checkpoint(model)).splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| |", "| ---"))]
    assert len(rows) >= 8
    for row in rows:
        inside = row.removeprefix("| ").removesuffix(" |").split(" | ", 1)
        assert len(inside) == 2 and is_plain_markdown(inside[1]), row


@pytest.fixture
def page(model, monkeypatch):
    monkeypatch.setenv("MEDFL_CHECKPOINT", str(model))
    return AppTest.from_file(ROOT / "deployment" / "app" / "app.py", default_timeout=120).run()


def test_the_page_shows_names_as_text(page):
    def said() -> list[str]:
        kinds = (page.error, page.info, page.warning, page.caption, page.header, page.markdown)
        return [element.value for kind in kinds for element in kind]

    cards = " ".join(str(element.proto) for element in page.sidebar)
    assert not page.exception and "<img src=x" not in cards and "<b>x" not in cards
    for name in (name.replace("/", "&#47;").replace("\\", "") for name in NAMES[:6]):
        slices = [(f"{name}_{k}.png", picture((32, 32))) for k in (1, 2)]
        refused = [(f"{name}_1.png", picture((32, 32))), ("b_1.png", picture((32, 32)))]
        damaged = [(f"{name}.png", b"")]
        for files in (refused, damaged, slices) if name in NAMES[:2] else (refused,):
            uploader = next(u for u in page.file_uploader if u.label.startswith("Slices"))
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w") as archive:
                for path, content in files:
                    archive.writestr("scan/" + path.encode("utf-8", "replace").decode(), content)
            uploader.set_value([("a.zip", packed.getvalue(), "application/zip")]).run()
            assert not page.exception
            for text in said():
                if "x" in text and "MedFL" not in text:
                    assert is_plain_markdown(text), text
        if close := [button for button in page.button if button.label == "Close this case"]:
            close[0].click().run()


def test_a_status_page_shows_marks_that_turn_a_text_round(tmp_path):
    """A name that reads as another, because part of it runs from right to left."""
    write_page(
        tmp_path / "page.html", "run", "first\nsecond", [("x", table(["who"], [["a\u202ebad\x1b[31m"]]))]
    )
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a\\u202ebad\\x1b[31m" in written and "\u202e" not in written and "first\nsecond" in written


def test_what_the_server_says_at_the_end_is_one_line():
    with pytest.raises(MedFLError):
        parse(Over, {"query": "end", "code": "done", "detail": "x\n2026-11-26 12:00:00  round 3: fine"})
