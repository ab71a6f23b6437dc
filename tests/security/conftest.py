"""The federation's tests' tools, and a kit of keys."""

import sys

import pytest

from consortium import Consortium
from running import ROOT

sys.path.insert(0, str(ROOT / "tests" / "federation"))


@pytest.fixture
def consortium(tmp_path):
    return Consortium(tmp_path)
