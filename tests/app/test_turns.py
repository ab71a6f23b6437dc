"""Scans of several readers take turns: a short one is done long before a long one that began first."""

import threading
import time
from types import SimpleNamespace

import numpy as np

from deployment.app.turns import Turns


def test_a_short_scan_does_not_wait_for_a_long_one_and_nobody_is_passed_over():
    turns, order = Turns(), []
    ready, begun = threading.Barrier(3), threading.Event()

    def read(name: str, blocks: int) -> None:
        with turns.scan():
            ready.wait()
            if name != "long":
                begun.wait()
            for block in range(blocks):
                with turns.turn():
                    order.append(name)
                    if block == 0:
                        begun.set()
                    while name == "long" and block == 0 and len(turns._waiting) < 3:
                        time.sleep(0.001)  # until both others have asked

    threads = [threading.Thread(target=read, args=given) for given in (("long", 24), ("a", 4), ("b", 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = {name: len(order) - 1 - order[::-1].index(name) for name in ("long", "a", "b")}
    assert len(order) == 32 and last["long"] == 31
    assert max(last["a"], last["b"]) <= 12  # four blocks each, and no more than one of each other's between
    assert turns.others == 0 and not turns._waiting


def test_a_turn_that_fails_is_given_back():
    turns = Turns()
    for _ in range(2):
        try:
            with turns.scan(), turns.turn():
                raise ValueError("the reader left")
        except ValueError:
            pass
    with turns.scan(), turns.turn():
        assert turns.others == 0 and len(turns._waiting) == 1


def test_the_page_computes_within_turns_and_tells_what_is_done(monkeypatch):
    from deployment.app import readout
    from deployment.app.case import Case

    def network(_, volume, turn):
        for start in range(0, len(volume), 2):
            with turn(start):
                assert len(readout.TURNS._waiting) == 1
        return np.zeros(volume.shape[:3], np.float32), np.ones(volume.shape[:3], np.uint8)

    monkeypatch.setattr(readout, "predict_classes", network)
    told = []
    case = Case("a", list("abcde"), np.zeros((5, 32, 32, 3), np.uint8), np.array([0, 0, 0, 0, 1]))
    readout.predict_case(SimpleNamespace(classes=1), case, lambda done, others: told.append((done, others)))
    assert told == [(0, 0), (2, 0), (4, 0)]
