"""How the server's memory and time depend on the number of hospitals: one round's answers are received, screened
and summed.

    python benchmarks/server_memory.py [--hospitals 4 64] [--model tiny] [--strategies fedavg krum]

For each strategy and number of hospitals, a separate process receives random updates of the model's size one after the
other, as they come from Flower, screens them, and makes the new model. Memory is the highest resident memory of that
process above what it holds with only the model (Linux only); seconds are those of screening and summing.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import run_script
from federation.protocol.settings import STRATEGIES, FederationSettings
from federation.protocol.weights import from_record, pack, statistics_mask, to_record, variance_mask
from federation.server.aggregation import Aggregator
from federation.server.screening import check_update, screen
from federation.server.updates import Updates
from transunet import ARCHITECTURES, TransUNet


def resident(which: str) -> float:
    """MiB that this process holds now ("VmRSS") or held at most since the mark ("VmHWM")."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def one_round(strategy: str, hospitals: int, name: str) -> None:
    """Receive, screen and sum the updates of a round, and print the memory and time."""
    model = TransUNet(name, 128)
    sent, is_statistic, variances = pack(model.state_dict()), statistics_mask(model), variance_mask(model)
    settings = FederationSettings(
        clients=hospitals,
        strategy=strategy,
        malicious=1 if hospitals > 4 else 0,
        trim=0.2 if hospitals > 4 else 0.25,
    )
    aggregator, shared = Aggregator(settings, is_statistic), torch.randn(len(sent)) * 0.01
    with tempfile.TemporaryDirectory(prefix="medfl-benchmark-", dir=Path.cwd()) as folder:
        Path("/proc/self/clear_refs").write_text("5")  # the mark
        base = resident("VmRSS")
        updates = Updates(sent, is_statistic, Path(folder))
        for number in range(hospitals):
            change = (
                torch.randn(len(sent), generator=torch.Generator().manual_seed(number))
                .mul_(0.01)
                .add_(shared)
            )
            change[variances] = change[variances].abs()
            weights = from_record(to_record(change.add_(sent)))
            del change
            check_update(weights, 100, len(sent), 100, variances)
            updates.add(f"hospital-{number}", weights, 100)
            del weights
        began = time.perf_counter()
        left_out = screen(updates, settings)
        screened = time.perf_counter() - began
        aggregator(1, updates)
        seconds = time.perf_counter() - began
        updates.close()
    print(
        f"{strategy:14}{hospitals:>5} hospitals: {resident('VmHWM') - base:6.0f} MiB above {base:.0f}, "
        f"screening {screened:.1f} s, with the sum {seconds:.1f} s"
    )
    if left_out:
        print(f"left out: {left_out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--hospitals", type=int, nargs="+", default=[4, 64], help="numbers of hospitals (default 4 and 64)"
    )
    parser.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES, help="the strategies (default all)"
    )
    parser.add_argument(
        "--model", choices=ARCHITECTURES, default="tiny", help="the updates have its size (default tiny)"
    )
    parser.add_argument("--one", action="store_true", help="run in this process, for one strategy and number")
    arguments = parser.parse_args()
    if arguments.one:
        return one_round(arguments.strategies[0], arguments.hospitals[0], arguments.model)
    for strategy in arguments.strategies:
        for hospitals in arguments.hospitals:
            subprocess.run(
                [
                    sys.executable,
                    __file__,
                    "--one",
                    "--strategies",
                    strategy,
                    "--hospitals",
                    str(hospitals),
                    "--model",
                    arguments.model,
                ],
                check=True,
            )


if __name__ == "__main__":
    run_script(main)
