"""Many hospitals on one machine: the same two apps in Flower's simulation engine, on Ray.

A few workers, one for each share of the cores, take the hospitals' messages in turn, so memory is bounded by the workers
and not by the hospitals. Ray is optional: requirements-simulation.txt.
"""

import importlib.util
import logging
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common import MedFLError, __version__, write_json
from federation.client_app import IDENTITY, make_app
from federation.hospital import identity
from federation.server_app import run

STORE = 200 * 2**20  # bytes of Ray's shared memory besides the weights on their way


def check_ray() -> None:
    """Raises MedFLError where the simulation engine is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise MedFLError("--simulate needs Ray, which is not installed; run `pip install -r requirements.txt -r "
                         "requirements-simulation.txt`, or start the hospitals with run_client.py")


def simulate(job: dict, folder: Path, hospitals: int, data_dir: Path, device: str, cores: int) -> int:
    """Run the federation that the job describes with simulated hospitals; its exit code.

    folder: an empty one, for what hospitals remember. cores: how many may be used; a hospital's training takes one, or its
    share of them where there are fewer hospitals than cores.
    """
    from flwr.simulation import run_simulation

    for cid in range(hospitals):
        home = folder / f"hospital-{cid}"
        who = identity(home.name, cid, data_dir, device, __version__, Path(job["out"]), shares_machine=True)
        write_json(home / IDENTITY, who)

    def folder_of(context: Context) -> Path:
        return folder / f"hospital-{context.node_config['partition-id']}"

    server_app, codes = ServerApp(), []

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        codes.append(run(grid, job))

    os.environ["RAY_DEDUP_LOGS"] = "0"  # hospitals say alike things, and each is to be seen
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # leave CUDA_VISIBLE_DEVICES alone
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(server_app, make_app(folder_of), hospitals, backend_config={
        "client_resources": {"num_cpus": max(1, cores // hospitals), "num_gpus": 0.0},
        "init_args": {"num_cpus": cores, "include_dashboard": False, "object_store_memory": STORE}})
    return codes[0] if codes else 1
