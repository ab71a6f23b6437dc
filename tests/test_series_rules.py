"""radiology/rules.py and studies.py: which series becomes which channel, and what is said of the others."""

from dataclasses import replace

import pytest

from common import MedFLError
from radiology.rules import CHANNELS, DEFAULT, FLAIR, MASK, POST, PRE, load_rules, role_of
from radiology.series import Series
from radiology.studies import plan_studies, shared_numbers

RULES = load_rules()
AXIAL, SAGITTAL = (1.0, 0, 0, 0, 1, 0), (0, 1.0, 0, 0, 0, -1)


def series(
    description: str = "", uid: str | None = None, modality: str = "MR", slices: int = 20, **known
) -> Series:
    known = {
        "orientation": AXIAL,
        "patient_id": "a",
        "study_uid": "1",
        "files": (),
        "frames": tuple(range(slices)),
        **known,
    }
    return Series(uid=uid or description, modality=modality, description=description, **known)


@pytest.mark.parametrize(
    "description, role",
    [
        ("AX FLAIR", FLAIR),
        ("t2_tirm_tra_dark-fluid_5mm", FLAIR),
        ("T2W_FLAIR", FLAIR),
        ("FLAIR_POST", FLAIR),
        ("BraTS_001-t2f", FLAIR),
        ("3D FLAIR SAG CUBE", FLAIR),
        ("AX T1", PRE),
        ("t1_se_tra", PRE),
        ("T1W_SE native", PRE),
        ("Ax T1 FLAIR", PRE),
        ("AX T1 PRE CONTRAST", PRE),
        ("t1_mprage_sag_p2_iso", PRE),
        ("T1 ohne KM", PRE),
        ("BraTS_001-t1n", PRE),
        ("sub-01_T1w", PRE),
        ("AX T1 w/o contrast", PRE),
        ("AX T1 POST GAD", POST),
        ("T1 +C", POST),
        ("t1_mprage_tra_KM", POST),
        ("Ax T1 FLAIR +C", POST),
        ("T1 SE C+", POST),
        ("BraTS_001_t1ce", POST),
        ("BraTS_001-t1c", POST),
        ("sub-01_ce-gadolinium_T1w", POST),
        ("T1Gd", POST),
        ("AX SPGR POST", POST),
        ("AX T2 FSE", None),
        ("3-plane LOC", None),
        ("AX DWI b1000", None),
        ("ADC map", None),
        ("SWI", None),
        ("T1 SUB", None),
        ("AX PERFUSION T1 DCE", None),
        ("3D TOF MRA", None),
        ("Screen Save", None),
        ("sub-01_T2w", None),
        ("", None),
    ],
)
def test_what_a_description_means(description, role):
    assert role_of(series(description), RULES)[0] == role


@pytest.mark.parametrize(
    "known, role",
    [
        ({"inversion_time": 2500.0, "echo_time": 120.0, "repetition_time": 9000.0}, FLAIR),
        ({"repetition_time": 500.0, "echo_time": 12.0}, PRE),
        ({"repetition_time": 500.0, "echo_time": 12.0, "contrast_agent": "Gd"}, POST),
        ({"repetition_time": 4000.0, "echo_time": 100.0}, None),
        ({"repetition_time": 600.0, "echo_time": 25.0}, None),
    ],
)
def test_what_the_times_mean_where_the_description_says_nothing(known, role):
    assert role_of(series("series 5", **known), RULES)[0] == role
    assert role_of(series("AX T1", **known), RULES)[0] in (PRE, POST)  # a description goes first


def test_a_named_contrast_agent_makes_a_t1_post_contrast_unless_it_says_otherwise():
    assert role_of(series("AX T1", contrast_agent="Gadovist 7 ml"), RULES)[0] == POST
    assert role_of(series("AX T1 PRE", contrast_agent="Gadovist 7 ml"), RULES)[0] == PRE
    assert role_of(series("AX T1", contrast_agent="NONE"), RULES)[0] == PRE


