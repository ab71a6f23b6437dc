"""Run a federation's server: wait for the hospitals, train with them round by round, write the model.

    python run_server.py                                       two hospitals on this machine, 127.0.0.1:8080
    python run_server.py --clients 4 --rounds 15 --partition site
    python run_server.py --resume                              after the last complete round in --out
    python run_server.py --address 0.0.0.0:8443 --kit kit      for hospitals on other machines (keys: provision.py)

Hospitals join with run_client.py, before or after. Writes into --out (default models/):
transunet_federated_best.pth, by the patient-weighted validation Dice; transunet_federated_last.pth, what
--resume needs; federated_history.csv (columns in federation/server/history.py), federated_curves.png, and
audit.jsonl (federation/server/audit.py). Exit codes: 0 done, 2 bad input, 3 too few hospitals left, 130
stopped.
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import torch

from checkpoint import describe, load_start, save_checkpoint
from common import (
    MedFLError,
    __version__,
    add_settings,
    counted,
    git_commit,
    run_folder,
    run_script,
    settings_from,
    tell,
    write_json,
)
from dataset import add_cache_option, choose_cache, load_dataset
from federation.privacy.hospitals import HospitalPrivacy
from federation.protocol.log import say
from federation.protocol.messages import local_versions
from federation.protocol.settings import (
    TRAINING_OPTIONS,
    FederationSettings,
    approval,
    check_together,
    to_json,
)
from federation.protocol.weights import part_mask
from federation.runtime.bundle import make_bundle
from federation.runtime.flower import Control, TaskSource
from federation.runtime.gateway import find_nginx, start_gateway
from federation.runtime.kit import CA, SERVER, SERVER_KEY, server_certificate
from federation.runtime.processes import (
    Child,
    drop_unusable_proxies,
    free_port,
    is_healthy,
    is_loopback,
    join_address,
    no_proxy,
    parse_address,
)
from federation.runtime.registrar import Registrar
from federation.runtime.simulation import check_ray, simulate
from federation.server.audit import AUDIT, verify
from federation.server.state import load_run
from inference import choose_device
from partition import make_partition
from split import make_split
from training import TrainingSettings
from transunet import TransUNet

START_TIME = 90.0  # seconds for Flower's SuperLink to answer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--address", default="127.0.0.1:8080", help="where to listen, HOST:PORT (default 127.0.0.1:8080)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("models"), help="folder for what is written (default models)"
    )
    parser.add_argument("--init", type=Path, help="start from this checkpoint instead of random weights")
    parser.add_argument(
        "--kit", type=Path, help="folder of keys that provision.py made; needed beyond this machine"
    )
    parser.add_argument(
        "--own-gateway",
        action="store_true",
        help="start no nginx: one of yours stands before --address, which stays on loopback "
        "(deployment/gateway)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last complete round in --out, with its settings",
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
        default=os.cpu_count() or 1,
        help="of --simulate: cores to use, and so how many hospitals work at once (default all)",
    )
    add_settings(parser, FederationSettings)
    add_settings(parser, TrainingSettings, TRAINING_OPTIONS)
    add_cache_option(parser)
    return parser.parse_args()


def check_address(address: str, kit: Path | None, own_gateway: bool) -> tuple[str, int]:
    """Host and port to listen on. Raises MedFLError beyond loopback without a kit, and where somebody listens
    already."""
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
                "--address on 127.0.0.1 and let your nginx stand before it (deployment/gateway)"
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
                f"{address} can't be listened on ({error.strerror}); end the program there or choose another "
                "--address"
            ) from error
    return host, port


def starting_model(
    arguments: argparse.Namespace, training: TrainingSettings
) -> tuple[TransUNet, str, str | None]:
    """The model that round 1 begins with, in words where it comes from, and the SHA-256 of the split it was
    trained on, if it was. Raises MedFLError for a file that doesn't fit."""
    torch.manual_seed(training.seed)
    if arguments.init is None:
        model = TransUNet(
            training.model, training.image_size, training.norm, training.pretrained, training.encoder_weights
        )
        name = Path(training.encoder_weights).name if training.encoder_weights else None
        return (
            model,
            f"encoder weights {name}"
            if name
            else "timm's encoder"
            if training.pretrained
            else "random weights",
            None,
        )
    checkpoint = load_start(arguments.init, training.model, training.image_size, training.norm)
    split = checkpoint.metadata.get("data", {}).get("split_sha256")
    return checkpoint.model, f"checkpoint {arguments.init.name}", split


