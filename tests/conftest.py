"""What several tests share: a small phantom cohort, and a model trained on it for a moment."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from running import run_script

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job ignores Ctrl-C, and its children would too
os.environ["HF_HUB_OFFLINE"] = "1"  # the same with and without a network; one test asks a hub of its own
os.environ["OMP_NUM_THREADS"] = "1"  # two tests run at a time, and threads beyond the cores slow all down

# Files that take longest begin first, so that none is left to one worker in the end; those that start many processes
# stand beside those that start few.
LONGEST = (
    "test_gateway",
    "test_scripts",
    "test_export",
    "test_secure_aggregation",
    "test_patient_privacy",
    "test_trouble",
    "test_space",
    "test_runs",
    "test_viewer",
    "test_consent",
    "test_poison",
    "test_weeks",
    "test_scan_viewer",
    "test_federated_study",
    "test_simulation",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files, for `--no-loadscope-reorder`; inside of a file the order stays."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A home folder of the tests' own, so that no cache of the user's is touched."""
    folder = tmp_path_factory.mktemp("home")
    before = {name: os.environ.get(name) for name in ("HOME", "USERPROFILE")}
    os.environ.update(HOME=str(folder), USERPROFILE=str(folder))
    yield folder
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def phantoms(home, tmp_path_factory) -> Path:
    """A cohort of 10 small phantoms, about 8 slices of 64 pixels each."""
    from phantoms.patients import make_phantoms

    out = tmp_path_factory.mktemp("phantoms")
    make_phantoms(out, patients=10, slices=8, size=64, seed=0)
    return out


@pytest.fixture(scope="session")
def trained(phantoms, tmp_path_factory) -> Path:
    """The folder that two epochs of training on the phantoms wrote."""
    out = tmp_path_factory.mktemp("trained")
    done = run_script(
        "train_centralized.py",
        "--data-dir",
        phantoms,
        "--out",
        out,
        "--model",
        "mini",
        "--image-size",
        32,
        "--epochs",
        2,
        "--batch-size",
        8,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def launch():
    """A function that starts a Chromium with further arguments; skipped aloud where there is none, or no
    Playwright to drive it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium for the browser tests: install it")
    with playwright.sync_playwright() as running:
        # the viewer draws with WebGL, here on the processor
        arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        yield lambda *more: running.chromium.launch(executable_path=path, args=[*arguments, *more])


@pytest.fixture(scope="module")
def browser(launch):
    chromium = launch()
    yield chromium
    chromium.close()
