"""Manage the keys of a federation's server and hospitals, and which hospitals may join.

    python provision.py server --host fl.example.org 10.1.2.3     the coordinator: authority and certificate in kit/
    python provision.py hospital --name mercy  at the hospital: a key pair; the private key stays there
    python provision.py admit hospital.pub                        the coordinator: let that hospital in
    python provision.py revoke mercy                              end its admission, also while a federation runs
    python provision.py list                                      admitted hospitals, and what expires when
    python provision.py members > members.pub                     all admitted keys, for secure aggregation
    python provision.py audit models/audit.jsonl                  check a log for changes, and its signatures

The hospital sends its hospital.pub (which is no secret), and its fingerprint by another channel, such as the telephone.
The coordinator sends back kit/ca.pem, which the hospital puts into its own kit. For secure aggregation it also puts
members.pub there, and compares the fingerprints in it with those hospitals, not with the coordinator: the server can
then neither exchange keys nor invent hospitals.
"""

import argparse
from pathlib import Path

from common import MedFLError, counted, run_script, typed
from federation.runtime.admissions import Admission, admit, public_lines, read_admissions, revoke
from federation.runtime.certificates import (
    AUTHORITY_DAYS,
    certificate_names,
    make_authority,
    make_server_certificate,
    read_authority,
    server_certificate,
)
from federation.runtime.hospital_kit import make_hospital_key
from federation.runtime.kit import CA, CA_KEY, HOSPITAL_KEY, HOSPITAL_PUBLIC, SERVER, check_owner
from federation.server.audit import ENDS, check_end, check_signatures, verify
from storage.files import text_of


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--kit", type=Path, default=Path("kit"), help="folder of keys and certificates (default kit)"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    server = commands.add_parser(
        "server", parents=[common], help="make the authority and the server's certificate"
    )
    server.add_argument(
        "--host", nargs="+", required=True, help="names and addresses by which hospitals reach the server"
    )
    server.add_argument(
        "--days", type=_days, default=365, help="days that the certificate is valid (default 365)"
    )
    server.add_argument(
        "--renew",
        action="store_true",
        help="make a new server certificate by the authority that the kit holds",
    )
    hospital = commands.add_parser(
        "hospital", parents=[common], help="make a hospital's key pair, at the hospital"
    )
    hospital.add_argument(
        "--name", required=True, help="the hospital's label: up to 32 letters, digits, - and _"
    )
    admit = commands.add_parser("admit", parents=[common], help="admit a hospital")
    admit.add_argument("public", type=Path, metavar="KEY.pub", help="the hospital's hospital.pub")
    admit.add_argument(
        "--days", type=_days, default=365, help="days that the admission is valid (default 365)"
    )
    revoke = commands.add_parser("revoke", parents=[common], help="end a hospital's admission")
    revoke.add_argument("name", metavar="LABEL", help="the hospital's label")
    commands.add_parser("list", parents=[common], help="show the admitted hospitals and what expires when")
    commands.add_parser(
        "members", parents=[common], help="print all admitted public keys, for the hospitals' members.pub"
    )
    audit = commands.add_parser(
        "audit",
        parents=[common],
        help="check a federation's log and, if there is a kit, the log's end and the signatures",
    )
    audit.add_argument("log", type=Path, metavar="FILE", help="the audit.jsonl that run_server.py wrote")
    return parser.parse_args()


