"""Who is a member: joining, disputes and loss, on a grid whose nodes answer as a test says.

The real processes of test_runs.py show that the way there works; here are the cases that they can't be
brought into at will.
"""

import pytest
from flwr.supercore.task_identity import TaskIdentity
from scripted import VERSIONS, Grid, Node, facts, make_fast

import federation.server.mailbox
import federation.server.membership
from appearance.features import MEASURES
from federation.protocol.answers import Facts
from federation.protocol.messages import End, read
from federation.protocol.settings import FederationSettings
from federation.server.mailbox import Answer, Mailbox
from federation.server.membership import Membership
from federation.server.state import RunState
from tasks import LGG, named_task
from training import TrainingSettings
from transunet import TransUNet


class Play:
    """A membership on such a grid, and the lines that it said."""

    def __init__(
        self, clients: int = 2, contributors: dict | None = None, keys: dict[int, str] | None = None
    ):
        self.grid, self.said, self.keys, self.audited = Grid(), [], keys, []
        self.mailbox = Mailbox(self.grid)
        about = {"versions": VERSIONS, "hospitals": clients}
        self.membership = Membership(
            self.mailbox,
            FederationSettings(clients=clients),
            about,
            contributors or {},
            self.said.append,
            self,
            lambda: self.keys,
        )

    def write(self, event: str, **about) -> None:
        """The audit log's part."""
        self.audited.append((event, about))

    def go(self, looks: int = 6) -> None:
        for _ in range(looks):
            self.membership.poll()
            for answer in self.mailbox.collect():
                self.membership.handle(answer)

    @property
    def labels(self) -> dict[str, int]:
        return {label: member.node for label, member in self.membership.members.items()}


@pytest.fixture
def play(monkeypatch):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    for name in ("LOOK", "JOIN_AGAIN"):
        monkeypatch.setattr(federation.server.membership, name, -1.0)
    return Play


def lose_pings(monkeypatch):
    """Whoever does not answer a ping counts as lost at once."""
    monkeypatch.setattr(federation.server.membership, "PING_TIME", 0.001)
    monkeypatch.setattr(federation.server.mailbox, "SPARE", -1.0)


def test_each_hospital_is_told_when_its_admission_ends(play):
    class Asked(Node):
        def answer(self, incoming):
            self.until = read(incoming.content).get("until", "")
            return super().answer(incoming)

    p = play(clients=3)
    p.membership.until = lambda: {1: "2030-01-31", 3: "2030-01-31"}
    p.grid.nodes = {k: Asked(facts(f"hospital-{k}")) for k in (0, 1, 2, 3)}
    p.membership.poll()
    assert [p.grid.nodes[k].until for k in (0, 1, 2, 3)] == ["", "2030-01-31", "", "2030-01-31"]


def test_a_key_and_a_label_belong_together(play):
    p = play(keys={1: "mercy", 2: "hope"})
    p.grid.nodes = {1: Node(facts("mercy")), 2: Node(facts("mercy")), 3: Node(facts("hope"))}
    p.go()
    assert p.labels == {"mercy": 1}
    assert sorted(event for event, _ in p.audited) == ["joined", "refused", "refused"]
    assert all(about["why"] == End.IDENTITY for event, about in p.audited if event == "refused")


@pytest.mark.parametrize(
    "says", [facts("mercy"), {"failure": "code", "label": "mercy"}, {"failure": "data", "label": "mercy"}]
)
def test_the_log_names_who_was_refused_by_its_key(play, says):
    p = play(keys={1: "mercy", 2: "hope"})
    p.grid.nodes = {1: Node(facts("mercy")), 2: Node(says)}
    p.go()
    assert [about["hospital"] for event, about in p.audited if event == "refused"] == ["hope"]


def test_the_log_says_of_a_revoked_hospital_why_it_left(play):
    p = play(keys={1: "mercy", 2: "hope"})
    p.grid.nodes = {1: Node(facts("mercy")), 2: Node(facts("hope"))}
    p.go()
    p.keys = {2: "hope"}
    p.grid.nodes.clear()
    p.go()
    why = {about["hospital"]: about["why"] for event, about in p.audited if event == "left"}
    assert why == {"mercy": "its key is revoked or its admission has ended", "hope": "gone"}


def test_hospitals_join_and_a_vanished_one_makes_room(play):
    p = play()
    p.grid.nodes = {1: Node(facts("hospital-0")), 2: Node(facts("mercy"))}
    p.go()
    assert p.labels == {"hospital-0": 1, "mercy": 2} and p.membership.partition == "p"
    del p.grid.nodes[2]
    p.grid.nodes[3] = Node(facts("hope"))
    p.go()
    assert p.labels == {"hospital-0": 1, "hope": 3} and "mercy: gone" in p.said


def test_a_living_holder_keeps_its_label(play):
    p = play()
    p.grid.nodes = {1: Node(facts("hospital-0"))}
    p.go()
    p.grid.nodes[2] = twin = Node(facts("hospital-0", session="another"))
    p.go()
    assert p.labels == {"hospital-0": 1} and twin.ends == [End.TAKEN] and not p.membership.disputed


