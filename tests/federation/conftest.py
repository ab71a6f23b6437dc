"""A folder and a free port for a federation of real processes."""

import pytest

from federations import Scene


@pytest.fixture
def scene(home, tmp_path):
    made = Scene(tmp_path)
    yield made
    assert made.close() == []