def announce_privacy(privacy: HospitalPrivacy, model: TransUNet, training: TrainingSettings) -> None:
    """Say what is protected, and warn where the noise leaves nothing to learn."""
    settings = privacy.settings
    if privacy.exhausted(0):
        raise MedFLError(
            f"the first round alone would spend epsilon {privacy.spent(1):.3g}, more than --dp-epsilon "
            f"{settings.dp_epsilon:g}; raise one of --dp-epsilon and --dp-noise-multiplier"
        )
    rounds = next((n for n in range(settings.rounds) if privacy.exhausted(n)), settings.rounds)
    say(
        "differential privacy: the protected unit is the hospital, and not the patient; noise "
        f"{privacy.multiplier:.3g} x clip {settings.dp_clip:g}, epsilon {privacy.spent(rounds):.3g} after "
        f"{counted(rounds, 'round')} at delta {settings.dp_delta:g}"
    )
    if warning := privacy.warning(
        int(part_mask(model, settings.left_out(training.freeze_encoder_epochs >= rounds)).sum())
    ):
        say(warning)


def prepare_job(
    arguments: argparse.Namespace, folder: Path
) -> tuple[dict, TrainingSettings, FederationSettings]:
    """What the ServerApp needs, and both settings; every user's mistake is found here."""
    out = arguments.out.resolve()
    job = {
        "out": str(out),
        "resume": arguments.resume,
        "commit": git_commit(),
        "versions": local_versions(__version__),
    }
    if arguments.resume:
        training, federation, state, model = load_run(out)
        settings = state["settings"]
        done = state["progress"]["round"]
        say(
            f"going on after round {done} of {federation.rounds}, with that run's own settings; other options are "
            "ignored"
            if done < federation.rounds
            else f"all {federation.rounds} rounds of this run are done; what is left is to score the model and to "
            "tell the hospitals the end (for a new run leave --resume out)"
        )
    else:
        training, federation = (
            settings_from(arguments, TrainingSettings),
            settings_from(arguments, FederationSettings),
        )
        check_together(training, federation)
        model, started_from, init_split = starting_model(arguments, training)
        start = folder / "start.pth"
        save_checkpoint(start, model.state_dict(), describe(model))
        settings = to_json(training, federation)
        job.update(settings=settings, start=str(start), started_from=started_from, init_split=init_split)
        size = (
            4 * sum(value.numel() for value in model.state_dict().values() if value.is_floating_point()) / 1e6
        )
        say(
            f"{training.model} at {training.image_size} pixels from {started_from}; {size:.0f} MB each way "
            f"a round and hospital"
        )
    if federation.secure_aggregation:
        say(
            "secure aggregation: this server learns the sum of a round's updates, and none by itself; they "
            "are not screened"
        )
    if federation.private:
        announce_privacy(HospitalPrivacy(federation), model, training)
    if (out / AUDIT).exists():
        verify(out / AUDIT)
    job["audit"] = {
        "code": hashlib.sha256(make_bundle()).hexdigest(),
        "settings": hashlib.sha256(settings.encode()).hexdigest(),
        "versions": job["versions"],
        "commit": job["commit"],
        "keys": arguments.kit is not None,
    }
    say(
        f"code and settings, for hospitals that ask what they approve: "
        f"{approval(job['audit']['code'], settings)}"
    )
    return job, training, federation


def start_superlink(host: str, port: int, kit: Path | None, folder: Path) -> Child:
    """Flower's SuperLink, answering; with a kit it speaks TLS and asks every hospital for its key. Raises
    MedFLError where it ends or stays silent."""
    if kit is None:
        transport = ["--insecure"]
    else:
        files = {"--ssl-certfile": SERVER, "--ssl-keyfile": SERVER_KEY, "--ssl-ca-certfile": CA}
        transport = [part for option, name in files.items() for part in (option, str((kit / name).resolve()))]
        transport.append("--enable-supernode-auth")
    child = Child(
        "superlink",
        [
            *transport,
            "--host",
            host,
            "--port",
            str(port),
            "--isolation",
            "process",
            "--disable-runtime-dependency-installation",
        ],
        folder,
        folder / "superlink.log",
    )
    until = time.monotonic() + START_TIME
    while not is_healthy(host, port, ca=kit and kit / CA):
        if child.exit_code is not None or time.monotonic() > until:
            child.stop()
            raise MedFLError(f"Flower's SuperLink did not start; its last lines:\n{child.last_words()}")
        time.sleep(0.1)
    return child


