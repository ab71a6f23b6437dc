"""The server's side of a federation: Flower's ServerApp. It runs in the folder that run_server.py made for it."""

import json
import sys
import traceback
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from checkpoint import load_checkpoint
from common import EXIT_BAD_INPUT, MedFLError, write_json
from federation.rounds import Federation
from federation.settings import from_json
from federation.state import RunState, load_run

JOB, OUTCOME = Path("job.json"), Path("outcome.json")

app = ServerApp()


def prepare(job: dict) -> RunState:
    """The state that the run begins with, or goes on from."""
    out = Path(job["out"])
    if job["resume"]:
        training, federation, kept, model = load_run(out)
        state = RunState(model, training, federation, out, job["commit"])
        state.restore(kept)
        return state
    state = RunState(load_checkpoint(job["start"]).model, *from_json(job["settings"]), out, job["commit"])
    state.progress.started_from, state.progress.init_split = job["started_from"], job["init_split"]
    return state


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation and leave its exit code in the outcome's file."""
    job = json.loads(JOB.read_text(encoding="utf-8"))
    try:
        code = Federation(grid, prepare(job), job["versions"], Path(job["out"]), job["resume"]).run()
    except MedFLError as error:
        print(error, file=sys.stderr, flush=True)
        code = EXIT_BAD_INPUT
    except Exception:
        traceback.print_exc()
        code = 1
    write_json(OUTCOME, {"exit": code})
