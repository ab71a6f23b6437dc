"""Keys and admissions: what provision.py makes, refuses and says."""

import datetime
import json
import os
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from common import MedFLError
from federation.runtime import admissions, certificates, hospital_kit
from federation.runtime.admissions import admit
from federation.runtime.kit import parse_public


def private(path) -> bool:
    return stat.S_IMODE(path.stat().st_mode) == 0o600


def test_from_nothing_to_a_consortium_in_three_commands(consortium):
    mercy = consortium.hospital("mercy")
    certificate = certificates.server_certificate(consortium.kit)
    assert {"fl.example.org", "localhost", "127.0.0.1"} <= set(certificates.certificate_names(certificate))
    assert isinstance(certificate.public_key().curve, ec.SECP384R1)
    assert hospital_kit.hospital_label(mercy) == "mercy"
    secrets = [consortium.kit / name for name in ("ca.key", "server.key", "hospitals.json")]
    for path in (*secrets, mercy / "hospital.key"):
        assert os.name == "nt" or private(path), path
    listed = consortium.provision("list", "--kit", consortium.kit).stdout
    fingerprint = admissions.read_admissions(consortium.kit)["mercy"].fingerprint
    assert (
        "mercy" in listed
        and fingerprint in listed
        and listed.count("valid to 20") == 2
        and "admitted until 20" in listed
    )
    assert (
        b"PRIVATE"
        not in (mercy / "hospital.pub").read_bytes() + (consortium.kit / "hospitals.json").read_bytes()
    )


def test_the_printed_fingerprint_is_that_of_ssh_keygen(consortium):
    """A hospital without MedFL's program can check it: SHA-256 over the key's wire format, base64, no
    padding."""
    done = consortium.provision("hospital", "--name", "mercy", "--kit", consortium.folder / "mercy")
    line = (consortium.folder / "mercy" / "hospital.pub").read_text()
    assert line.strip() in done.stdout and line.split()[2] == "mercy"
    assert admissions.Admission(" ".join(line.split()[:2]), "", "").fingerprint in done.stdout


def test_nothing_is_overwritten_and_a_renewed_certificate_keeps_the_authority(consortium):
    mercy = consortium.hospital("mercy")
    before = {path: path.read_bytes() for path in [*consortium.kit.iterdir(), *mercy.iterdir()]}
    again = consortium.provision("server", "--host", "x.org", "--kit", consortium.kit, fine=False)
    assert again.returncode == 2 and "--renew" in again.stderr
    again = consortium.provision("hospital", "--name", "mercy", "--kit", mercy, fine=False)
    assert again.returncode == 2 and "not overwritten" in again.stderr
    bad = consortium.provision("server", "--host", "no name!", "--renew", "--kit", consortium.kit, fine=False)
    assert bad.returncode == 2 and "neither a host name nor an address" in bad.stderr
    assert {path: path.read_bytes() for path in before} == before
    consortium.provision("server", "--host", "x.org", "--renew", "--kit", consortium.kit)
    assert "x.org" in certificates.certificate_names(certificates.server_certificate(consortium.kit))
    assert (consortium.kit / "ca.pem").read_bytes() == before[consortium.kit / "ca.pem"]
    assert (consortium.kit / "former-server.pem").read_bytes() == before[consortium.kit / "server.pem"]


