"""A hospital's own checks before it takes part in a secure aggregation.

It checks that the run is the one that it joined and that the other participants are hospitals of its consortium, and
it remembers which sums it has helped to open.
"""

import json
from pathlib import Path

from common import MedFLError
from federation.hospital.identity import Identity
from federation.protocol.proofs import check, keys_statement, sign
from federation.protocol.requests import Shares
from storage.files import alone, atomic_write, write_json

JOINED = "joined.json"  # beside hospital.json, so it lasts until run_client.py ends


class Sums:
    """A hospital's memory of the run and of its sums. folder: the folder of its app. Each function raises
    MedFLError if the server asks for something that it must not have.

    The run is fixed at joining, for as long as run_client.py runs. Otherwise a server that began one run after
    another could have the same round summed with a hospital and without it.
    """

    def __init__(self, identity: Identity, folder: Path):
        self.identity, self.joined, self.file = identity, folder / JOINED, identity.file("sums.json")

    def join(self, run: str) -> None:
        """Fix the run."""
        if self.identity.key and not self.identity.members:
            raise MedFLError(
                "secure aggregation with keys needs the public keys of the consortium's hospitals, because the "
                "server could invent some; put their hospital.pub lines (the coordinator's `provision.py members` "
                "prints them) into members.pub of the kit, and compare the fingerprints with those hospitals"
            )
        if not self.joined.exists():
            write_json(self.joined, {"run": run})
        self.check_run(run)

    def check_run(self, run: str) -> None:
        """Raise MedFLError if the run is not the one that was joined."""
        joined = json.loads(self.joined.read_text(encoding="utf-8"))["run"] if self.joined.exists() else None
        if run != joined:
            raise MedFLError(
                "the server asked for a secure aggregation in another run than the one that was joined; nothing "
                "was given; if the consortium began a new run, start this hospital again"
            )

    def check_plain(self) -> None:
        """Raise MedFLError if a run with secure aggregation was joined: the server could read an update without
        masks."""
        if self.joined.exists():
            raise MedFLError(
                "the server asked for an update without masks, and this hospital joined a run with secure "
                "aggregation; nothing was trained; if the consortium began a run without, start this hospital again"
            )

    def signature(self, run: str, number: int, keys: list[str]) -> str | None:
        """The signature over this hospital's public keys in a round; None without a key of the consortium."""
        key = self.identity.private_key()
        return (
            None if key is None else sign(key, "keys", keys_statement(run, number, self.identity.label, keys))
        )

    def participants(self, asked: Shares) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Public keys and labels of a round's participants, by node. With a kit each participant must have signed
        its keys for this run and round, and must be in this hospital's members.pub."""
        labels = [one.label for one in asked.keys.values()]
        if len(set(labels)) < len(labels) or self.identity.label not in labels:
            raise MedFLError(
                "the server's list of keys is not what it should be (hospitals twice, or without this one); "
                "nothing was given"
            )
        if self.identity.key:
            for one in asked.keys.values():
                public = (self.identity.members or {}).get(one.label)
                if public is None:
                    raise MedFLError(
                        f"the server says that {one.label[:32]} takes part, which is not in this hospital's "
                        "members.pub; nothing was given; if the consortium has a new member, add its line"
                    )
                try:
                    statement = keys_statement(asked.run, asked.round, one.label, one.keys)
                    check(public, "keys", statement, one.signature or "")
                except MedFLError as error:
                    raise MedFLError(
                        f"the keys that the server brought as {one.label[:32]}'s are not signed by it; nothing "
                        "was given"
                    ) from error
        nodes = asked.keys.items()
        return {node: one.keys for node, one in nodes}, {node: one.label for node, one in nodes}

    def given(self) -> dict[str, list[str]]:
        """What was summed in each round for which this hospital gave shares (`Party.given`), also before a
        restart."""
        if not self.file.exists():
            return {}
        try:
            given = json.loads(self.file.read_text(encoding="utf-8"))["given"]
            return {str(one): [str(name) for name in names] for one, names in given.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MedFLError(
                f"{self.file} is damaged, so it is not known which sums were given; put back a copy"
            ) from error

    def remember(self, given: dict[str, list[str]]) -> None:
        """Keep on disk what `given` returns, before the shares leave. Another process with the same label may have
        given shares in the meantime; of the same round they must have been for the same sum."""
        with alone(self.file):
            former = self.given()
            if any(former.get(one, names) != names for one, names in given.items()):
                raise MedFLError(
                    "another process of this hospital has just given shares of another sum of this round; nothing "
                    "was given"
                )
            with atomic_write(self.file, "w", private=True) as file:
                json.dump({"version": 1, "given": {**former, **given}}, file)
