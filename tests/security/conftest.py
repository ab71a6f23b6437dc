"""The federation's tests' tools, and a kit of keys."""

import pytest
from consortium import Consortium
from federations import scene  # noqa: F401  a fixture
from in_process import federate  # noqa: F401  a fixture


@pytest.fixture
def consortium(tmp_path):
    return Consortium(tmp_path)
