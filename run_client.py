"""Run a hospital of a federation.

    python run_client.py --cid 0                                  share 0 of data/, server on this machine
    python run_client.py --own-data scans --name mercy            everything in the folder is this hospital's
    python run_client.py --own-data scans --name mercy --check    look at the data and the connection, train nothing
    python run_client.py --own-data scans --kit kit --server fl.example.org:8443    with keys of provision.py

The scans stay here. The hospital waits for the server (--wait), takes part in its rounds and ends when the federation
ends. A hospital with own data keeps its split in models/NAME_split.json. Exit codes: 0 done, 2 bad input or refused,
3 the server is gone or too few hospitals are left, 130 stopped.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from borders import escaping
from common import (
    EXIT_NO_QUORUM,
    MedFLError,
    __version__,
    counted,
    git_commit,
    run_script,
    tell,
    typed,
    usable_cores,
)
from dataset import add_mask_option, load_dataset
from federation.hospital.identity import Identity
from federation.privacy.budget import PatientBudget
from federation.protocol.answers import LABEL, PatientPrivacy
from federation.runtime.bundle import hospital_code
from federation.runtime.connection import ServerGone, Watch, refuse, require_kit
from federation.runtime.expiry import tell_hospital
from federation.runtime.flower import ask_admission
from federation.runtime.hospital_kit import hold_kit, hospital_label, read_members
from federation.runtime.kit import CA, HOSPITAL_KEY
from federation.runtime.processes import is_healthy, is_loopback, join_address, parse_address
from federation.runtime.proxies import go_direct, leave_out_odd, perhaps_the_proxy, tell_proxies
from runs.usage import choose_device
from scans.cache import add_cache_option, choose_cache
from storage.files import run_folder, text_of

MODELS = Path("models")  # for this hospital's own files
WAIT_HERE, WAIT_BEYOND = 300.0, 86_400.0  # seconds to wait for a server on this machine, and on another
CHECK_TIME = 60.0  # seconds for a server's answer to --check
DELTA = 1e-5  # for a promise to patients without --dp-sgd-delta
HASH = re.compile("[0-9a-f]{64}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cid", type=int, help="number of the simulated hospital, from 0; it gets that share of --data-dir"
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data"), help="the dataset to share (default data)"
    )
    parser.add_argument(
        "--own-data",
        type=Path,
        help="this hospital's patients: a folder for each, with images and _mask files",
    )
    parser.add_argument("--name", help="this hospital's label, needed with --own-data")
    parser.add_argument(
        "--server", default="127.0.0.1:8080", help="the server's HOST:PORT (default 127.0.0.1:8080)"
    )
    parser.add_argument(
        "--kit",
        type=Path,
        help="folder of this hospital's keys, from provision.py; needed for another machine",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument(
        "--wait",
        type=float,
        help="seconds to wait for a server that is away or has another version (default 300 on this "
        "machine, a day for another)",
    )
    parser.add_argument(
        "--approve",
        nargs="*",
        metavar="HASH",
        help="train only with code and settings that have these hashes, or those "
        "in this file, one a line; without any: print the server's hash and settings, then end",
    )
    parser.add_argument(
        "--dp-sgd-epsilon",
        type=float,
        help="differential privacy of this hospital's patients: the most that all its rounds together may reveal about "
        "one; hides which patients were trained on, also from the server; for a server with --norm group and --init "
        "(requirements-privacy.txt)",
    )
    parser.add_argument(
        "--dp-sgd-delta",
        type=float,
        help="of --dp-sgd-epsilon: probability that the bound does not "
        "hold; far below 1 / patients (default 1e-5)",
    )
    parser.add_argument(
        "--no-proxy", action="store_true", help="connect to the server without the environment's proxy"
    )
    parser.add_argument(
        "--observer",
        action="store_true",
        help="score the rounds' models on this hospital's patients, and train nothing",
    )
    parser.add_argument(
        "--energy",
        action="store_true",
        help="measure the electricity of this hospital's work, and report it to the server",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check data and connection, ask a running server whether this hospital could join, train nothing",
    )
    add_cache_option(parser)
    add_mask_option(parser)
    return parser.parse_args()


def label_of(arguments: argparse.Namespace) -> str:
    """This hospital's label. Raises MedFLError for options that don't go together."""
    own = arguments.own_data is not None
    if own == (arguments.cid is not None):
        raise MedFLError("give either --cid K, for a share of one dataset, or --own-data FOLDER with --name")
    keys = hospital_label(arguments.kit) if arguments.kit else None
    label = (arguments.name or keys) if own else f"hospital-{arguments.cid}"
    if not label:
        raise MedFLError("a hospital with --own-data needs a label; give one with --name")
    if not own and arguments.name:
        raise MedFLError("--name goes with --own-data; a hospital with --cid K is called hospital-K")
    if not own and arguments.cid < 0:
        raise MedFLError(f"--cid is {arguments.cid}; hospitals are numbered from 0")
    if keys not in (None, label):
        raise MedFLError(
            f"the kit in {arguments.kit} belongs to {keys}, but this hospital is called {label}; give the kit of "
            f"that name"
        )
    if not LABEL.fullmatch(label):
        raise MedFLError(f"--name is {label}; take up to 32 letters, digits, - and _")
    return label


def patient_privacy(arguments: argparse.Namespace, label: str) -> PatientPrivacy | None:
    """This hospital's promise of privacy to its patients; None without one. Raises MedFLError if a promise can't be
    kept or would be broken."""
    ledger = MODELS / f"{label}_privacy.json"
    if arguments.dp_sgd_epsilon is None:
        if arguments.dp_sgd_delta is not None:
            raise MedFLError("--dp-sgd-delta goes with --dp-sgd-epsilon; give both, or none")
        if ledger.exists():
            raise MedFLError(
                f"{label} promised its patients privacy ({ledger}), and a round without it would break the "
                "promise; give --dp-sgd-epsilon, or move that file away if the promise no longer holds"
            )
        return None
    delta = DELTA if arguments.dp_sgd_delta is None else arguments.dp_sgd_delta
    PatientBudget(arguments.dp_sgd_epsilon, delta, ledger)  # raises MedFLError if it can't be kept
    return PatientPrivacy(epsilon=arguments.dp_sgd_epsilon, delta=delta)


def identity(arguments: argparse.Namespace) -> Identity:
    """This hospital's identity for the program that trains. Raises MedFLError for options that don't go together and
    for data that can't be used."""
    label, own = label_of(arguments), arguments.own_data is not None
    folder = arguments.own_data if own else arguments.data_dir
    dataset = load_dataset(folder, label if own else None, mask_suffix=arguments.mask_suffix)
    slices = int(dataset.table["slices"].sum())
    print(
        f"{label}: {dataset.name} in {escaping.terminal(dataset.root)}, {counted(len(dataset.patients), 'patient')}, "
        f"{counted(slices, 'slice')}"
        + ("" if own else "; the server's partition decides which of them are this hospital's"),
        flush=True,
    )
    tell(dataset.notes)
    dataset.check_trainable(patient.name for patient in dataset.patients)
    privacy = patient_privacy(arguments, label)
    if arguments.device not in ("auto", "cpu"):
        choose_device(arguments.device)
    return Identity(
        label=label,
        cid=arguments.cid,
        data=folder,
        mask_suffix=arguments.mask_suffix,
        device=arguments.device,
        medfl=__version__,
        models=MODELS,
        code=hospital_code(),
        commit=git_commit(),
        shared_cores=None if own else usable_cores(),
        approved=None if arguments.approve is None else approved(arguments.approve),
        patient_privacy=privacy,
        role="check" if arguments.check else "observe" if arguments.observer else "train",
        energy=arguments.energy,
        key=arguments.kit and arguments.kit / HOSPITAL_KEY,
        members=arguments.kit and read_members(arguments.kit),
    )


