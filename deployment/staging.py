"""The folders that are published: the page with its server (Docker Space), and the page that runs in the
browser (static Space).

Each is filled with named files that its page needs, so that no other file gets in.
"""

import json
import shutil
import tomllib
from pathlib import Path

from borders.escaping import markdown
from checkpoint import Checkpoint
from common import ROOT, MedFLError, files_needed
from deployment.app.card import NOTICE, card_rows
from deployment.export_onnx import Difference, export

SPACE, BROWSER = ROOT / "models" / "space", ROOT / "models" / "browser"
DATASET_LICENCE = "cc-by-nc-sa-4.0"  # licence of the LGG scans, which also applies to weights trained on them
SAMPLES = "deployment/app/samples"
SERIES_RULES = ROOT / "radiology" / "series_rules.toml"

# in addition to the page's imports
SPACE_OTHERS = (
    "LICENSE",
    "deployment/app/.streamlit/config.toml",
    "deployment/viewer/dist/viewer.js",
    "deployment/viewer/dist/viewer.css",
    "deployment/viewer/dist/LICENSES.txt",
)
NOT_IN_A_SPACE = ("radiology",)  # DICOM files contain names, and a Space is somebody else's computer
SPACE_TOP = ("README.md", "Dockerfile", "requirements.txt")  # of deployment/space

BROWSER_FILES = (
    "README.md",
    "index.html",
    "style.css",
    "icon.svg",
    "manifest.webmanifest",
)  # of deployment/browser, and its *.js
# of its node_modules: a library's folder and files, {pattern in the library: folder in libs}
LIBRARIES = {
    "fast-png": {"lib/*.js": "fast-png", "lib/helpers/*.js": "fast-png/helpers"},
    "fflate": {"esm/browser.js": "fflate"},
    "iobuffer": {"lib/*.js": "iobuffer"},
    "nifti-reader-js": {"dist/*.js": "nifti-reader-js"},
    "tiff": {"lib/*.js": "tiff", "lib/tags/*.js": "tiff/tags"},
}
# of deployment/viewer/dist, which `npm run build` makes from NiiVue and our modules
VIEWER = {"viewer.js": "viewer.js", "viewer.css": "viewer.css", "libs/viewer/LICENSE": "LICENSES.txt"}
# of dcm2niix, which reads DICOM; its package does not contain the licence's text
DCM2NIIX = {
    name: f"node_modules/@niivue/dcm2niix/dist/{name}" for name in ("dcm2niix.jpeg.js", "dcm2niix.jpeg.wasm")
} | {"LICENSE": "LICENSE-dcm2niix.txt"}
# .js instead of the package's .mjs: some servers send .mjs with a type that browsers don't run
ONNXRUNTIME = {
    "ort.js": "ort.wasm.min.mjs",
    "ort-wasm.js": "ort-wasm-simd-threaded.mjs",
    "ort-wasm.wasm": "ort-wasm-simd-threaded.wasm",
    # for graphics cards (WebGPU), if WebAssembly can wait for them (JSPI); loaded only there
    "ort-gpu.js": "ort.jspi.min.mjs",
    "ort-gpu-wasm.js": "ort-wasm-simd-threaded.jspi.mjs",
    "ort-gpu-wasm.wasm": "ort-wasm-simd-threaded.jspi.wasm",
}


def stage_space(checkpoint: Checkpoint, folder: Path = SPACE) -> list[Path]:
    """Put the Streamlit page, its modules and one model into `folder`; the files' paths. Raises MedFLError for a file
    that holds more than a model."""
    if checkpoint.state is not None:
        raise MedFLError(
            f"{checkpoint.path} also holds the state with which its run continues: the optimiser's memory "
            "of single scans, and a federation's hospitals; publish the _best.pth beside it"
        )
    code = files_needed("deployment/app/app.py", without=NOT_IN_A_SPACE)
    sources = {name: ROOT / name for name in (*code, *SPACE_OTHERS)}
    sources |= {name: ROOT / "deployment" / "space" / name for name in SPACE_TOP}
    sources["requirements.lock"] = ROOT / "requirements" / "space.lock"
    sources |= {f"{SAMPLES}/{path.name}": path for path in sorted((ROOT / SAMPLES).glob("*.zip"))}
    name = (
        checkpoint.path.name
        if checkpoint.path.name.endswith("_best.pth")
        else f"{checkpoint.path.stem}_best.pth"
    )
    sources[f"models/{name}"] = checkpoint.path
    return _fill(folder, sources, checkpoint)


