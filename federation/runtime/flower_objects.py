"""The objects of messages at Flower's SuperLink, stored separately for each message.

A message is sent as a tree of objects that are named by their SHA-256. For each object Flower's own store (1.41) keeps
the children that were named with it first, by any sender. A hospital that knows an object before it is sent, such as
the model that a run begins with, could name other children. Then no hospital could read the message, or each would
wait for an object that never arrives. Here a message's tree is the one that was sent with it, and it names each object
once.

An array's object says by the numbers of its pieces what the array's bytes are, and Flower takes a piece as often as it
is named: an answer of 5 MB could become a terabyte in the server's memory. Here an answer is read only if its arrays
fit into what an answer can need, and at a hospital the server's messages in the same way. The names of Flower used
here may change with its version.
"""

import json
from collections.abc import Callable
from typing import Any

from flwr.app import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_type_from_object_content,
    is_valid_sha256_hash,
    iterate_object_tree,
)
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore, ObjectEntry

from federation.protocol.messages import MOST_TEXT

MOST_BESIDE = MOST_TEXT + 1_000_000  # bytes of a message beside its arrays: its text, names and signature


class ObjectsByMessage(InMemoryObjectStore):
    """Flower's store in memory. An object stays for as long as a message contains it. trees: the messages' trees, by
    the id of the message's own object."""

    def __init__(self) -> None:
        super().__init__()
        self.trees: dict[str, ObjectTree] = {}

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """Store a message's tree; returns those of its objects whose content has not arrived yet."""
        root, ids = object_tree.object_id, _ids(object_tree)
        if sum(1 for _ in iterate_object_tree(object_tree)) > len(
            ids
        ):  # an object would be fetched as often as it is named
            raise ValueError("An object is named twice.")
        if wrong := [one for one in ids if not is_valid_sha256_hash(one)]:
            raise ValueError(f"Invalid object ID format: {wrong[0]}")
        with self.lock_store:
            if root not in self.trees:
                self.trees[root] = object_tree
                self.run_objects_mapping.setdefault(run_id, set()).add(root)
                for one in ids:
                    self.store.setdefault(one, ObjectEntry(b"", False, [], 0, {run_id})).ref_count += 1
            return [one for one in _ids(self.trees[root]) if not self.store[one].is_available]

    def get_object_tree(self, object_id: str) -> ObjectTree:
        """A message's tree. Raises NoObjectInStoreError for an object that is not a message's own."""
        with self.lock_store:
            if object_id not in self.trees:
                raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
            return self.trees[object_id]

    def delete(self, object_id: str) -> None:
        """Forget a message, and the objects that no other message contains."""
        with self.lock_store:
            tree = self.trees.pop(object_id, None)
            for one in _ids(tree) if tree else ():
                self.store[one].ref_count -= 1
                if not self.store[one].ref_count:
                    del self.store[one]
            for of_run in self.run_objects_mapping.values():
                of_run.discard(object_id)

    def delete_objects_in_run(self, run_id: int) -> None:
        """Forget a run's messages."""
        with self.lock_store:
            for root in list(self.run_objects_mapping.get(run_id, ())):
                self.delete(root)
            self.run_objects_mapping.pop(run_id, None)

    def clear(self) -> None:
        """Forget everything."""
        with self.lock_store:
            super().clear()
            self.trees.clear()


def within(most: int, inflate: Callable[..., Any]) -> Callable[..., Any]:
    """`inflate`, Flower's function that builds a message from its objects, limited to messages whose arrays take at
    most `most` bytes. Others raise ValueError before anything is allocated."""

    def bounded(object_id: str, contents: dict[str, bytes]) -> Any:
        _check_size(contents, most)
        return inflate(object_id, contents)

    return bounded


def pulled_within(most: int, pull: Callable[..., dict[str, bytes]]) -> Callable[..., dict[str, bytes]]:
    """Flower's function that fetches a message's objects, with the same bounds."""

    def bounded(*arguments: Any, **options: Any) -> dict[str, bytes]:
        contents = pull(*arguments, **options)
        _check_size(contents, most)
        return contents

    return bounded


def stopped_at(most: int, pull: Callable[..., dict[str, bytes]]) -> Callable[..., dict[str, bytes]]:
    """Flower's function that fetches a message's objects, which gives up (ValueError) as soon as those of one message
    take more than `most` bytes: a hospital's connection keeps them all before anything of the message is read."""

    def bounded(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
        taken = 0

        def one(object_id: str) -> bytes:
            nonlocal taken
            content = pull_object_fn(object_id)
            taken += len(content)
            if taken > most:
                raise ValueError(f"The message takes more than {most} bytes.")
            return content

        return pull(object_ids, pull_object_fn=one)

    return bounded


def _check_size(contents: dict[str, bytes], most: int) -> None:
    """Raises ValueError for a message whose arrays take more than `most` bytes, or that brings much beside them: each
    entry of a record takes 40 times its bytes."""
    if (size := sum(_bytes_of_array(one, contents) for one in contents.values())) > most:
        raise ValueError(f"The message's arrays take {size} bytes.")
    kinds = ((get_object_type_from_object_content(one), len(one)) for one in contents.values())
    if (beside := sum(size for kind, size in kinds if kind != ArrayChunk.__qualname__)) > MOST_BESIDE:
        raise ValueError(f"The message brings {beside} bytes beside its arrays.")


def _bytes_of_array(content: bytes, contents: dict[str, bytes]) -> int:
    """The bytes that an array's object needs; 0 for any other object. contents: those of all objects, by their ids."""
    kind, pieces, _ = get_object_head_values_from_object_content(content)
    if kind != Array.__qualname__:
        return 0
    if any(get_object_type_from_object_content(contents[one]) != ArrayChunk.__qualname__ for one in pieces):
        raise ValueError("An array's pieces are something else.")  # for example arrays, each with many pieces
    numbers = json.loads(get_object_body(content, Array))["arraychunk_ids"]
    return sum(len(contents[pieces[number]]) for number in numbers)


def _ids(tree: ObjectTree) -> list[str]:
    """The objects of a tree, each once."""
    return list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))
