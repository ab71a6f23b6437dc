"""A hospital with a key sends another one a message in the server's name, or spoils what the server sends it, through
Flower's own code; or it answers with a message that asks for more than it brings."""

import importlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from fastapi import HTTPException
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.date import now
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_id,
    get_object_tree,
    get_object_type_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from flwr.superlink.grid import http_grid
from flwr.superlink.servicer.fleet import fleet_handlers

from borders import limits
from federation.protocol.messages import End, Query, message
from federation.protocol.weights import from_record, most_bytes, to_record
from federation.runtime.flower_objects import MOST_BESIDE, ObjectsByMessage, within
from federation.runtime.programs import only_own_answers, run_client_app, run_server_app

SERVER = 1  # the number of Flower's SuperLink among the nodes
END = message({"query": Query.END, "code": End.DONE})


class Door:
    """A SuperLink's state with two hospitals, a run, and one request of the server to each."""

    def __init__(self, store: type[InMemoryObjectStore] = ObjectsByMessage):
        self.state = InMemoryLinkState(NoOpFederationManager(), store())
        self.run = self.state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, "", "flwr-serverapp")
        self.bad, self.good = (self.state.create_node("x", "x", key, 30) for key in (b"bad", b"good"))
        for node in (self.bad, self.good):
            self.state.activate_node(node, 30)

    def pushed(
        self, by: int, sender: int, to: int, reply_to: str = "", content=END, more=()
    ) -> PushMessagesRequest:
        """What hospital `by` would push: a message that names `sender`. more: trees that it names besides."""
        about = Metadata(
            self.run, "", sender, to, reply_to, "end", now().timestamp(), 60.0, "query"
        )  # fmt: skip
        tree = get_object_tree(make_message(about, content))
        tree.children.extend(more)
        about.__dict__["_message_id"] = tree.object_id
        sent = message_to_proto(make_message(about, RecordDict()))
        return PushMessagesRequest(node=Node(node_id=by), messages_list=[sent], message_object_trees=[tree])

    def pulled(self, node: int):
        """What is handed to a hospital: messages, and the trees of their objects."""
        request = PullMessagesRequest(node=Node(node_id=node))
        return fleet_handlers.pull_messages(request, self.state, self.state.object_store)

    def waiting(self, node: int) -> list:
        """The messages that are handed to a hospital."""
        return list(self.pulled(node).messages_list)


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


def spoilt_by_a_former_answer(door) -> bool:
    """Whether a hospital's answer, which names the objects of the model that the server is about to send and gives
    them other children, changes what another hospital is told to fetch."""
    push = only_own_answers(fleet_handlers.push_messages)
    fleet_handlers.push_messages(door.pushed(SERVER, SERVER, door.bad), door.state)
    (got,) = door.waiting(door.bad)
    model = to_record(torch.arange(100.0))
    false = ObjectTree(object_id=model.object_id, children=[ObjectTree(object_id="f" * 64)])
    answer = door.pushed(door.bad, door.bad, SERVER, got.metadata.message_id, more=[false])
    push(answer, door.state)
    sent = door.pushed(SERVER, SERVER, door.good, content=message({"round": 1}, model))
    to_push = fleet_handlers.push_messages(sent, door.state).objects_to_push
    assert {node.object_id for node in iterate_object_tree(get_object_tree(model))} <= {*to_push}
    door.state.object_store.delete(answer.message_object_trees[0].object_id)  # once the server has it
    return list(door.pulled(door.good).message_object_trees) != list(sent.message_object_trees)


def test_what_a_hospital_names_of_the_servers_objects_changes_nothing_for_another(door):
    assert not spoilt_by_a_former_answer(door)


def test_by_flower_alone_it_would(monkeypatch, door):
    assert spoilt_by_a_former_answer(Door(InMemoryObjectStore))


def test_objects_stay_for_as_long_as_a_message_has_them(door):
    """What is confirmed is forgotten; what another message needs, or is only a part of one, is not."""
    store, model = door.state.object_store, to_record(torch.arange(100.0))
    sent = [
        door.pushed(SERVER, SERVER, node, content=message({"to": node}, model))
        for node in (door.bad, door.good)
    ]
    for one in sent:
        fleet_handlers.push_messages(one, door.state)
    store.delete(model.object_id)
    store.delete(sent[0].message_object_trees[0].object_id)
    assert all(node.object_id in store for node in iterate_object_tree(sent[1].message_object_trees[0]))
    store.delete_objects_in_run(door.run)
    assert not len(store) and not store.trees


def answer_of(content: RecordDict, change) -> tuple[str, dict[str, bytes]]:
    """An answer as the server's process fetches it: the id of its message, and the contents of its objects. change: of
    the array's object and those that it is made of; gives another content, and further objects."""
    whole = make_message(Metadata(1, "", 2, SERVER, "a" * 64, "round", 0.0, 60.0, "train"), content)
    objects = {identity: one.deflate() for identity, one in get_all_nested_objects(whole).items()}
    array = next(one for one in objects if get_object_type_from_object_content(objects[one]) == "Array")
    changed, more = change(objects[array])
    # a content is named by its hash, so all that lead to it are made again
    objects |= {get_object_id(one): one for one in more}
    old, new = array, get_object_id(changed)
    objects[new] = changed
    for kind in ("ArrayRecord", "RecordDict", "Message"):
        parent = next(one for one in objects if get_object_type_from_object_content(objects[one]) == kind)
        content_ = objects.pop(parent).replace(old.encode(), new.encode())
        old, new = parent, get_object_id(content_)
        objects[new] = content_
    return new, objects