def wait_for(app: Child, others: list[Child], registrar: Registrar | None, folder: Path) -> int:
    """Wait for the run's end; its exit code. Meanwhile who is newly admitted is let in, and who is revoked put
    out."""
    while app.exit_code is None:
        for child in others:
            if child.exit_code is not None:
                raise MedFLError(
                    f"the {child.program} ended; the rounds so far are kept, go on with --resume. Its last "
                    f"lines:\n"
                    f"{child.last_words()}"
                )
        if registrar:
            registrar.update()
        time.sleep(0.2)
    outcome = folder / "outcome.json"
    if not outcome.exists():
        raise MedFLError(
            "the server's program ended before the run's end; the rounds so far are kept, go on with --resume"
        )
    return json.loads(outcome.read_text(encoding="utf-8"))["exit"]


def run_simulated(arguments: argparse.Namespace) -> int:
    """The whole federation in this process and Ray's workers; its exit code. Raises MedFLError for options
    that don't fit."""
    check_ray()
    if arguments.kit or arguments.own_gateway:
        raise MedFLError("--simulate runs hospitals of this machine alone and takes no keys; leave --kit out")
    if arguments.simulate < 1 or arguments.cores < 1:
        raise MedFLError("--simulate and --cores are 1 or more; choose others")
    dataset = load_dataset(arguments.data_dir)
    tell(dataset.notes)
    folder = run_folder("simulation")
    try:
        arguments.clients = arguments.simulate
        job, training, federation = prepare_job(arguments, folder)
        sites = {p.name: p.site for p in dataset.patients}
        split = make_split(sites, training.seed, federation.val_fraction, federation.test_fraction)
        # every hospital makes it again; here it complains before the engine starts
        make_partition(
            dataset.table, split, federation.partition, federation.clients, federation.alpha, training.seed
        )
        device = str(choose_device(arguments.device))
        return simulate(job, folder, federation.clients, arguments.data_dir, device, arguments.cores)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    arguments = parse()
    choose_cache(arguments.cache)
    if arguments.simulate is not None:
        sys.exit(run_simulated(arguments))
    kit = arguments.kit
    tell(drop_unusable_proxies())
    host, port = check_address(arguments.address, kit, arguments.own_gateway)
    gated = kit is not None and not arguments.own_gateway
    folder = run_folder("server")
    children: list[Child] = []
    try:
        job, _, federation = prepare_job(arguments, folder)
        write_json(folder / "job.json", job)
        inner_host, inner_port = ("127.0.0.1", free_port()) if gated else (host, port)
        children.append(start_superlink(inner_host, inner_port, kit, folder))
        inner, ca = join_address(inner_host, inner_port), kit and kit / CA
        os.environ.update(no_proxy())
        control = Control(inner, ca)
        registrar = Registrar(control, kit, folder, say) if kit else None
        if gated:
            children.append(
                start_gateway(host, port, inner_port, kit, folder, arguments.out.resolve() / "gateway.log")
            )
        how = (
            f"python run_client.py --own-data FOLDER --kit KIT --server HOST:{port}"
            if kit
            else f"python run_client.py --cid 0 (to {federation.clients - 1}) --server {arguments.address}"
        )
        say(f"listening on {arguments.address}; waiting for {counted(federation.clients, 'hospital')}: {how}")
        source = TaskSource(inner, "flwr-serverapp", ca)
        control.submit(make_bundle())
        while (token := source.next_token()) is None:
            time.sleep(0.1)
        app = Child("serverapp", [inner, *([str(ca.resolve())] if ca else [])], folder, secret=token)
        children.append(app)
        code = wait_for(app, children[:-1], registrar, folder)
    finally:
        for child in reversed(children):
            child.stop()
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)


if __name__ == "__main__":
    run_script(main)