def test_a_silent_holder_is_replaced_and_told(play, monkeypatch):
    p = play()
    p.grid.nodes = {1: (slow := Node(facts("hospital-0")))}
    p.go()
    slow.silent = True
    p.grid.nodes[2] = Node(facts("hospital-0", session="another"))
    p.go(3)
    assert p.labels == {"hospital-0": 1} and p.membership.disputed
    lose_pings(monkeypatch)
    p.mailbox._open = {
        i: s.__class__(s.node, s.purpose, 0.0) for i, s in p.mailbox._open.items()
    }  # its time is over
    p.go()
    assert p.labels == {"hospital-0": 2} and not p.membership.disputed and slow.ends == [End.TAKEN]


def test_the_same_hospital_with_a_new_connection_is_taken_at_once(play):
    p = play()
    p.grid.nodes = {1: Node(facts("hospital-0"), silent=False)}
    p.go()
    p.grid.nodes[2] = Node(facts("hospital-0"))
    p.go()
    assert p.labels == {"hospital-0": 2} and any("is back" in line for line in p.said)


def test_a_dispute_waits_for_the_holders_work(play):
    p = play()
    p.grid.nodes = {1: Node(facts("hospital-0"))}
    p.go()
    p.grid.nodes[1].silent = True
    p.mailbox.send([1], "train", "round-1.1", {"query": "x"}, 60)
    p.grid.nodes[2] = twin = Node(facts("hospital-0", session="another"))
    p.go()
    assert p.membership.disputed and not p.mailbox.is_open(1, "ping")
    p.mailbox.drop("round-1.1")
    p.grid.nodes[1].silent = False
    p.go()
    assert twin.ends == [End.TAKEN]


def test_a_hospital_has_no_dispute_with_itself(play):
    """It was asked twice when its connection was lost for a moment, and answered once later, as if started anew."""
    p = play()
    p.grid.nodes = {1: Node(facts("hospital-0"))}
    p.go()
    p.membership.handle(Answer(1, "join", facts("hospital-0", session="another")))
    assert not p.membership.disputed and p.membership.members["hospital-0"].session == "another"


@pytest.mark.parametrize(
    ("introduction", "code"),
    [
        (facts("hospital-0", versions={**VERSIONS, "timm": "2"}), End.VERSION),
        (facts("hospital-7"), End.NUMBER),
        (facts("hospital-1", partition_sha256="other"), End.SPLIT),
        (facts("mercy", task=named_task("hippocampus").model_dump(mode="json")), End.TASK),
        (facts("mercy", task={**LGG.model_dump(mode="json"), "region": "nothing"}), End.TASK),
        (facts("mercy", task={**LGG.model_dump(mode="json"), "region": "\x1b[2J"}), End.UNFIT),
        ({"failure": "data", "label": "mercy"}, End.UNFIT),
        (facts("hospital-1", cid=0), End.UNFIT),
        (facts("two words"), End.UNFIT),
        (facts("mercy", parts={}), End.UNFIT),
        (facts("mercy", own_data=False, partition_sha256="other"), End.UNFIT),
        (facts("mercy", images={"foreground_mean": 1}), End.UNFIT),
        (facts("mercy", versions=[]), End.UNFIT),
        (facts("mercy", parts={"train": 1, "val": 1, "test": 1}), End.UNFIT),
        ({}, End.UNFIT),
        ({"failure": []}, End.UNFIT),
    ],
    ids=lambda value: str(value)[:30],
)
def test_who_is_refused(play, introduction, code):
    p = play()
    p.grid.nodes = {1: Node(facts("hospital-0"))}
    p.go()
    assert not p.membership.settle()  # the run begins
    p.grid.nodes[2] = newcomer = Node(introduction)
    p.go(3)
    assert p.labels == {"hospital-0": 1} and newcomer.ends == [code]


def test_the_first_to_come_does_not_send_the_others_away(play):
    """Nor does one that only observes. The others' programs ended with "refused", at every start again."""
    other = named_task("hippocampus").model_dump(mode="json")
    p = play(clients=6)
    p.grid.nodes = {
        1: Node(facts("mallory", task=other)),
        2: Node(facts("oscar", task=other, role="observe")),
    }
    p.go()
    honest = {
        3: Node(facts("mercy")),
        4: Node(facts("hope")),
        5: Node(facts("hospital-0")),
        6: Node(facts("hospital-1")),
    }
    p.grid.nodes |= honest | {7: Node(facts("hospital-2", partition_sha256="other"))}
    p.go()
    assert p.membership.settle() and not p.membership.settle()
    p.go()
    assert p.labels == {"mercy": 3, "hope": 4, "hospital-0": 5, "hospital-1": 6}
    assert [p.grid.nodes[one].ends for one in (1, 2, 7)] == [[End.TASK], [End.TASK], [End.SPLIT]]
    assert not any(node.ends for node in honest.values())


