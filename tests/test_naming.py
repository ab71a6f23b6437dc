"""How twelve published glioma sets, BIDS and converters name their files, and what each name is taken for."""

import json

import nibabel
import numpy as np
import pytest

from radiology.nifti import find_volumes
from radiology.rules import FLAIR, MASK, POST, PRE, load_rules, role_of
from radiology.series import Series

RULES = load_rules()
NAMES = {
    "BraTS 2012": {
        "VSD.Brain.XX.O.MR_Flair.54512": FLAIR,
        "VSD.Brain.XX.O.MR_T1.54513": PRE,
        "VSD.Brain.XX.O.MR_T1c.54514": POST,
        "VSD.Brain_3more.XX.XX.OT.54517": MASK,
    },
    "BraTS 2018 to 2021": {
        "BraTS19_2013_0_1_flair": FLAIR,
        "BraTS19_2013_0_1_t1": PRE,
        "BraTS19_2013_0_1_t1ce": POST,
        "BraTS19_2013_0_1_t2": None,
        "BraTS19_2013_0_1_seg": MASK,
    },
    "BraTS 2023": {
        "BraTS-GLI-00000-000-t1n": PRE,
        "BraTS-GLI-00000-000-t1c": POST,
        "BraTS-GLI-00000-000-t2f": FLAIR,
        "BraTS-GLI-00000-000-t2w": None,
        "BraTS-GLI-00000-000-seg": MASK,
    },
    "TCGA-LGG and TCGA-GBM": {
        "TCGA-CS-4942_1997.02.22_flair": FLAIR,
        "TCGA-CS-4942_1997.02.22_t1": PRE,
        "TCGA-CS-4942_1997.02.22_t1Gd": POST,
        "TCGA-CS-4942_1997.02.22_GlistrBoost": MASK,
        "TCGA-CS-4942_1997.02.22_GlistrBoost_ManuallyCorrected": MASK,
    },
    "UCSF-PDGM": {
        "UCSF-PDGM-0004_FLAIR": FLAIR,
        "UCSF-PDGM-0004_FLAIR_bias": None,
        "UCSF-PDGM-0004_T1": PRE,
        "UCSF-PDGM-0004_T1c": POST,
        "UCSF-PDGM-0004_SWI": None,
        "UCSF-PDGM-0004_tumor_segmentation": MASK,
        "UCSF-PDGM-0004_brain_segmentation": None,
        "UCSF-PDGM-0004_brain_parenchyma_segmentation": None,
    },
    "UPENN-GBM": {
        "UPENN-GBM-00001_11_FLAIR": FLAIR,
        "UPENN-GBM-00001_11_T1": PRE,
        "UPENN-GBM-00001_11_T1GD": POST,
        "UPENN-GBM-00001_11_segm": MASK,
        "UPENN-GBM-00001_11_automated_approx_segm": MASK,
    },
    "MU-Glioma-Post": {
        "PatientID_0003_Timepoint_1_brain_t1c": POST,
        "PatientID_0003_Timepoint_1_brain_t1n": PRE,
        "PatientID_0003_Timepoint_1_brain_t2f": FLAIR,
        "PatientID_0003_Timepoint_1_tumorMask": MASK,
    },
    "LUMIERE": {"CT1": POST, "FLAIR": FLAIR, "T1": PRE, "T2": None, "HD-GLIO-AUTO-segmentation": MASK},
    "Erasmus EGD": {"FLAIR": FLAIR, "T1": PRE, "T1GD": POST, "T2": None, "MASK": MASK},
    "RHUH-GBM": {"RHUH-0001_0_flair": FLAIR, "RHUH-0001_0_t1ce": POST, "RHUH-0001_0_segmentations": MASK},
    "UCSD-PTGBM": {
        "UCSD-PTGBM-0001_01_FLAIR": FLAIR,
        "UCSD-PTGBM-0001_01_T1pre": PRE,
        "UCSD-PTGBM-0001_01_T1post": POST,
        "UCSD-PTGBM-0001_01_BraTS_tumor_seg": MASK,
    },
    "ReMIND": {
        "ReMIND-001-preop-3D_AX_T1_postcontrast": POST,
        "ReMIND-001-preop-2D_AX_T2_FLAIR": FLAIR,
        "ReMIND-001-preop-SEG-tumor-MR": MASK,
    },
    "BIDS": {
        "sub-01_ses-1_FLAIR": FLAIR,
        "sub-01_T1w": PRE,
        "sub-01_ce-gadolinium_T1w": POST,
        "sub-01_label-lesion_mask": MASK,
        "sub-01_space-FLAIR_dseg": MASK,
        "sub-01_space-FLAIR_desc-brain_mask": None,
    },
    "CaPTk and Slicer": {
        "AAAC0_flair_pp_shrunk": FLAIR,
        "AAAC0_flair_pp_shrunk_testTumor": MASK,
        "FLAIR-label": MASK,
        "flair_tumorseg": MASK,
        "FLAIRmask": MASK,
        "flair_ROI": MASK,
        "FLAIR_tumour_outline": MASK,
        "FLAIR_GTV": MASK,
        "FLAIR_lesionmask": MASK,
        "FLAIR_brainmask": None,
        "Segmentation.seg": MASK,
    },
    "dcm2niix": {
        "t2_spc_da-fl_sag_p2_iso": FLAIR,
        "t2_tirm_tra_dark-fluid": FLAIR,
        "t1_mpr_sag_p2_iso_KM": POST,
        "t1_mprage_sag_p2_iso": PRE,
        "3D_Brain_VIEW_FLAIR_SHC": FLAIR,
        "sT1W_3D_TFE_GD": POST,
        "T1W_3D_TFE": PRE,
        "Ax_3D_BRAVO_C": POST,
    },
}


@pytest.mark.parametrize("published", NAMES)
def test_names_of_published_sets(published):
    found = {name: role_of(Series("u", "s", "p", "NIfTI", name, ()), RULES)[0] for name in NAMES[published]}
    assert found == NAMES[published]


def save(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.int16), np.diag([1.0, 1, 1, 1])), path)


def test_a_derivatives_tree_is_of_the_raw_trees_patients(tmp_path):
    raw = tmp_path / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_FLAIR.nii.gz"
    drawn = tmp_path / "derivatives" / "manual" / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_dseg.nii.gz"
    for path in (raw, drawn):
        save(path)
    found, refused = find_volumes(tmp_path, [raw, drawn])
    assert not refused and {(s.patient_id, s.study_uid) for s in found} == {("sub-01", "sub-01/ses-1")}


def test_the_json_of_dcm2niix_is_read(tmp_path):
    save(tmp_path / "anna" / "scan_5.nii.gz")
    told = {
        "MagneticFieldStrength": 3,
        "Manufacturer": "Siemens",
        "ManufacturersModelName": "Prisma",
        "RepetitionTime": 9,
        "EchoTime": 0.12,
        "InversionTime": 2.5,
        "SeriesDescription": "ax dark fluid",
    }
    beside = tmp_path / "anna" / "scan_5.json"
    beside.write_text(json.dumps(told))
    (series,), refused = find_volumes(tmp_path, sorted((tmp_path / "anna").iterdir()))
    assert not refused and role_of(series, RULES) == (FLAIR, "by its times")
    assert (series.field_strength, series.manufacturer, series.model) == (3, "Siemens", "Prisma")
    for broken in ("[]", "{", '{"EchoTime": true, "RepetitionTime": NaN}'):
        beside.write_text(broken)
        (series,), _ = find_volumes(tmp_path, [tmp_path / "anna" / "scan_5.nii.gz"])
        assert series.echo_time is None and series.repetition_time is None
