"""Run a federation's server: wait for the hospitals, train with them round by round, write the model.

    python run_server.py                                       two hospitals on this machine, 127.0.0.1:8080
    python run_server.py --clients 4 --rounds 15 --partition site
    python run_server.py --resume                              after the last complete round in --out
    python run_server.py --start-or-resume                     whichever of the two fits, for a service
    python run_server.py --address 0.0.0.0:8443 --kit kit      for hospitals on other machines (keys: provision.py)

Hospitals join with run_client.py, which may be started before or after the server. Writes into --out (default models/):
transunet_federated_best.pth, selected by the patient-weighted validation Dice; transunet_federated_last.pth, which
--resume needs; federated_history.csv (columns in federation/server/history.py), federated_curves.png, and audit.jsonl
(federation/server/audit.py). Exit codes: 0 done, 2 bad input, 3 too few hospitals left, 130 stopped.
"""

import argparse
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from checkpoint import refuse_to_overwrite
from common import MedFLError, add_settings, counted, given_options, run_script, tell, typed, usable_cores
from dataset import add_mask_option, load_dataset
from federation.protocol.log import say
from federation.protocol.settings import (
    TRAINING_OPTIONS,
    FederationSettings,
)
from federation.runtime.certificates import server_certificate
from federation.runtime.gateway import find_nginx
from federation.runtime.job import prepare_job
from federation.runtime.processes import is_loopback, parse_address
from federation.runtime.proxies import leave_out_odd
from federation.runtime.remembered import Remembered, remembered
from federation.runtime.service import Service
from federation.runtime.simulation import check_ray, simulate
from federation.runtime.status_port import serve_status
from federation.server.audit import AUDIT, ENDS, check_end, verify
from federation.server.ending import ENCODER_FILE
from federation.server.events import Messenger
from federation.server.state import BEST, LAST, SHARED, nothing_left
from partition import make_partition
from runs.tracking import add_tracking, check_installed
from runs.usage import choose_device
from scans.cache import add_cache_option, choose_cache
from split import make_split
from storage.files import claim, run_folder
from training import TrainingSettings


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--address", default="127.0.0.1:8080", help="where to listen, HOST:PORT (default 127.0.0.1:8080)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("models"), help="folder for the files written (default models)"
    )
    parser.add_argument("--init", type=Path, help="start from this checkpoint instead of random weights")
    parser.add_argument(
        "--kit", type=Path, help="folder of keys that provision.py made; needed beyond this machine"
    )
    parser.add_argument(
        "--own-gateway",
        action="store_true",
        help="start no nginx: your own one is in front of --address, which stays on loopback "
        "(deployment/gateway)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue after the last complete round in --out, with its settings, --address and --kit; other "
        "--rounds make it longer, or end it earlier",
    )
    parser.add_argument(
        "--start-or-resume",
        action="store_true",
        help="for a service: continue the run in --out, or start one if there is none",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start even if --out holds a run, which is then lost"
    )
    parser.add_argument(
        "--energy",
        action="store_true",
        help="measure the electricity, add what hospitals with --energy report, and write it into energy.json and the "
        "best model's card",
    )
    parser.add_argument(
        "--simulate",
        type=int,
        metavar="N",
        help="run N hospitals here as well, in Flower's simulation engine, on "
        "their shares of --data-dir (needs requirements-simulation.txt)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="of --simulate: the dataset to share (default data)",
    )
    parser.add_argument("--device", default="cpu", help="of --simulate: auto, cpu, cuda or mps (default cpu)")
    parser.add_argument(
        "--cores",
        type=int,
        default=usable_cores(),
        help="of --simulate: cores to use, which limits how many hospitals work at once (default all)",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="of --simulate: use the Ray cluster at this HOST:PORT; its machines share the folders of --out, "
        "--data-dir and MedFL",
    )
    parser.add_argument(
        "--evaluate",
        type=Path,
        metavar="MODEL",
        help="train nothing: let the hospitals score this model on their test patients, into --out/evaluation",
    )
    parser.add_argument(
        "--status-port",
        type=int,
        metavar="PORT",
        help="serve --out/status/index.html at this port of this machine (none by default)",
    )
    parser.add_argument("--notify", metavar="URL", help="post a JSON line there for each important event")
    parser.add_argument(
        "--on-event",
        metavar="COMMAND",
        help="run this for each such event, with the line on its standard input",
    )
    add_tracking(parser)
    add_settings(parser, FederationSettings)
    add_settings(parser, TrainingSettings, TRAINING_OPTIONS)
    add_cache_option(parser)
    add_mask_option(parser)
    arguments = parser.parse_args()
    arguments.given = given_options(parser)
    return arguments


def check_address(address: str, kit: Path | None, own_gateway: bool) -> tuple[str, int]:
    """Host and port to listen on. Raises MedFLError for an address beyond loopback without a kit, and for one that is
    taken."""
    host, port = parse_address(address)
    if not is_loopback(host):
        if kit is None:
            raise MedFLError(
                f"{host} can be reached from other machines, and without keys and encryption anybody there "
                "could join; make a kit with `python provision.py server --host NAME` and give it with "
                "--kit, or choose an --address on 127.0.0.1"
            )
        if own_gateway:
            raise MedFLError(
                "Flower's own port must not be reached from other machines; with --own-gateway choose an "
                "--address on 127.0.0.1 and put your nginx in front of it (deployment/gateway)"
            )
    if own_gateway and kit is None:
        raise MedFLError("--own-gateway needs the keys that your nginx uses; give them with --kit")
    if kit is not None:
        server_certificate(kit)
        if not own_gateway:
            find_nginx()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise MedFLError(
                f"{address} can't be listened on ({error.strerror}); end the program that uses it or choose another "
                "--address"
            ) from error
    return host, port


