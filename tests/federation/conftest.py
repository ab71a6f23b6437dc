"""A folder and a free port for a federation of real processes, and messages without one."""

import pytest

from federations import Scene
from scripted import make_messages_outside_of_a_run


@pytest.fixture
def scene(home, tmp_path):
    made = Scene(tmp_path)
    yield made
    assert made.close() == []


@pytest.fixture
def in_a_run(monkeypatch):
    """Messages can be made."""
    make_messages_outside_of_a_run(monkeypatch)