def stage_browser(
    checkpoint: Checkpoint, half: bool = True, folder: Path = BROWSER
) -> tuple[list[Path], Difference]:
    """Put the page that runs in the browser, its libraries and the exported model into `folder`; the files'
    paths, and the exported model's difference from inference.py. Raises MedFLError if the libraries are not
    installed."""
    content, difference = export(checkpoint, half)
    page = ROOT / "deployment" / "browser"
    sources = {name: page / name for name in BROWSER_FILES} | {
        path.name: path for path in sorted(page.glob("*.js"))
    }
    sources |= {f"samples/{path.name}": path for path in sorted((ROOT / SAMPLES).glob("*.zip"))}
    sources["LICENSE"] = ROOT / "LICENSE"
    libraries = page / "node_modules"
    try:
        for library, patterns in LIBRARIES.items():
            for pattern, inside in patterns.items():
                sources |= {
                    f"libs/{inside}/{path.name}": path for path in sorted((libraries / library).glob(pattern))
                }
            sources[f"libs/{library}/LICENSE"] = libraries / library / "LICENSE"
        runtime = libraries / "onnxruntime-web"
        sources |= {
            f"libs/onnxruntime/{name}": runtime / "dist" / source for name, source in ONNXRUNTIME.items()
        }
        sources["libs/onnxruntime/README.md"] = (
            runtime / "README.md"
        )  # names its licence; the package does not contain the text
        sources |= {f"libs/dcm2niix/{name}": page / source for name, source in DCM2NIIX.items()}
        sources |= {name: ROOT / "deployment" / "viewer" / "dist" / source for name, source in VIEWER.items()}
        _fill(folder, sources, checkpoint)
    except FileNotFoundError as error:
        raise MedFLError(
            "the page's libraries are missing; install and build them with `make browser-libraries` (Node.js 20 "
            "or newer)"
        ) from error
    (folder / "model.onnx").write_bytes(content)
    rules = tomllib.loads(SERIES_RULES.read_text(encoding="utf-8"))
    (folder / "series_rules.json").write_text(json.dumps(rules), encoding="utf-8")
    return _files(folder), difference


def _fill(folder: Path, sources: dict[str, Path], checkpoint: Checkpoint) -> list[Path]:
    """Copy each source to its name in an empty `folder`, write the model card, and name the weights'
    licence."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, source in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    (folder / "MODEL_CARD.md").write_text(model_card(checkpoint), encoding="utf-8")
    if not of_phantoms(checkpoint):
        readme = folder / "README.md"
        text = readme.read_text(encoding="utf-8")
        readme.write_text(text.replace("license: mit", f"license: {DATASET_LICENCE}"), encoding="utf-8")
    return _files(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def of_phantoms(checkpoint: Checkpoint) -> bool:
    """Whether the model was trained without real scans."""
    return checkpoint.metadata.get("data", {}).get("name") == "phantoms"


def model_card(checkpoint: Checkpoint) -> str:
    """The model's card as Markdown: use and limits, then what the metadata says."""
    rows = card_rows(checkpoint, checkpoint.sha256())
    return "\n".join(
        [
            "# Model card",
            "",
            f"**{NOTICE}**",
            "",
            "**Use:** to look at what a small TransUNet finds on slices of brain MRI (pre-contrast, FLAIR, "
            "post-contrast), in research and teaching. **Not for:** patients' care, other organs, other "
            "sequences, or scanners unlike those of the training scans. Small or faint tumours are missed, "
            "and bright spots that are not tumour are outlined.",
            "",
            "**Figures:** the Dice is the volume Dice of each patient, averaged over patients; the interval "
            "is a bootstrap over them.",
            "",
            "| | |",
            "| --- | --- |",
            *[f"| {subject} | {markdown(text)} |" for subject, text in rows],
            "",
        ]
    )