@pytest.mark.parametrize(
    "exam",
    [
        "",
        "BRAIN W/WO CONTRAST",
        "BRAIN TUMOR W PERFUSION",
        "BRAIN MRI/MRA",
        "BRAIN WITH CONTRAST",
        "Brain Tumor DTI",
        "T1sagknee",
        "PRO DCE W_T1 MAPPING AN/",
    ],
)
def test_the_exams_name_does_not_decide_over_a_series_own(exam):
    for description, agent, role in (
        ("AX T1", "", PRE),
        ("AX T2 FLAIR", "", FLAIR),
        ("AX T1 POST", "Gadavist", POST),
        ("AX T1 +C", "", POST),
        ("AX T2", "", None),
        ("ADC", "", None),
    ):
        assert role_of(series(description, protocol=exam, contrast_agent=agent), RULES)[0] == role, (
            description
        )


def test_the_protocols_name_speaks_where_nothing_else_does():
    assert role_of(series("", protocol="t2_tirm_tra_dark-fluid"), RULES) == (FLAIR, "by its protocol's name")
    assert role_of(series("5", protocol="t1_se_tra KM"), RULES)[0] == POST
    assert role_of(series("5", protocol="ep2d_diff"), RULES)[0] is None
    t1 = {"repetition_time": 500.0, "echo_time": 12.0}
    assert role_of(series("5", protocol="t2_tirm_tra_dark-fluid", **t1), RULES) == (PRE, "by its times")


def test_what_contradicts_a_description_is_told():
    flair = {"inversion_time": 2500.0, "echo_time": 120.0, "repetition_time": 9000.0}
    assert "though its times are those of a FLAIR" in role_of(series("AX T1", **flair), RULES)[1]
    assert "though a contrast agent is named" in role_of(series("T1 PRE", contrast_agent="Gd"), RULES)[1]
    assert "though it says that no contrast" in role_of(series("T1 POST", contrast_agent="NO"), RULES)[1]
    assert "though" not in role_of(series("AX FLAIR", **flair), RULES)[1]


def test_one_number_of_several_people_is_noticed():
    def of(uid, number, *person):
        return series("FLAIR", uid=uid, patient_id=number, person=person)

    told = shared_numbers(
        [
            of("1", "ANONYMOUS", "A^B", "19500101", "F"),
            of("2", "ANONYMOUS", "C^D", "19500101", "F"),
            of("3", "7", "E^F", "", "M"),
            of("4", "7", "E^F", "19600101", "M"),
        ]
    )
    assert told.keys() == {"ANONYMOUS"} and "different names:" in told["ANONYMOUS"]
    nameless = [replace(of(uid, "", "A^B", "", "F"), study_uid=uid) for uid in ("1", "2")]
    assert (
        "2 studies have no patient number, so each is treated as a separate patient"
        in shared_numbers(nameless)[""]
    )
    assert shared_numbers(nameless[:1]) == {}


@pytest.mark.parametrize(
    "name, role",
    [("BraTS_001_seg", MASK), ("tumor_mask", MASK), ("label", MASK), ("brain_mask", None), ("flair", FLAIR)],
)
def test_masks_are_told_by_a_nifti_files_name_alone(name, role):
    assert role_of(series(name, modality="NIfTI"), RULES)[0] == role
    assert role_of(series("anything", modality="SEG"), RULES)[0] == MASK
    assert role_of(series("tumor", modality="MR"), RULES)[0] is None


def plan(*found: Series):
    (study,) = plan_studies(list(found), RULES)
    return study, {line.series.description: (line.used_as, line.why) for line in study.lines}


def test_a_study_takes_its_channels_and_names_what_it_leaves():
    study, lines = plan(
        series("AX FLAIR"),
        series("AX T1"),
        series("AX T1 +C"),
        series("AX T2"),
        series("AX FLAIR b", slices=3),
        series("AX FLAIR c", slices=1),
        series("LOC", problems=("it is a localizer",)),
    )
    assert {name: s.description for name, s in study.channels.items()} == dict(
        zip(CHANNELS, ("AX T1", "AX FLAIR", "AX T1 +C"))
    )
    assert lines["AX T2"][0] == "" and "neither its description nor its times" in lines["AX T2"][1]
    assert lines["AX FLAIR c"] == ("", "1 slice is not a volume")
    assert lines["AX FLAIR b"] == ("", "3 slices are not a volume") and lines["LOC"] == (
        "",
        "it is a localizer",
    )
    assert study.mask is None