def _days(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= AUTHORITY_DAYS:
        raise argparse.ArgumentTypeError(f"{text} is not a number of days from 1 to {AUTHORITY_DAYS}")
    return int(text)


def make_server(arguments: argparse.Namespace) -> None:
    kit, certificate = arguments.kit, arguments.kit / SERVER
    if not arguments.renew and not (kit / CA).exists():
        make_authority(kit)
    make_server_certificate(kit, arguments.host, arguments.days, arguments.renew)
    made = server_certificate(kit)
    print(
        f"{certificate}: for {', '.join(certificate_names(made))}; valid to "
        f"{made.not_valid_after_utc:%Y-%m-%d}"
    )
    print(f"give {kit / CA} to every hospital; keep the rest of {kit} to yourself, {CA_KEY} above all")
    print(f"next: python provision.py admit KEY.pub --kit {typed(kit)} for each hospital's key")


def make_hospital(arguments: argparse.Namespace) -> None:
    line = make_hospital_key(arguments.kit, arguments.name)
    fingerprint = Admission(" ".join(line.split()[:2]), "", "").fingerprint
    print(line)
    print(
        f"send {arguments.kit / HOSPITAL_PUBLIC} (the line above) to the coordinator, and its "
        f"fingerprint by another channel: {fingerprint}"
    )
    print(f"{arguments.kit / HOSPITAL_KEY} stays here; put the coordinator's {CA} beside it")
    print(
        f"next: python run_client.py --own-data FOLDER --kit {typed(arguments.kit)} --server HOST:PORT --check"
    )


def admit_hospital(arguments: argparse.Namespace) -> None:
    server_certificate(arguments.kit)  # a wrong --kit is found here
    try:
        line = text_of(arguments.public, "replace")
    except OSError as error:
        raise MedFLError(f"{arguments.public} can't be read; give the hospital's hospital.pub") from error
    label, admission = admit(arguments.kit, line, arguments.days)
    print(
        f"{label} is admitted until {admission.until[:10]}; compare its fingerprint by telephone: "
        f"{admission.fingerprint}"
    )
    print(f"next: python run_server.py --address 0.0.0.0:8443 --kit {typed(arguments.kit)}, if none runs yet")


def revoke_hospital(arguments: argparse.Namespace) -> None:
    admission = revoke(arguments.kit, arguments.name)
    print(
        f"{arguments.name} has been revoked since {admission.revoked}; a running federation applies this by its "
        f"next round"
    )


def show(arguments: argparse.Namespace) -> None:
    certificate = server_certificate(arguments.kit)
    authority = read_authority(arguments.kit)
    print(f"authority           valid to {authority.not_valid_after_utc:%Y-%m-%d}")
    print(
        f"server certificate  valid to {certificate.not_valid_after_utc:%Y-%m-%d}, for "
        f"{', '.join(certificate_names(certificate))}"
    )
    for label, admission in sorted(read_admissions(arguments.kit).items()):
        since = f"since {admission.revoked[:10]}" if admission.revoked else f"until {admission.until[:10]}"
        print(f"{label:20}{admission.state} {since}, {admission.fingerprint}")


def show_members(arguments: argparse.Namespace) -> None:
    server_certificate(arguments.kit)
    print("\n".join(public_lines(arguments.kit)))


def check_log(arguments: argparse.Namespace) -> None:
    count, last = verify(arguments.log)
    print(f"{count} lines, each following from the one before it; the last one's SHA-256 is {last}")
    admissions = read_admissions(arguments.kit)
    if admissions:
        keys = {label: [one.public_key, *one.former] for label, one in admissions.items()}
        signed = check_signatures(arguments.log, keys)
        print(f"{counted(signed, 'signed update')}, each by its hospital's key")
    else:
        print(f"signatures were not checked: {arguments.kit} admits nobody; name the server's --kit")
    if check_end(arguments.log, arguments.kit / ENDS):
        print("its end matches the copy in the kit")
    else:
        print(
            f"the kit has no copy of its end (another --kit, or the log was moved): {arguments.log.resolve()}"
        )
    print("keep that hash elsewhere: it will show whether lines were cut off at the end later")


def main() -> None:
    arguments = parse()
    commands = {
        "server": make_server,
        "hospital": make_hospital,
        "admit": admit_hospital,
        "revoke": revoke_hospital,
        "list": show,
        "members": show_members,
        "audit": check_log,
    }
    if arguments.command in ("server", "hospital", "admit", "revoke"):
        check_owner(arguments.kit)
    commands[arguments.command](arguments)


if __name__ == "__main__":
    run_script(main)
