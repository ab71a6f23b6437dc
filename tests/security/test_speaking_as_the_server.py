"""A hospital with a key sends another one a message in the server's name, through Flower's own code."""

import pytest
from fastapi import HTTPException
from flwr.app import RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers

from federation.protocol.messages import End, Query, message
from federation.runtime.programs import only_own_answers

SERVER = 1  # the number of Flower's SuperLink among the nodes


class Door:
    """A SuperLink's state with two hospitals, a run, and one request of the server to each."""

    def __init__(self):
        self.state = InMemoryLinkState(NoOpFederationManager(), InMemoryObjectStore())
        self.run = self.state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, "", "flwr-serverapp")
        self.bad, self.good = (self.state.create_node("x", "x", key, 30) for key in (b"bad", b"good"))
        for node in (self.bad, self.good):
            self.state.activate_node(node, 30)

    def pushed(self, by: int, sender: int, to: int, reply_to: str = "") -> PushMessagesRequest:
        """What hospital `by` would push: a message that names `sender`."""
        about = Metadata(
            self.run, "", sender, to, reply_to, "end", now().timestamp(), 60.0, "query"
        )  # fmt: skip
        tree = get_object_tree(make_message(about, message({"query": Query.END, "code": End.DONE})))
        about.__dict__["_message_id"] = tree.object_id
        sent = message_to_proto(make_message(about, RecordDict()))
        return PushMessagesRequest(node=Node(node_id=by), messages_list=[sent], message_object_trees=[tree])

    def waiting(self, node: int) -> list:
        """What is handed to a hospital."""
        request = PullMessagesRequest(node=Node(node_id=node))
        return list(fleet_handlers.pull_messages(request, self.state, self.state.object_store).messages_list)


@pytest.fixture
def door(monkeypatch):
    monkeypatch.setattr(fleet_handlers, "check_abort", lambda *_: None)  # the run counts as running
    return Door()


def test_by_flower_alone_the_message_would_arrive(door):
    fleet_handlers.push_messages(door.pushed(door.bad, SERVER, door.good), door.state)
    assert [one.metadata.src_node_id for one in door.waiting(door.good)] == [SERVER]


@pytest.mark.parametrize("way", ["as the server", "as itself", "as the other"])
def test_nobody_gets_a_message_of_another_hospital(door, way):
    sender = {"as the server": SERVER, "as itself": door.bad, "as the other": door.good}[way]
    push = only_own_answers(fleet_handlers.push_messages)
    with pytest.raises(HTTPException) as refused:
        push(
            door.pushed(door.bad, sender, door.good, reply_to="" if sender != door.good else "a" * 64),
            door.state,
        )
    assert refused.value.status_code == 403 and door.waiting(door.good) == []


def test_an_own_answer_passes(door):
    push = only_own_answers(fleet_handlers.push_messages)
    asked = door.pushed(SERVER, SERVER, door.good)
    fleet_handlers.push_messages(asked, door.state)
    (got,) = door.waiting(door.good)
    answer = door.pushed(door.good, door.good, SERVER, reply_to=got.metadata.message_id)
    assert push(answer, door.state).objects_to_push