def shared_folder(out: Path) -> Path:
    """A new folder in `out` for the state of hospitals on several machines. Folders that killed runs left behind are
    removed; nobody else uses them, because `out` is claimed."""
    for former in out.glob(".hospitals-*"):
        shutil.rmtree(former, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=".hospitals-", dir=out.resolve()))


def run_simulated(arguments: argparse.Namespace) -> int:
    """Run the whole federation in this process and Ray's workers; returns its exit code. Raises MedFLError for options
    that don't fit."""
    check_ray()
    if arguments.kit or arguments.own_gateway:
        raise MedFLError("--simulate runs the hospitals itself and takes no keys; leave --kit out")
    if arguments.simulate < 1 or arguments.cores < 1:
        raise MedFLError("--simulate and --cores are 1 or more; choose others")
    dataset = load_dataset(arguments.data_dir, mask_suffix=arguments.mask_suffix)
    tell(dataset.notes)
    claimed = claim(arguments.out, "server")
    folder = shared_folder(arguments.out) if arguments.ray else run_folder("simulation")
    try:
        arguments.clients = arguments.simulate
        job, training, federation = prepare_job(arguments, folder)
        sites = {p.name: p.site for p in dataset.patients}
        split = make_split(sites, training.seed, federation.val_fraction, federation.test_fraction)
        # every hospital makes its own; made here first, so that a mistake is reported before the engine starts
        make_partition(
            dataset.table, split, federation.partition, federation.clients, federation.alpha, training.seed
        )
        device = str(choose_device(arguments.device))
        code = simulate(
            job,
            folder,
            federation.clients,
            arguments.data_dir,
            device,
            arguments.cores,
            arguments.mask_suffix,
            arguments.ray,
        )
    finally:
        claimed.release()
        shutil.rmtree(folder, ignore_errors=True)
    if code == 0:
        tell_next(arguments.out, federation, arguments.data_dir)
    return code


def tell_next(out: Path, federation: FederationSettings, data: Path | None) -> None:
    """Print the next command. data: the dataset that the hospitals shared; None if each has its own."""
    if federation.pretraining:
        return say(f"next: python run_server.py --encoder {typed(out / ENCODER_FILE)} --out ANOTHER_FOLDER")
    command = "predict.py FOLDER" if data is None else f"evaluate.py --data-dir {typed(data)}"
    say(f"next: python {command} --checkpoint {typed(out / BEST)}")


def take_up(arguments: argparse.Namespace) -> None:
    """Decide whether a run begins or continues, and with which options. Raises MedFLError if a former run would be
    overwritten. Ends the program if nothing is left to do."""
    if arguments.evaluate:
        if arguments.energy:
            raise MedFLError("--energy measures a training; leave it out with --evaluate")
        return
    out = arguments.out
    there = (out / LAST).exists()
    if arguments.start_or_resume:
        arguments.resume = there
    if not arguments.resume:
        if not arguments.overwrite:
            made = [out / ENCODER_FILE] if arguments.pretraining else []
            refuse_to_overwrite([out / BEST, out / SHARED, out / LAST, *made])
        return
    if before := remembered(out):
        for name in ("address", "kit", "own_gateway"):
            if name not in arguments.given:
                setattr(arguments, name, getattr(before, name))
    if there and nothing_left(out, arguments.rounds if "rounds" in arguments.given else None):
        verify(out / AUDIT)  # its last line says that nothing is left
        check_end(out / AUDIT, arguments.kit and arguments.kit / ENDS)
        say(f"the run in {out} is over, nothing is left to do; more --rounds continue it")
        sys.exit(0)


def main() -> None:
    arguments = parse()
    choose_cache(arguments.cache)
    leave_out_odd()
    check_installed(arguments.tensorboard, arguments.mlflow)
    take_up(arguments)
    if arguments.ray and arguments.simulate is None:
        raise MedFLError("--ray is for hospitals of --simulate; give both, or leave --ray out")
    if arguments.simulate is not None:
        sys.exit(run_simulated(arguments))
    kit = arguments.kit
    host, port = check_address(arguments.address, kit, arguments.own_gateway)
    claimed = claim(arguments.out, "server")
    folder = run_folder("server")
    try:
        job, _, federation = prepare_job(arguments, folder)
        Remembered(
            address=arguments.address, kit=kit and kit.resolve(), own_gateway=arguments.own_gateway
        ).save(Path(job["out"]))
        how = (
            f"python run_client.py --own-data FOLDER --kit KIT --server HOST:{port}"
            if kit
            else f"python run_client.py --cid 0 (to {federation.clients - 1}) --server {arguments.address}"
        )
        told = Messenger(arguments.notify, arguments.on_event, Path.cwd())
        if arguments.status_port:
            serve_status(Path(job["out"]) / "status", arguments.status_port)
        gated = kit is not None and not arguments.own_gateway
        code = Service(host, port, kit, gated, job, folder, told).run(
            f"listening on {arguments.address}; waiting for {counted(federation.clients, 'hospital')}: {how}"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        claimed.release()
    if code == 0 and not arguments.evaluate:
        tell_next(arguments.out, federation, None if kit else arguments.data_dir)
    sys.exit(code)


if __name__ == "__main__":
    run_script(main)
