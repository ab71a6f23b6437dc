"""The time that differential privacy adds to a round at the server: seconds for clipping and noise, and their share
of a round.

    python benchmarks/privacy_cost.py [--clients 3] [--round-seconds 13]

The updates are random and have the size of `tiny`. benchmarks/federated_rounds.py and benchmarks/security_cost.py
measure how long a round takes without privacy.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from common import run_script
from federation.privacy.hospitals import HospitalPrivacy
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import pack
from federation.server.updates import Updates
from transunet import TransUNet

TIMES = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=3, help="hospitals (default 3)")
    parser.add_argument(
        "--round-seconds", type=float, default=13.0, help="seconds of a round without privacy (default 13)"
    )
    arguments = parser.parse_args()
    privacy = HospitalPrivacy(
        FederationSettings(clients=arguments.clients, dp_clip=1.0, dp_noise_multiplier=1.0)
    )
    sent = pack(TransUNet("tiny", 128, "group").state_dict())
    everything, seconds = torch.ones(len(sent), dtype=torch.bool), []
    with tempfile.TemporaryDirectory(prefix="medfl-benchmark-") as folder:
        updates = Updates(sent, ~everything, Path(folder))
        for k in range(arguments.clients):
            updates.add(f"hospital-{k}", sent + torch.randn(len(sent)) * 0.01, 100)
        for _ in range(TIMES):
            began = time.perf_counter()
            privacy.private_mean(updates.sent, updates.blocks, everything)
            seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    print(
        f"{arguments.clients} updates of {len(sent):,} weights: {median:.2f} s (median of {TIMES}), "
        f"{median / arguments.round_seconds:.1%} of a round of {arguments.round_seconds:g} s"
    )


if __name__ == "__main__":
    run_script(main)
