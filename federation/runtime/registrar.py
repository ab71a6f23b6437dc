"""Who may pass Flower's door: the kit's list of admissions, carried over to the SuperLink while a federation
runs."""

from collections.abc import Callable
from pathlib import Path

from common import MedFLError
from federation.runtime.admissions import read_admissions
from federation.runtime.flower import Control
from federation.runtime.kit import HOSPITALS
from storage.files import write_json

# for the server's app: {node id: label}, {node id: public key}, and {node id: the day on which its admission ends}
NODES, KEYS, UNTIL = "nodes.json", "keys.json", "until.json"


class Registrar:
    """Registers who is admitted and puts out who is not any more. say: prints a line. Raises MedFLError where
    the list is damaged at the start."""

    def __init__(self, control: Control, kit: Path, folder: Path, say: Callable[[str], None]):
        self.control, self.kit, self.nodes_file, self.say = control, kit, folder / NODES, say
        self._open: dict[str, tuple[str, int]] = {}  # by label: public key and node id
        self._until: dict[str, str] = {}  # by node
        self._out: dict[str, str] = {}  # public keys that were put out, with the label; each is told once
        self._complained = False
        self._apply()
        say(f"admitted: {', '.join(sorted(self._open)) or 'nobody yet (provision.py admit)'}")

    def update(self) -> None:
        """Look at the list again. A damaged one changes nothing, and is told once."""
        try:
            self._apply()
            self._complained = False
        except MedFLError as error:
            if not self._complained:
                self.say(f"{error}; meanwhile nobody is admitted or revoked")
            self._complained = True

    def _apply(self) -> None:
        admitted = {label: a for label, a in read_admissions(self.kit).items() if a.state == "admitted"}
        changed = not self.nodes_file.exists()
        out = [
            label
            for label, (key, _) in self._open.items()
            if label not in admitted or admitted[label].public_key != key
        ]
        if out:  # noted first, so that the server knows why a hospital is gone the moment that it is
            self._note({label: self._open[label] for label in self._open.keys() - out})
            changed = True
        for label in out:
            key, node = self._open.pop(label)
            self.control.unregister(node)
            self._out[key] = ""
            self.say(f"{label} is put out: its key is revoked or its admission over ({self.kit / HOSPITALS})")
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
        """Say once that a key whose admission was over has to wait: the SuperLink takes none again that was put out."""
        if self._out[key] != label:
            self._out[key] = label
            self.say(f"{label} is admitted again, and comes in when the server is started again (--resume)")

    def _note(self, there: dict[str, tuple[str, int]]) -> None:
        """Write who may take part, by label, for the server's own process."""
        write_json(self.nodes_file.with_name(KEYS), {str(node): key for key, node in there.values()})
        write_json(self.nodes_file, {str(node): label for label, (_, node) in there.items()})
