"""The server's side of a federation: Flower's ServerApp. It runs in a folder that run_server.py made for it."""

import json
import sys
import traceback
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from borders import escaping
from checkpoint import load_checkpoint
from common import EXIT_BAD_INPUT, MedFLError
from federation.protocol.agreement import from_json
from federation.server.audit import AUDIT
from federation.server.events import Journal, Messenger
from federation.server.rounds import Federation
from federation.server.state import RunState, check_best, load_run, with_rounds
from federation.server.status import Status
from federation.server.tracking import trackers
from federation.server.updates import remove_leftovers
from storage.files import write_json

JOB, OUTCOME, NODES = Path("job.json"), Path("outcome.json"), Path("nodes.json")
KEYS, UNTIL = Path("keys.json"), Path("until.json")

app = ServerApp()


def prepare(job: dict) -> RunState:
    """The state that the run begins with or continues from."""
    out = Path(job["out"])
    remove_leftovers(out)
    if job["resume"]:
        check_best(out)
        training, federation, kept, model = load_run(out)
        federation = with_rounds(federation, job.get("rounds"), kept["progress"]["round"])
        state = RunState(model, training, federation, out, job["commit"])
        state.restore(kept)
        return state
    state = RunState(load_checkpoint(job["start"]).model, *from_json(job["settings"]), out, job["commit"])
    if not job.get("evaluate"):
        state.last.unlink(missing_ok=True)  # so that a later --resume can't continue another run
    state.progress.started_from, state.progress.init_split = job["started_from"], job["init_split"]
    return state


def labels() -> dict[int, str] | None:
    """The label that belongs to each node's key, from the file that run_server.py keeps up to date; None if the
    server asks for no keys."""
    return (
        {int(node): label for node, label in json.loads(NODES.read_text(encoding="utf-8")).items()}
        if NODES.exists()
        else None
    )


def keys() -> dict[int, str] | None:
    """The public key of each node, from the same source; None if the server asks for no keys."""
    return (
        {int(node): key for node, key in json.loads(KEYS.read_text(encoding="utf-8")).items()}
        if KEYS.exists()
        else None
    )


def until() -> dict[int, str]:
    """The day on which each node's admission ends, from the same source; empty if the server asks for no keys."""
    if not UNTIL.exists():
        return {}
    return {int(node): day for node, day in json.loads(UNTIL.read_text(encoding="utf-8")).items()}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation and write its exit code into the outcome file."""
    write_json(OUTCOME, {"exit": run(grid, json.loads(JOB.read_text(encoding="utf-8")))})


def run(grid: Grid, job: dict) -> int:
    """Run the federation that the job describes; returns its exit code."""
    messenger = None
    try:
        out = Path(job["out"])
        journal = Journal(out / AUDIT, job.get("ends") and Path(job["ends"]))
        journal.write("start", resumed=job["resume"], **job["audit"])
        federation = Federation(
            grid,
            prepare(job),
            job["versions"],
            out,
            job["resume"],
            journal,
            labels,
            keys=keys,
            until=until,
            energy=job.get("energy", False),
        )
        journal.listeners.append(Status(federation, journal, out))
        if job.get("notify") or job.get("on_event"):
            messenger = Messenger(job.get("notify"), job.get("on_event"), Path(job["started_in"]))
            journal.listeners.append(messenger)
        journal.listeners += trackers(
            federation, out, job.get("tensorboard", False), job.get("mlflow"), job["resume"]
        )
        journal.tell("start", {"resumed": job["resume"]})
        code = federation.evaluate(job["evaluate"]) if job.get("evaluate") else federation.run()
        journal.write("end", exit=code)
        return code
    except MedFLError as error:
        print(escaping.terminal(error), file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        if messenger:
            messenger.close()