def test_one_hospital_does_not_name_what_the_model_outlines(tmp_path, monkeypatch):
    """Whose label came first named it for all; the pages show that beside each mask."""
    make_fast(monkeypatch)
    state = RunState(
        TransUNet("tiny", 32), TrainingSettings(image_size=32), FederationSettings(), tmp_path, None
    )
    lie = LGG.model_copy(update={"title": "Healthy brains"})
    state.progress.hospitals = {
        label: Facts(**facts(label, task=task and task.model_dump(mode="json")))
        for label, task in (("a", lie), ("b", None), ("c", None))
    }
    assert state.metadata({}, 1)["task"] is None


def test_a_full_federation_takes_nobody(play):
    p = play(clients=1)
    p.grid.nodes = {1: Node(facts("mercy"))}
    p.go()
    p.grid.nodes[2] = late = Node(facts("hope"))
    p.go()
    assert p.labels == {"mercy": 1} and late.ends == [End.FULL]


def test_another_dataset_is_refused_also_when_nobody_is_there(play):
    """After a restart the weights remember patients that the new dataset could keep for the test."""
    p = play(contributors={"hospital-1": Facts(**facts("hospital-1", partition_sha256="old"))})
    p.grid.nodes = {1: Node(facts("hospital-0"))}
    p.go()
    assert not p.labels and p.grid.nodes[1].ends == [End.SPLIT]


def test_trouble_at_joining_is_asked_again_and_ends(play):
    p = play()
    p.grid.nodes = {1: Node(2), 2: Node({"failure": "resources", "label": "mercy"})}
    p.go(2)
    p.grid.nodes[2].introduction = facts("mercy")
    p.go(10)
    assert p.labels == {"mercy": 2} and p.grid.nodes[1].ends == [End.UNFIT]
    assert sum("could not join" in line for line in p.said) >= 3


def test_who_is_behind_gets_no_work_until_it_answers(play):
    p = play()
    p.grid.nodes = {1: Node(facts("mercy"))}
    p.go()
    member = p.membership.members["mercy"]
    p.grid.nodes[1].silent = True
    p.membership.fell_behind(member)
    p.go()
    assert not p.membership.present
    p.grid.nodes[1].silent = False
    p.mailbox.drop("ping")
    p.go()
    assert p.membership.present == [member] and "mercy answers again" in p.said


def test_a_message_that_is_not_accepted_is_lost_at_once(play):
    p = play()
    p.mailbox.send([9], "train", "round-1.1", {}, 1800)
    (answer,) = p.mailbox.collect()
    assert (answer.node, answer.purpose, answer.failure) == (9, "round-1.1", "it is not reachable")
    assert not p.mailbox.is_open(9) and list(p.mailbox.collect()) == []


@pytest.mark.parametrize("name", ["medfl", "flwr", "timm"])
def test_another_version_is_refused(play, name):
    p = play()
    p.grid.nodes = {1: (other := Node(facts("hospital-0", versions={**VERSIONS, name: "2"})))}
    p.go()
    assert not p.labels and other.ends == [End.VERSION]


def test_the_first_number_too_many_is_refused(play):
    p = play(clients=2)
    p.grid.nodes = {1: (third := Node(facts("hospital-2")))}
    p.go()
    assert third.ends == [End.NUMBER]


def test_a_member_comes_back_to_a_full_federation(play):
    p = play(clients=1)
    p.grid.nodes = {1: Node(facts("hospital-0"))}
    p.go()
    p.grid.nodes[2] = back = Node(facts("hospital-0"))
    p.go()
    assert p.labels == {"hospital-0": 2} and back.ends == []


def test_a_dispute_ends_when_the_claimant_leaves(play):
    p = play()
    p.grid.nodes = {1: Node(facts("hospital-0"))}
    p.go()
    p.grid.nodes[1].silent = True
    p.grid.nodes[2] = Node(facts("hospital-0", session="another"))
    p.go(3)
    del p.grid.nodes[2]
    p.go(1)
    assert not p.membership.disputed and p.labels == {"hospital-0": 1}


def test_bad_data_are_final(play):
    p = play()
    p.grid.nodes = {1: (bad := Node({"failure": "data", "label": "mercy"}))}
    p.go(2)
    assert bad.ends == [End.UNFIT] and not any("asked again" in line for line in p.said)


IMAGES = {name: {"mean": [0.5] * width, "deviation": [0.1] * width} for name, width in MEASURES.items()}


def test_what_images_look_like_is_checked(play):
    p = play(clients=3)
    few = {part: {"patients": 2, "slices": 40} for part in ("train", "val", "test")}
    wrong = {**IMAGES, "appearance": {"mean": [0.5], "deviation": [0.1]}}
    p.grid.nodes = {
        1: Node(facts("good", images=IMAGES)),
        2: Node(facts("few", images=IMAGES, parts=few)),
        3: Node(facts("wrong", images=wrong)),
        4: Node(facts("three", images=IMAGES, parts={part: {"patients": 3, "slices": 60} for part in few})),
    }
    p.go()
    assert set(p.labels) == {"good", "three"} and p.grid.nodes[2].ends == p.grid.nodes[3].ends == [End.UNFIT]
