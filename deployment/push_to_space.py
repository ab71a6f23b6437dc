"""Publish the app with one model as a Hugging Face Space.

    python deployment/push_to_space.py --repo NAME/medfl --checkpoint models/transunet_federated_best.pth --dry-run
    python deployment/push_to_space.py --repo NAME/medfl --checkpoint models/transunet_federated_best.pth

Stages a folder (models/space) from an allow-list, shows what it holds, and with a token of yours (`hf auth login`, or HF_TOKEN)
creates or updates the Space and waits until it runs. --dry-run stops before anything is sent.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "deployment" / "app")]

import argparse  # noqa: E402
import shutil  # noqa: E402
import time  # noqa: E402

from huggingface_hub import HfApi  # noqa: E402
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError  # noqa: E402

from card import NOTICE, card_rows  # noqa: E402
from checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from common import MedFLError, run_script  # noqa: E402

STAGE = ROOT / "models" / "space"
CODE = ("LICENSE", "checkpoint.py", "common.py", "inference.py", "metrics.py", "plausibility.py", "preprocessing.py",
        "torchvision_operators.py", "transunet.py", "deployment/app/.streamlit/config.toml")
FOLDERS = {"deployment/app": "*.py", "deployment/app/samples": "*.zip"}
SPACE = ("README.md", "Dockerfile", "requirements.txt")  # of deployment/space, to the top
DATASET_LICENCE = "cc-by-nc-sa-4.0"  # of the LGG scans, which weights trained on them carry as well
PATIENCE = 1_800.0  # seconds for the Space to be built and started
LOOK = 5.0  # seconds between two looks at it
OWN_MACHINE = f"docker build -t medfl {STAGE.relative_to(ROOT)} && docker run --rm -p 127.0.0.1:8501:8501 medfl"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", required=True, help="the Space's name, NAME or OWNER/NAME")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model that the page shows, a .pth file")
    parser.add_argument("--dry-run", action="store_true", help="stage the folder and show it, send nothing")
    return parser.parse_args()


def stage(checkpoint: Checkpoint, folder: Path = STAGE) -> list[Path]:
    """Put what the Space needs into `folder`, and nothing else; the files' paths in it."""
    shutil.rmtree(folder, ignore_errors=True)
    sources = {name: ROOT / name for name in CODE} | {name: ROOT / "deployment" / "space" / name for name in SPACE}
    for inside, pattern in FOLDERS.items():
        sources |= {f"{inside}/{path.name}": path for path in sorted((ROOT / inside).glob(pattern))}
    name = checkpoint.path.name if checkpoint.path.name.endswith("_best.pth") else f"{checkpoint.path.stem}_best.pth"
    sources[f"models/{name}"] = checkpoint.path
    for name, source in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    (folder / "MODEL_CARD.md").write_text(model_card(checkpoint), encoding="utf-8")
    if not of_phantoms(checkpoint):
        readme = folder / "README.md"
        text = readme.read_text(encoding="utf-8")
        readme.write_text(text.replace("license: mit", f"license: {DATASET_LICENCE}"), encoding="utf-8")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def of_phantoms(checkpoint: Checkpoint) -> bool:
    """Whether no real scan went into the model."""
    return checkpoint.metadata.get("data", {}).get("name") == "phantoms"


def model_card(checkpoint: Checkpoint) -> str:
    """The model's card as Markdown: use and limits, then what the metadata says."""
    rows = card_rows(checkpoint, checkpoint.sha256(), "CPU of the Space")
    return "\n".join([
        "# Model card", "", f"**{NOTICE}**", "",
        "**Use:** to look at what a small TransUNet finds on slices of brain MRI (pre-contrast, FLAIR, post-contrast), in "
        "research and teaching. **Not for:** patients' care, other organs, other sequences, or scanners unlike those of the "
        "training scans. Small or faint tumours are missed, and bright spots that are no tumour are outlined.", "",
        "**Figures:** the Dice is the volume Dice of each patient, averaged over patients; the interval is a bootstrap over them.",
        "",
        "| | |", "| --- | --- |", *[f"| {subject} | {text} |" for subject, text in rows], ""])


