"""The list of admissions, carried over to the SuperLink: at the start, and when it changes."""

import json

import pytest

from common import MedFLError
from federation.runtime.admissions import read_admissions, write_admissions
from federation.runtime.registrar import NODES, UNTIL, Registrar


class Control:
    """Keeps who is registered, as the SuperLink does: a key that was put out is not taken again."""

    def __init__(self):
        self.inside, self.out, self.next = {}, set(), 100

    def register(self, key: bytes, label: str) -> int:
        assert key not in self.out and key not in self.inside.values()
        self.next += 1
        self.inside[self.next] = key
        return self.next

    def unregister(self, node: int) -> None:
        self.out.add(self.inside.pop(node))


def nodes(folder) -> list[str]:
    return sorted(json.loads((folder / NODES).read_text()).values())


def test_who_is_admitted_comes_in_and_who_is_revoked_goes_out(consortium, tmp_path):
    said = []
    for label in ("mercy", "hope", "gone"):
        consortium.hospital(label)
    consortium.provision("revoke", "gone", "--kit", consortium.kit)
    control = Control()
    registrar = Registrar(control, consortium.kit, tmp_path, said.append)
    assert nodes(tmp_path) == ["hope", "mercy"] and len(control.inside) == 2
    consortium.provision("revoke", "mercy", "--kit", consortium.kit)
    consortium.hospital("late")
    put_out, known = control.unregister, []
    control.unregister = lambda node: (known.append(nodes(tmp_path)), put_out(node))
    registrar.update()
    assert known == [["hope"]], "the server knows why before the hospital is gone"
    assert nodes(tmp_path) == ["hope", "late"] and len(control.out) == 1
    until = json.loads((tmp_path / UNTIL).read_text())
    admitted = read_admissions(consortium.kit)
    assert sorted(until.values()) == sorted(admitted[label].until[:10] for label in ("hope", "late"))
    assert said[0] == "admitted: hope, mercy" and said[1].startswith("mercy is removed")
    before = (tmp_path / NODES).stat().st_mtime_ns
    registrar.update()
    assert (tmp_path / NODES).stat().st_mtime_ns == before


def test_a_new_key_takes_the_place_of_a_revoked_one(consortium, tmp_path):
    consortium.hospital("mercy")
    control = Control()
    registrar = Registrar(control, consortium.kit, tmp_path / "server", lambda line: None)
    consortium.provision("revoke", "mercy", "--kit", consortium.kit)
    consortium.provision("hospital", "--name", "mercy", "--kit", consortium.folder / "again")
    consortium.provision("admit", consortium.folder / "again" / "hospital.pub", "--kit", consortium.kit)
    registrar.update()
    assert nodes(tmp_path / "server") == ["mercy"] and len(control.out) == 1 and len(control.inside) == 1


def test_who_is_admitted_again_after_its_time_waits_for_a_new_start(consortium, tmp_path):
    """Flower takes no key twice, and refused it with an error that ended the server."""
    said, mercy, control = [], consortium.hospital("mercy"), Control()
    registrar = Registrar(control, consortium.kit, tmp_path, said.append)
    admissions = read_admissions(consortium.kit)
    admissions["mercy"].until = admissions["mercy"].admitted
    write_admissions(consortium.kit, admissions)
    registrar.update()
    consortium.provision("admit", mercy / "hospital.pub", "--kit", consortium.kit)
    registrar.update()
    registrar.update()
    assert (
        nodes(tmp_path) == []
        and said[1:] == [said[1], said[2]]
        and "after a restart of the server" in said[2]
    )
    Registrar(Control(), consortium.kit, tmp_path, said.append)
    assert nodes(tmp_path) == ["mercy"]


def test_a_damaged_list_changes_nothing_and_is_told_once(consortium, tmp_path):
    said = []
    consortium.hospital("mercy")
    registrar = Registrar(Control(), consortium.kit, tmp_path, said.append)
    (consortium.kit / "hospitals.json").write_text("{")
    registrar.update()
    registrar.update()
    assert nodes(tmp_path) == ["mercy"] and ["is damaged" in line for line in said] == [False, True]
    with pytest.raises(MedFLError, match="is damaged"):
        Registrar(Control(), consortium.kit, tmp_path, said.append)
