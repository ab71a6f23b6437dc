"""A federation of real processes, and messages without one."""

import pytest
from federations import scene  # noqa: F401  a fixture
from in_process import federate  # noqa: F401  a fixture
from scripted import make_messages_outside_of_a_run


@pytest.fixture
def in_a_run(monkeypatch):
    """Messages can be made."""
    make_messages_outside_of_a_run(monkeypatch)