def array_object(pieces: list[str], numbers: list[int]) -> bytes:
    """The object of an array of these pieces."""
    about = {"dtype": "float32", "shape": [100], "stype": "numpy.ndarray", "arraychunk_ids": numbers}
    body = json.dumps(about).encode()
    return b"Array %s %d\0" % (",".join(pieces).encode(), len(body)) + body


def often(content: bytes) -> tuple[bytes, list[bytes]]:
    """One piece, a thousand times."""
    pieces = get_object_children_ids_from_object_content(content)
    return array_object(pieces, [0] * 1_000), []


def nested(content: bytes) -> tuple[bytes, list[bytes]]:
    """An array that is twice an array that is twice ... one piece: each by itself asks for little."""
    objects = [content]
    for _ in range(12):
        objects.append(array_object([get_object_id(objects[-1])], [0, 0]))
    return objects[-1], objects[1:-1]


def as_it_is(content: bytes) -> tuple[bytes, list[bytes]]:
    return content, []


@pytest.mark.parametrize("change", [often, nested])
def test_an_answer_takes_no_more_memory_than_an_update(change):
    message_id, objects = answer_of(message({}, to_record(torch.arange(100.0))), change)
    grown = inflate_object_from_contents(message_id, dict(objects))
    assert len(grown.content["arrays"]["weights"].data) > 500_000  # by Flower alone
    with pytest.raises(ValueError):
        within(most_bytes(torch.nn.Linear(99, 1)), inflate_object_from_contents)(message_id, objects)


def test_an_honest_update_fits():
    for update in (torch.arange(100.0), torch.zeros(100)):
        message_id, objects = answer_of(message({}, to_record(update)), as_it_is)
        bounded = within(most_bytes(torch.nn.Linear(99, 1)), inflate_object_from_contents)
        assert torch.equal(from_record(bounded(message_id, objects).content["arrays"]), update)


def test_the_servers_process_bounds_what_it_reads(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("job.json").write_text('{"most_bytes": 1}', encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("token\n"))
    monkeypatch.setattr(http_grid, "inflate_object_from_contents", inflate_object_from_contents)
    module = importlib.import_module("flwr.superlink.runtime.run_serverapp")
    monkeypatch.setattr(module, "install_from_fab", module.install_from_fab)
    monkeypatch.setattr(module, "run_serverapp", lambda *_, **__: None)
    run_server_app("127.0.0.1:1")
    message_id, objects = answer_of(message({}, to_record(torch.arange(100.0))), as_it_is)
    with pytest.raises(ValueError, match="bytes"):
        http_grid.inflate_object_from_contents(message_id, objects)


def test_a_hospital_bounds_what_it_reads(monkeypatch):
    """A server's message of a megabyte, whose piece is named a million times, would take a terabyte there."""
    monkeypatch.setattr(limits, "BUDGET", 1_000)
    monkeypatch.setattr(inflatable_utils, "pull_objects", inflatable_utils.pull_objects)
    module = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    for name in ("install_from_fab", "get_load_client_app_fn", "Error"):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(module, "run_clientapp", lambda *_, **__: None)
    run_client_app("127.0.0.1:1", "token")

    def read(change) -> RecordDict:
        message_id, objects = answer_of(message({}, to_record(torch.zeros(100))), change)
        tree = ObjectTree(object_id=message_id, children=[ObjectTree(object_id=one) for one in objects])
        pull = inflatable_utils.pull_and_inflate_object_from_tree
        return pull(tree, objects.__getitem__, lambda _: None, return_type=Message).content

    assert len(from_record(read(as_it_is)["arrays"])) == 100
    with pytest.raises(ValueError, match="arrays take"):
        read(often)


def test_a_record_of_a_million_entries_is_not_made():
    """Each entry takes 40 times the bytes that it is sent in."""
    content = message({}, to_record(torch.arange(100.0)))
    content["more"] = ConfigRecord({"a": b"0" * MOST_BESIDE})
    message_id, objects = answer_of(content, as_it_is)
    with pytest.raises(ValueError, match="beside its arrays"):
        within(most_bytes(torch.nn.Linear(99, 1)), inflate_object_from_contents)(message_id, objects)


def test_an_object_that_is_named_twice_is_not_fetched_twice(door):
    """Each would be fetched as often as it is named: 16 MB of names let the server fetch a terabyte."""
    push = only_own_answers(fleet_handlers.push_messages)
    fleet_handlers.push_messages(door.pushed(SERVER, SERVER, door.bad), door.state)
    (got,) = door.waiting(door.bad)
    twice = [ObjectTree(object_id="f" * 64)] * 2
    with pytest.raises(ValueError):
        push(door.pushed(door.bad, door.bad, SERVER, got.metadata.message_id, more=twice), door.state)
