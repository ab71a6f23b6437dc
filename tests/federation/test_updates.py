"""A round's updates on disk: the same figures whatever the block, weights with a bound, and nothing left
behind."""

from pathlib import Path

import numpy as np
import pytest
import torch

import federation.server.updates
from common import MedFLError
from federation.server.updates import Updates, capped, remove_leftovers

N = 50
SENT = torch.randn(N, generator=torch.Generator().manual_seed(0))
WEIGHTS = {
    label: SENT + torch.randn(N, generator=torch.Generator().manual_seed(k))
    for k, label in enumerate("cab", 1)
}
STATISTICS = torch.arange(N) % 7 == 0


@pytest.fixture
def updates(tmp_path):
    made = Updates(SENT, STATISTICS, tmp_path)
    for label, weights in WEIGHTS.items():
        made.add(label, weights, 10)
    return made


def changes(labels: str) -> np.ndarray:
    return np.stack([(WEIGHTS[label].double() - SENT.double()).numpy() for label in labels])


@pytest.mark.parametrize("block", [1, 10, 10**6])
def test_figures_do_not_depend_on_the_block(monkeypatch, updates, block):
    monkeypatch.setattr(federation.server.updates, "BLOCK", block)
    given, part = changes("abc"), STATISTICS.numpy()
    assert updates.labels == ["a", "b", "c"] == [update.label for update in updates]
    np.testing.assert_array_equal(np.concatenate([block for _, block in updates.blocks()], axis=1), given)
    for found, columns in zip(updates.products(), (~part, part)):
        np.testing.assert_allclose(found, given[:, columns] @ given[:, columns].T, rtol=1e-9, atol=1e-9)
    wanted = np.square(given[:, None] - given[None]).sum(axis=2)
    np.testing.assert_allclose(updates.distances(), wanted, rtol=1e-9, atol=1e-9)


def test_what_is_dropped_or_cut_is_so_everywhere(updates):
    updates.products()
    updates.drop("b")
    updates.cut("c", 0.5, 0.25)
    given = changes("ac")
    given[1] *= np.where(STATISTICS.numpy(), 0.25, 0.5)
    np.testing.assert_allclose(np.concatenate([block for _, block in updates.blocks()], axis=1), given)
    np.testing.assert_allclose(updates.distances()[0, 1], np.square(given[0] - given[1]).sum())
    assert updates.products()[0].shape == (2, 2)


def test_labels_that_differ_in_case_alone_are_two_files_everywhere(updates):
    """On disks that take Mercy and mercy for one, the later update stood for both."""
    for label in ("mercy", "Mercy"):
        updates.add(label, SENT, 10)
    assert len({update.file.name.lower() for update in updates}) == 5


def test_no_hospital_counts_for_more_than_a_few_others():
    assert capped([10, 20, 30], 3.0) == [10, 20, 30] and capped([10, 10, 10, 10, 1_000], 3.0) == [
        10,
        10,
        10,
        10,
        30,
    ]
    assert capped([1, 100], 3.0) == [1, 100], "of two none is the odd one"


def test_shares_add_up_to_one(updates):
    updates.add("d", SENT, 10_000)
    assert updates.shares(3.0).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


def test_nothing_is_left_behind(tmp_path, updates):
    assert list(tmp_path.iterdir())
    Updates(SENT, STATISTICS, tmp_path).add("a", SENT, 1)  # of a server that was killed
    updates.close()
    assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here to play a full disk")
def test_a_full_disk_is_told_with_what_to_do(tmp_path, updates):
    next(tmp_path.glob(".updates-*")).joinpath(b"d".hex()).symlink_to("/dev/full")
    with pytest.raises(MedFLError, match="free the disk"):
        updates.add("d", SENT, 1)