def approved(given: list[str]) -> list[str]:
    """The hashes that --approve names. Raises MedFLError for anything that is neither a hash nor a file of hashes."""
    hashes = []
    for entry in given:
        try:
            lines = text_of(Path(entry)).splitlines() if Path(entry).is_file() else [entry]
        except (OSError, ValueError) as error:
            raise MedFLError(
                f"{entry} can't be read as a text of hashes; name the file with --approve, or give the hash itself"
            ) from error
        hashes += [line.split("#")[0].strip() for line in lines]
    hashes = [entry for entry in hashes if entry]
    if wrong := [entry for entry in hashes if not HASH.fullmatch(entry)]:
        raise MedFLError(
            f"--approve got {wrong[0]}, which is neither a hash of 64 digits from 0 to f nor a file; copy the hash "
            "that the server or this hospital printed"
        )
    return hashes


def check(host: str, port: int, server: str, kit: Path | None) -> None:
    """Print that the server can be reached. Raises MedFLError if it can't."""
    require_kit(host, port, kit)
    if not is_healthy(host, port, timeout=10, ca=kit and kit / CA):
        raise MedFLError(
            f"the data are fine, but no server answers at {server}; start it with run_server.py, or check the "
            f"address{perhaps_the_proxy(host, port)}"
        )
    if kit:
        tell_hospital(kit, join_address(host, port))
        refuse(ask_admission(server, kit / CA, kit / HOSPITAL_KEY))
    print(f"the server at {server} answers{' and admits this key' if kit else ''}", flush=True)


def next_step(who: Identity) -> str:
    """The next step after a federation that ended well, or after a check."""
    model = who.file("federated_best.pth")
    if who.role == "check":
        return "the same command without --check takes part"
    if model.exists():
        return f"python predict.py FOLDER --checkpoint {typed(model)}"
    return "the server's terminal says where the model is"


def main() -> None:
    arguments = parse()
    choose_cache(arguments.cache)
    host, port = parse_address(arguments.server)
    leave_out_odd()
    if arguments.no_proxy or is_loopback(host):  # connections within this machine use no proxy
        go_direct(host)
    else:
        tell_proxies(host)
    if not is_loopback(host) and arguments.kit is None:
        raise MedFLError(
            f"{host} is another machine, and models trained on scans are never sent unencrypted; make "
            "this hospital's keys with `python provision.py hospital --name LABEL`, and give them with --kit"
        )
    if arguments.wait is None:
        arguments.wait = WAIT_HERE if is_loopback(host) else WAIT_BEYOND
    who = identity(arguments)
    only_one = hold_kit(arguments.kit) if arguments.kit else None
    if arguments.check:
        check(host, port, arguments.server, arguments.kit)
        if arguments.kit and only_one is None:
            print(f"{who.label} is taking part in another process at the moment; nothing was trained")
            return
        arguments.wait = CHECK_TIME
    elif arguments.kit and only_one is None:
        raise MedFLError(
            f"{who.label} is already running: another process on this machine takes part with the key in "
            f"{arguments.kit}; leave that one running, or end it first"
        )
    folder = run_folder("hospital")
    try:
        who.save(folder)
        code, sentence = Watch(
            join_address(host, port), host, port, arguments.kit, folder, arguments.wait, not arguments.check
        ).run()
    except ServerGone as error:
        code, sentence = EXIT_NO_QUORUM, str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{who.label}: {escaping.lines(sentence)}", file=sys.stderr if code else sys.stdout, flush=True)
    if code == 0:
        print(f"next: {next_step(who)}", flush=True)
    sys.exit(code)


if __name__ == "__main__":
    run_script(main)