def publish(repo: str) -> str:
    """Create or update the Space from the staged folder and wait until it runs; its address. Raises MedFLError."""
    api = HfApi()
    try:
        owner = api.whoami()["name"]
        repo = repo if "/" in repo else f"{owner}/{repo}"
        _create(api, repo)
        api.upload_folder(repo_id=repo, repo_type="space", folder_path=STAGE, delete_patterns="*", commit_message="MedFL's app")
        _wait(api, repo)
    except LocalTokenNotFoundError as error:
        raise MedFLError("there is no Hugging Face token; make one that may write and give it with `hf auth login` or "
                         f"HF_TOKEN, or run the page yourself: {OWN_MACHINE}") from error
    except HFValidationError as error:
        raise MedFLError(f"{repo} is no name for a Space; choose letters, digits, - and _, as in NAME/medfl") from error
    except HfHubHTTPError as error:
        raise MedFLError(_reason(error, repo)) from error
    except HTTPError as error:
        raise MedFLError(f"Hugging Face can't be reached ({type(error).__name__}); check the network, or run the page yourself: "
                         f"{OWN_MACHINE}") from error
    return f"https://huggingface.co/spaces/{repo}"


def _create(api: HfApi, repo: str) -> None:
    """Make the Space, unless it is there and holds this app. Raises MedFLError where it holds something else."""
    if not api.repo_exists(repo, repo_type="space"):
        api.create_repo(repo, repo_type="space", space_sdk="docker")
        return
    about = api.space_info(repo)
    if about.sdk != "docker" or (about.card_data or {}).get("title") != "MedFL":
        raise MedFLError(f"the name {repo} is taken by another Space; choose another --repo")


def _wait(api: HfApi, repo: str) -> None:
    """Wait until the Space runs. Raises MedFLError where it can't be built or started."""
    until = time.monotonic() + PATIENCE
    before = None
    while time.monotonic() < until:
        state = api.get_space_runtime(repo).stage
        if state != before:
            print(f"the Space is {state}")
            before = state
        if state == "RUNNING":
            return
        if state.endswith("_ERROR") or state in ("PAUSED", "STOPPED", "DELETING"):
            raise MedFLError(f"the Space is {state}; see its log at https://huggingface.co/spaces/{repo}")
        time.sleep(LOOK)
    raise MedFLError(f"the Space does not run after {PATIENCE / 60:.0f} minutes; see its log at https://huggingface.co/spaces/{repo}")


def _reason(error: HfHubHTTPError, repo: str) -> str:
    """What a refusal means and what to do."""
    code = error.response.status_code
    if code == 401:
        return "the Hugging Face token is wrong or has expired; make a new one that may write, and give it with `hf auth login`"
    if code == 402:
        return ("this account may not create Docker Spaces (free accounts can't); take a paid plan, or run the page yourself: "
                + OWN_MACHINE)
    if code == 403:
        return f"the token may not write to {repo}; make one that may, or choose another --repo"
    if code == 409:
        return f"the name {repo} is taken; choose another --repo"
    return f"Hugging Face refused with code {code}; try again later, or run the page yourself: {OWN_MACHINE}"


def main() -> None:
    arguments = parse()
    checkpoint = load_checkpoint(arguments.checkpoint)
    files = stage(checkpoint)
    for path in files:
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.relative_to(STAGE).as_posix()}")
    print(f"{sum(path.stat().st_size for path in files) / 1e6:8.2f} MB in {len(files)} files, staged in {STAGE.relative_to(ROOT)}")
    if not of_phantoms(checkpoint):
        print("mind: the weights carry the licence of the scans that they were trained on, and so does the Space")
    if arguments.dry_run:
        print(f"nothing was sent; to run it here: {OWN_MACHINE}")
        return
    print(f"{publish(arguments.repo)} runs")


if __name__ == "__main__":
    run_script(main)
