"""Publish the app with one model as a Hugging Face Space.

    python deployment/push_to_space.py --repo NAME/medfl --checkpoint models/transunet_federated_best.pth --dry-run
    python deployment/push_to_space.py --repo NAME/medfl --checkpoint models/transunet_federated_best.pth
    python deployment/push_to_space.py --repo NAME/medfl --checkpoint models/transunet_federated_best.pth --static

The first two publish the Streamlit page as a Docker Space, the third the page that runs in the reader's
browser as a static Space, which is free. Stages a folder (models/space or models/browser) from an allow-list,
shows its content, and with your token (`hf auth login`, or HF_TOKEN) creates or updates the Space and waits
until it runs. --dry-run stops before anything is sent.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from checkpoint import load_checkpoint
from common import ROOT, MedFLError, run_script
from deployment.export_onnx import told
from deployment.staging import BROWSER, SPACE, of_phantoms, stage_browser, stage_space

PATIENCE = 1_800.0  # seconds allowed for the Space to be built and started
LOOK = 5.0  # seconds between two checks


@dataclass(frozen=True)
class Kind:
    """One of the two Spaces. folder: the folder that is sent; title: in the front matter of its README;
    own_machine: how to run the page without a Space."""

    sdk: str
    folder: Path
    title: str
    own_machine: str


DOCKER = Kind(
    "docker",
    SPACE,
    "MedFL",
    f"docker build -t medfl {SPACE.relative_to(ROOT)} && docker run --rm -p 127.0.0.1:8501:8501 medfl",
)
STATIC = Kind("static", BROWSER, "MedFL in the browser", "make browser-demo")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", required=True, help="the Space's name, NAME or OWNER/NAME")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="the model that the page shows, a .pth file"
    )
    parser.add_argument(
        "--static", action="store_true", help="publish the page that runs in the browser, as a static Space"
    )
    parser.add_argument(
        "--single",
        action="store_true",
        help="with --static: store the weights in single precision, twice the size",
    )
    parser.add_argument("--dry-run", action="store_true", help="stage the folder and show it, send nothing")
    return parser.parse_args()


def publish(repo: str, kind: Kind) -> str:
    """Create or update the Space from the staged folder, wait until it runs, and return its address. Raises
    MedFLError if that fails."""
    api = HfApi()
    try:
        owner = api.whoami()["name"]
        repo = repo if "/" in repo else f"{owner}/{repo}"
        _create(api, repo, kind)
        api.upload_folder(
            repo_id=repo,
            repo_type="space",
            folder_path=kind.folder,
            delete_patterns="*",
            commit_message="MedFL's page",
        )
        _wait(api, repo)
    except LocalTokenNotFoundError as error:
        raise MedFLError(
            "there is no Hugging Face token; make one with write access and set it with `hf auth login` or "
            f"HF_TOKEN, or run the page yourself: {kind.own_machine}"
        ) from error
    except HFValidationError as error:
        raise MedFLError(
            f"{repo} is not a valid name for a Space; use letters, digits, - and _, as in NAME/medfl"
        ) from error
    except HfHubHTTPError as error:
        raise MedFLError(_reason(error, repo, kind)) from error
    except OfflineModeIsEnabled as error:
        raise MedFLError("HF_HUB_OFFLINE blocks access to the network; unset HF_HUB_OFFLINE") from error
    except HTTPError as error:
        raise MedFLError(
            f"Hugging Face can't be reached ({type(error).__name__}); check the network, or run the page "
            f"yourself: {kind.own_machine}"
        ) from error
    return f"https://huggingface.co/spaces/{repo}"


def _create(api: HfApi, repo: str, kind: Kind) -> None:
    """Create the Space, unless it exists and holds this app. Raises MedFLError if it holds something else."""
    if not api.repo_exists(repo, repo_type="space"):
        api.create_repo(repo, repo_type="space", space_sdk=kind.sdk)
        return
    about = api.space_info(repo)
    title = about.card_data.get("title") if about.card_data else None
    if about.sdk != kind.sdk or title != kind.title:
        raise MedFLError(f"the name {repo} is taken by another Space; choose another --repo")


def _wait(api: HfApi, repo: str) -> None:
    """Wait until the Space runs. Raises MedFLError if it can't be built or started."""
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
    raise MedFLError(
        f"the Space does not run after {PATIENCE / 60:.0f} minutes; see its log at "
        f"https://huggingface.co/spaces/{repo}"
    )


def _reason(error: HfHubHTTPError, repo: str, kind: Kind) -> str:
    """The meaning of a refusal and what to do."""
    code = error.response.status_code
    if code == 401:
        return (
            "the Hugging Face token is wrong or has expired; make a new one with write access, and set it "
            "with `hf auth login`"
        )
    if code == 402:
        why = (
            " (free accounts can't); publish the page that runs in the browser with --static, take a paid "
            "plan"
            if kind is DOCKER
            else "; look at its plan"
        )
        spaces = f"{kind.sdk.capitalize()} Spaces"
        return f"this account may not create {spaces}{why}, or run the page yourself: {kind.own_machine}"
    if code == 403:
        return f"the token has no write access to {repo}; make one that has, or choose another --repo"
    if code == 409:
        return f"the name {repo} is taken; choose another --repo"
    return f"Hugging Face refused with code {code}; try again later, or run the page yourself: {kind.own_machine}"


def main() -> None:
    arguments = parse()
    kind = STATIC if arguments.static else DOCKER
    if arguments.single and kind is DOCKER:
        raise MedFLError(
            "--single is for the page that runs in the browser; add --static, or leave out --single"
        )
    checkpoint = load_checkpoint(arguments.checkpoint)
    if kind is STATIC:
        files, difference = stage_browser(checkpoint, not arguments.single)
        print(f"exported the model: {told(difference)}")
    else:
        files = stage_space(checkpoint)
    for path in files:
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.relative_to(kind.folder).as_posix()}")
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"{size:8.2f} MB in {len(files)} files, staged in {kind.folder.relative_to(ROOT).as_posix()}")
    if not of_phantoms(checkpoint):
        print("note: the licence of the training scans also applies to the weights and to the Space")
    if arguments.dry_run:
        print(f"nothing was sent; to run it here: {kind.own_machine}")
        return
    print(f"{publish(arguments.repo, kind)} runs")


if __name__ == "__main__":
    run_script(main)
