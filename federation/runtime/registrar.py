"""Keeps the SuperLink's registered nodes equal to the kit's list of admissions while a federation runs."""

from collections.abc import Callable
from pathlib import Path

from common import MedFLError
from federation.runtime.admissions import read_admissions
from federation.runtime.flower import Control
from federation.runtime.kit import HOSPITALS
from storage.files import write_json

# files for the server's app: {node id: label}, {node id: public key}, {node id: the day on which its admission ends}
NODES, KEYS, UNTIL = "nodes.json", "keys.json", "until.json"


class Registrar:
    """Registers hospitals that are admitted and removes those that no longer are. say: prints a line. Raises MedFLError
    if the list is damaged at the start."""

    def __init__(self, control: Control, kit: Path, folder: Path, say: Callable[[str], None]):
        self.control, self.kit, self.nodes_file, self.say = control, kit, folder / NODES, say
        self._open: dict[str, tuple[str, int]] = {}  # by label: public key and node id
        self._until: dict[str, str] = {}  # by node
        self._out: dict[str, str] = {}  # removed public keys: the label that was reported, or ""
        self._complained = False
        self._apply()
        say(f"admitted: {', '.join(sorted(self._open)) or 'nobody yet (provision.py admit)'}")

    def update(self) -> None:
        """Read the list again. A damaged list changes nothing and is reported once."""
        try:
            self._apply()
            self._complained = False
        except MedFLError as error:
            if not self._complained:
                self.say(f"{error}; until then no hospital is admitted or revoked")
            self._complained = True

    def _apply(self) -> None:
        admitted = {label: a for label, a in read_admissions(self.kit).items() if a.state == "admitted"}
        changed = not self.nodes_file.exists()
        out = [
            label
            for label, (key, _) in self._open.items()
            if label not in admitted or admitted[label].public_key != key
        ]
        if out:  # written first, so that the server already knows the reason when a hospital disappears
            self._note({label: self._open[label] for label in self._open.keys() - out})
            changed = True
        for label in out:
            key, node = self._open.pop(label)
            self.control.unregister(node)
            self._out[key] = ""
            self.say(
                f"{label} is removed: its key is revoked or its admission has ended ({self.kit / HOSPITALS})"
            )
        for label in sorted(admitted.keys() - self._open.keys()):
            if admitted[label].public_key in self._out:
                self._tell_to_start_again(admitted[label].public_key, label)
                continue
            self._open[label] = (
                admitted[label].public_key,
                self.control.register(admitted[label].pem, label),
            )
            changed = True
        until = {str(node): admitted[label].until[:10] for label, (_, node) in self._open.items()}
        if changed or until != self._until:
            self._until = until
            write_json(self.nodes_file.with_name(UNTIL), until)
            self._note(self._open)

    def _tell_to_start_again(self, key: str, label: str) -> None:
        """Report once that a removed key has to wait, because the SuperLink never registers it again."""
        if self._out[key] != label:
            self._out[key] = label
            self.say(f"{label} is admitted again, and can join after a restart of the server (--resume)")

    def _note(self, there: dict[str, tuple[str, int]]) -> None:
        """Write the admitted hospitals for the server's app. there: public key and node id, by label."""
        write_json(self.nodes_file.with_name(KEYS), {str(node): key for key, node in there.values()})
        write_json(self.nodes_file, {str(node): label for label, (_, node) in there.items()})
