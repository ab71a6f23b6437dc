"""The federation's tests' tools, and a kit of keys."""

import sys

import pytest

from running import ROOT

sys.path.insert(0, str(ROOT / "tests" / "federation"))
from consortium import Consortium  # noqa: E402
from federations import scene  # noqa: E402, F401  a fixture


@pytest.fixture
def consortium(tmp_path):
    return Consortium(tmp_path)