@pytest.mark.parametrize(
    "better, worse, reason",
    [
        (dict(uid="outlined"), dict(slices=90), "a segmentation is of it"),
        (dict(), dict(orientation=SAGITTAL, slices=90), "it is axial"),
        (
            dict(image_type=("ORIGINAL", "PRIMARY")),
            dict(image_type=("DERIVED", "SECONDARY"), slices=90),
            "it is original",
        ),
        (dict(slices=30), dict(number=9), "it has more slices"),
        (dict(number=9), dict(number=4), "it came last"),
        (dict(), dict(), "nothing tells them apart"),
    ],
)
def test_of_two_series_that_claim_to_be_flair_one_is_taken_and_it_is_told_why(better, worse, reason):
    segmentation = series("tumour", modality="SEG", references=("outlined",))
    study, lines = plan(series("FLAIR one", **better), series("FLAIR two", **worse), segmentation)
    assert study.channels[FLAIR].description == "FLAIR one"
    assert (
        lines["FLAIR two"][0] == ""
        and "also claims to be FLAIR" in lines["FLAIR two"][1]
        and reason in lines["FLAIR two"][1]
    )
    assert "2 series claim to be FLAIR" in lines["FLAIR one"][1]


def test_without_flair_a_study_is_left_out():
    study, lines = plan(series("AX T1"), series("AX T1 +C"), series("tumour", modality="SEG"))
    assert study.channels == {} and study.mask is None
    assert set(lines.values()) == {("", "the study has no FLAIR")}


def test_masks_belong_to_a_series_that_is_used():
    flair, post = series("FLAIR", uid="f"), series("T1 +C", uid="p")

    def mask(name, *of):
        return series(name, modality="SEG", references=of, problems=("it is of modality SEG, not MR",))

    study, lines = plan(flair, post, mask("of another", "x"), mask("of post", "p"), mask("of flair", "f"))
    assert study.mask.description == "of flair" and study.mask_of == FLAIR
    assert (
        "a series that is not used" in lines["of another"][1]
        and "that of FLAIR was taken" in lines["of post"][1]
    )
    assert plan(flair, post, mask("of post", "p"))[0].mask_of == POST
    study, lines = plan(flair, mask("one", "f"), mask("two", "f"))
    assert study.mask is None and "2 segmentations claim to be the mask" in lines["one"][1]


def test_studies_come_by_patient_and_date():
    found = [
        series("FLAIR", uid=f"{p}{s}", patient_id=p, study_uid=s, when=w)
        for p, s, w in (("b", "1", "2019"), ("a", "3", "2021"), ("a", "4", "2020"))
    ]
    assert [(s.patient_id, s.uid) for s in plan_studies(found, RULES)] == [("a", "4"), ("a", "3"), ("b", "1")]


@pytest.mark.parametrize(
    "before, after, sentence",
    [
        ("[flair]", "[flare]", "lack flair"),
        ("'flair'", "'fl(air'", "can't be understood"),
        ("[t1]", "[more]\n[t1]", "an unknown section more"),
        ("[1]", "[0]", "whole numbers above 0"),
        ("labels = [1]", "", "lack labels"),
        ("inversion_time", "inverse_time", "inverse_time is not a rule"),
        ("[mask]", "]", "can't be understood"),
    ],
)
def test_rules_that_can_not_be_used_are_told(tmp_path, before, after, sentence):
    (tmp_path / "rules.toml").write_text(DEFAULT.read_text().replace(before, after, 1))
    with pytest.raises(MedFLError, match=sentence):
        load_rules(tmp_path / "rules.toml")


def test_changed_rules_decide(tmp_path):
    text = DEFAULT.read_text().replace("'flair'", "'wunderwasser'").replace("labels = [1]", "labels = [1, 2]")
    (tmp_path / "rules.toml").write_text(text)
    rules = load_rules(tmp_path / "rules.toml")
    assert (
        role_of(series("T2 Wunderwasser"), rules)[0] == FLAIR
        and role_of(series("AX FLAIR"), rules)[0] is None
    )
    assert rules.labels == (1, 2)
    with pytest.raises(MedFLError, match="can't be read"):
        load_rules(tmp_path / "gone.toml")


def test_channels_are_the_networks():
    import preprocessing

    assert CHANNELS == preprocessing.CHANNELS
