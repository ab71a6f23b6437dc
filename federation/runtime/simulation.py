"""Many hospitals on one machine, or on a Ray cluster: the same two apps in Flower's simulation engine, on Ray.

A few workers, one for each share of the cores, handle the hospitals' messages in turn, so the number of workers, not
of hospitals, bounds the memory. Any worker may handle any hospital's messages, so the hospitals' state is in a folder
that all workers can read. Ray is optional: requirements-simulation.txt.
"""

import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common import EXIT_INTERRUPTED, MedFLError, __version__
from federation.hospital.app import make_app
from federation.hospital.identity import Identity
from federation.server.app import run

STORE = 300 * 2**20  # bytes of Ray's object store


def check_ray() -> None:
    """Raises MedFLError if the simulation engine is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise MedFLError(
            "--simulate needs Ray, which is not installed; run `pip install -r requirements.txt -r "
            "requirements-simulation.txt`, or start the hospitals with run_client.py"
        )


class StoppableGrid:
    """Flower's grid until `stopped` is set. The next call then ends the thread in which the round loop runs."""

    def __init__(self, grid: Grid, stopped: threading.Event):
        self._grid, self._stopped = grid, stopped

    def __getattr__(self, name: str) -> Callable:
        if self._stopped.is_set():
            raise SystemExit
        return getattr(self._grid, name)


@contextlib.contextmanager
def stopped_by_signals(stopped: threading.Event) -> Iterator[None]:
    """Within the block Ctrl-C and SIGTERM set `stopped`, and a second one ends the process. Without this the engine
    would hang."""

    def stop(*_: object) -> None:
        if stopped.is_set():
            os._exit(EXIT_INTERRUPTED)
        print(
            "stopping when the hospitals at work are done; a second Ctrl-C stops at once",
            file=sys.stderr,
            flush=True,
        )
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_ray(cores: int, scratch: str, cluster: str | None) -> tuple[int, int]:
    """Start Ray on `cores` cores of this machine, or join the cluster at HOST:PORT. Returns the number of cores, and
    that of the machine with the fewest. This comes before Flower would do it, because Ray takes over SIGTERM when it
    starts."""
    os.environ["RAY_DEDUP_LOGS"] = "0"  # hospitals print similar lines, and each must be shown
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # leave CUDA_VISIBLE_DEVICES alone
    import ray

    own = {
        "num_cpus": cores,
        "include_dashboard": False,
        "object_store_memory": STORE,
        "_temp_dir": scratch,
    }
    ray.init(
        **({"address": cluster} if cluster else own),
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
        logging_level=logging.ERROR,
    )
    machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return sum(machines), min(filter(None, machines))


def _run_engine(
    server_app: ServerApp, client_app: ClientApp, hospitals: int, cores: int, stopped: threading.Event
) -> None:
    """Run both apps to their end. cores: the cores of each worker."""
    import ray
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # MedFL reports each error, once
    try:
        with stopped_by_signals(stopped):
            run_simulation(
                server_app,
                client_app,
                hospitals,
                backend_config={"client_resources": {"num_cpus": cores, "num_gpus": 0.0}},
            )
    finally:
        ray.shutdown()


def simulate(
    job: dict,
    folder: Path,
    hospitals: int,
    data_dir: Path,
    device: str,
    cores: int,
    mask_suffix: str,
    cluster: str | None = None,
) -> int:
    """Run the federation that the job describes with simulated hospitals; returns its exit code. Raises
    KeyboardInterrupt if it was stopped, and MedFLError if the engine fails.

    folder: an empty folder for the hospitals' state. cores: the number that may be used; a hospital's training takes
    one core, or its share if there are fewer hospitals than cores. cluster: HOST:PORT of a Ray cluster whose cores are
    used instead; its machines must find `folder`, the data and MedFL under the same paths as this one.
    """

    def folder_of(context: Context) -> Path:
        return folder / f"hospital-{context.node_config['partition-id']}"

    server_app, codes, stopped = ServerApp(), [], threading.Event()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        codes.append(run(cast(Grid, StoppableGrid(grid, stopped)), job))

    # Ray's folder holds sockets, whose paths must be short; a user's TMPDIR is often too long
    scratch = tempfile.mkdtemp(prefix="medfl-", dir="/tmp" if os.name == "posix" else None)
    try:
        cores, most = _start_ray(cores, scratch, cluster)
        for cid in range(hospitals):
            home = folder / f"hospital-{cid}"
            Identity(
                label=home.name,
                cid=cid,
                data=data_dir,
                mask_suffix=mask_suffix,
                device=device,
                medfl=__version__,
                models=Path(job["out"]),
                code=job["audit"]["code"],
                shared_cores=cores,
                energy=job.get("energy", False),
            ).save(home)
        for_one = max(1, min(cores // hospitals, most))
        _run_engine(server_app, make_app(folder_of), hospitals, for_one, stopped)
    except Exception as error:
        cause = error.__cause__ and error.__cause__.__cause__ or error
        raise MedFLError(
            f"Flower's simulation engine failed ({cause}); "
            + (f"see to the Ray cluster at {cluster}, or " if cluster else "")
            + "start the hospitals with run_client.py instead"
        ) from error
    finally:
        interrupted = stopped.is_set()
        stopped.set()
        shutil.rmtree(scratch, ignore_errors=True)
    if interrupted:
        raise KeyboardInterrupt
    return codes[0] if codes else 1