def refused(consortium, *options) -> str:
    done = consortium.provision(*options, fine=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_label_and_a_key_belong_together(consortium):
    mercy = consortium.hospital("mercy")
    other = consortium.folder / "other"
    consortium.provision("hospital", "--name", "mercy", "--kit", other)
    admit = ("--kit", consortium.kit)
    assert "another key" in refused(consortium, "admit", other / "hospital.pub", *admit)
    renamed = consortium.folder / "renamed.pub"
    renamed.write_text((mercy / "hospital.pub").read_text().replace(" mercy", " hope"))
    assert "admitted as mercy" in refused(consortium, "admit", renamed, *admit)
    consortium.provision("revoke", "mercy", "--kit", consortium.kit)
    assert "revoked since" in consortium.provision("list", "--kit", consortium.kit).stdout
    assert "can't be admitted again" in refused(consortium, "admit", mercy / "hospital.pub", *admit)
    consortium.provision(
        "admit", other / "hospital.pub", *admit
    )  # a new key for the label whose old one is revoked
    assert admissions.read_admissions(consortium.kit)["mercy"].state == "admitted"
    assert "is not in" in refused(consortium, "revoke", "nobody", *admit)
    for content in (
        "ssh-ed25519 AAAA mercy",
        "nonsense",
        "",
        (mercy / "hospital.pub").read_text().replace(" mercy", ""),
        (mercy / "hospital.pub").read_text().replace(" mercy", " ../mercy"),
    ):
        renamed.write_text(content)
        assert "hospital.pub" in refused(consortium, "admit", renamed, *admit)
    assert "can't be read" in refused(consortium, "admit", consortium.folder / "none.pub", *admit)


@pytest.mark.parametrize("host", ["klinik-köln.example", "a..b", "*.example"])
def test_a_name_that_is_no_machines_is_told(consortium, host):
    told = refused(consortium, "server", "--host", host, "--kit", consortium.folder / "new")
    assert told.count("\n") == 1 and "is neither a host name nor an address" in told


@pytest.mark.parametrize("letters", ["{}.{}", "{}-{}", "{}{}="])
def test_a_revoked_key_is_known_however_it_is_written(consortium, letters):
    """Base64 leaves room: signs that stand for nothing are read over."""
    kind, key, _ = (consortium.hospital("mercy") / "hospital.pub").read_text().split()
    consortium.provision("revoke", "mercy", "--kit", consortium.kit)
    again = f"{kind} {letters.format(key[:20], key[20:])} other"
    assert parse_public(again) == ("other", f"{kind} {key}")
    with pytest.raises(MedFLError, match="this key was revoked"):
        admit(consortium.kit, again, 30)


def test_an_admission_ends_by_itself(consortium):
    consortium.hospital("mercy")
    path = consortium.kit / "hospitals.json"
    content = json.loads(path.read_text())
    content["hospitals"]["mercy"]["until"] = "2020-01-01T00:00:00+00:00"
    path.write_text(json.dumps(content))
    assert admissions.read_admissions(consortium.kit)["mercy"].state == "expired"
    assert "expired until 2020-01-01" in consortium.provision("list", "--kit", consortium.kit).stdout
    path.write_text("{")
    with pytest.raises(MedFLError, match="is damaged"):
        admissions.read_admissions(consortium.kit)


def test_files_that_are_missing_expired_or_of_another_kit_are_told(consortium, tmp_path, monkeypatch):
    other = type(consortium)(tmp_path / "other")
    (consortium.kit / "server.key").write_bytes((other.kit / "server.key").read_bytes())
    with pytest.raises(MedFLError, match="is not the key of"):
        certificates.server_certificate(consortium.kit)
    for name in ("server.pem", "server.key"):
        (consortium.kit / name).write_bytes((other.kit / name).read_bytes())
    with pytest.raises(MedFLError, match="not made by the authority"):
        certificates.server_certificate(consortium.kit)

    class Later(datetime.datetime):
        @classmethod
        def now(cls, zone=None):
            return super().now(zone) + datetime.timedelta(days=400)

    monkeypatch.setattr(certificates, "datetime", Later)
    with pytest.raises(MedFLError, match="check this machine's clock"):
        certificates.server_certificate(other.kit)
    monkeypatch.undo()
    (other.kit / "server.pem").write_text("no certificate")
    with pytest.raises(MedFLError, match="is not a certificate"):
        certificates.server_certificate(other.kit)
    (other.kit / "server.pem").unlink()
    with pytest.raises(MedFLError, match="there is no"):
        certificates.server_certificate(other.kit)


def test_a_hospitals_kit_is_checked(consortium):
    mercy, hope = consortium.hospital("mercy"), consortium.hospital("hope")
    (mercy / "hospital.pub").write_bytes((hope / "hospital.pub").read_bytes())
    with pytest.raises(MedFLError, match="don't belong together"):
        hospital_kit.hospital_label(mercy)
    (hope / "ca.pem").unlink()
    with pytest.raises(MedFLError, match="ask the coordinator"):
        hospital_kit.hospital_label(hope)
    third = consortium.hospital("third")
    if os.name == "posix":
        (third / "hospital.key").chmod(0o644)
        with pytest.raises(MedFLError, match="others can read"):
            hospital_kit.hospital_label(third)
    (third / "hospital.key").write_text("no key")
    (third / "hospital.key").chmod(0o600)
    with pytest.raises(MedFLError, match="is not a private key"):
        hospital_kit.hospital_label(third)
    other = ed25519.Ed25519PrivateKey.generate()
    pem = other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    (third / "hospital.key").write_bytes(pem)
    with pytest.raises(MedFLError, match="a key of another kind"):
        hospital_kit.hospital_label(third)


def test_the_authority_signs_nothing_but_servers(consortium):
    authority, server = (
        certificates.read_authority(consortium.kit),
        certificates.server_certificate(consortium.kit),
    )
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(
        True, 0
    )
    assert server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_members_of_a_consortium_are_read_and_damaged_lists_refused(consortium):
    """What `provision.py members` prints is what hospitals put into their kits."""
    anna, bert = consortium.hospital("anna"), consortium.hospital("bert")
    printed = consortium.provision("members", "--kit", consortium.kit).stdout
    assert hospital_kit.read_members(anna) is None
    (anna / "members.pub").write_text(f"# compared by telephone\n{printed}", encoding="utf-8")
    lines = [(kit / "hospital.pub").read_text().split() for kit in (anna, bert)]
    assert hospital_kit.read_members(anna) == {label: f"{kind} {key}" for kind, key, label in lines}
    (anna / "members.pub").write_text(printed, encoding="utf-16")  # as > writes it in a PowerShell
    assert set(hospital_kit.read_members(anna)) == {"anna", "bert"}
    for damaged, sentence in (
        (printed.replace(lines[0][1], lines[1][1]), "two keys of anna"),
        (printed.replace(lines[1][1], lines[0][1]), "one key for two hospitals"),
        ("bert", "is not a hospital's public key"),
    ):
        (anna / "members.pub").write_text(damaged, encoding="utf-8")
        with pytest.raises(MedFLError, match=sentence):
            hospital_kit.read_members(anna)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give a folder away")
def test_what_another_user_could_not_read_is_not_written(consortium):
    """A service's kit belongs to its user: what root wrote there would revoke nobody."""
    consortium.hospital("mercy")
    before = (consortium.kit / "hospitals.json").read_bytes()
    os.chown(consortium.kit, 10001, -1)
    done = consortium.provision("revoke", "mercy", "--kit", consortium.kit, fine=False)
    assert done.returncode == 2 and "sudo -u '#10001'" in done.stderr
    assert (consortium.kit / "hospitals.json").read_bytes() == before
    os.chown(consortium.kit, 0, -1)
    consortium.provision("revoke", "mercy", "--kit", consortium.kit)
