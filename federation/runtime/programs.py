"""Flower's programs, and MedFL's own, which run the two apps. Each ends with the process that started it. Some of the
names of Flower used here are not public API, as in `flower.py`.

    python -m federation.runtime.programs PARENT superlink OPTIONS             Flower's own
    python -m federation.runtime.programs PARENT supernode SECONDS OPTIONS     Flower's own, with its longest sleep
    python -m federation.runtime.programs PARENT gateway NGINX OPTIONS         nginx in front of the SuperLink
    python -m federation.runtime.programs PARENT serverapp ADDRESS [CA]        the server's part of one run
    python -m federation.runtime.programs PARENT hospital ADDRESS              the hospital's part of each message
    python -m federation.runtime.programs PARENT clientapp ADDRESS             one message, where a fork is unsafe

serverapp and clientapp read a token from standard input.

The ServerApp runs the code that run_server.py put into its bundle. A hospital never unpacks a bundle: it runs the MedFL
that is installed there, and checks whether the server's is the same.
"""

import contextlib
import ctypes
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from borders.terminal import steady_output
from federation.runtime.flower import CLIENT_APP, TaskSource, careful_client, transport

POLL = 0.1  # seconds between two looks for a task
# the start of each program's command; -P keeps its working folder, which holds no modules, off the path
PROGRAM = (sys.executable, "-P", "-m", "federation.runtime.programs")
CAN_FORK = sys.platform == "linux"  # elsewhere a fork after importing torch is not safe


def tie_to_parent(parent: int, how: signal.Signals | None = None) -> None:
    """Make this process end with the process `parent`, also when that is killed. Linux sends the signal `how` (SIGKILL
    by default); elsewhere a thread watches the parent."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, how or signal.SIGKILL)
        if os.getppid() != parent:  # it ended before this call
            os._exit(1)
        return

    def watch() -> None:
        if os.name == "nt":
            synchronize, forever = 0x00100000, 0xFFFFFFFF
            ctypes.windll.kernel32.WaitForSingleObject(
                ctypes.windll.kernel32.OpenProcess(synchronize, False, parent), forever
            )
        else:
            while os.getppid() == parent:
                time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def only_own_answers(push: Callable) -> Callable:
    """The SuperLink's handler for hospitals' messages, limited to their own answers. Flower (1.41) checks the caller,
    but not the sender that a message names. A message that answers nothing and names the server as its sender would
    be delivered to another hospital as the server's."""
    from fastapi import HTTPException

    def pushed(request: Any, state: Any) -> Any:
        for one in request.messages_list:
            about = one.metadata
            if about.src_node_id != request.node.node_id or not about.reply_to_message_id:
                raise HTTPException(403, "a hospital may send only its own answers")
        return push(request=request, state=state)

    return pushed


def store_by_message() -> None:
    """Have Flower's program store its messages' objects by message: by Flower's own way a tree of 100 objects that name
    each other twice, which take 10 kB, would be written out in full."""
    from federation.runtime.flower_objects import ObjectsByMessage

    stores = importlib.import_module("flwr.supercore.object_store.object_store_factory")
    vars(stores)["InMemoryObjectStore"] = ObjectsByMessage


def run_superlink(options: list[str]) -> None:
    from flwr.superlink.cli import flower_superlink

    store_by_message()
    handlers = importlib.import_module("flwr.superlink.servicer.fleet.fleet_handlers")
    vars(handlers)["push_messages"] = only_own_answers(handlers.push_messages)
    sys.argv = ["flower-superlink", *options]
    flower_superlink()


def run_supernode(longest: float, options: list[str]) -> None:
    """longest: seconds that it sleeps between two looks for a message."""
    from flwr.supernode.cli import flower_supernode

    from borders.limits import BUDGET
    from federation.runtime.flower_objects import MOST_BESIDE, stopped_at

    store_by_message()
    loop = importlib.import_module("flwr.supernode.start_client_internal")
    vars(loop)["time"] = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, longest)))
    # MedFL has no run's configuration, and to look for one Flower would unpack a file of any size from the bundle
    vars(loop)["get_fused_config_from_fab"] = lambda *_: {}
    vars(loop)["pull_objects"] = stopped_at(BUDGET + MOST_BESIDE, loop.pull_objects)
    vars(importlib.import_module("flwr.supernode.fleet_http_connection"))["FleetHttpClient"] = (
        careful_client()
    )
    sys.argv = ["flower-supernode", *options]
    flower_supernode()
    os._exit(1)  # it gave up, and one of its threads would keep an idle process alive


def run_gateway(parent: int, command: list[str]) -> None:
    """Become nginx. Its death signal is one that nginx passes on to its workers; the signal's setting survives the
    exec."""
    if sys.platform == "linux":
        tie_to_parent(parent, signal.SIGTERM)
        os.execv(command[0], command)
    tie_to_parent(parent)
    sys.exit(subprocess.run(command, check=False).returncode)


def run_server_app(address: str, ca: str | None = None) -> None:
    from queue import Queue

    from federation.runtime.flower_objects import within

    module = importlib.import_module(
        "flwr.superlink.runtime.run_serverapp"
    )  # a function of the package has its name
    vars(module)["install_from_fab"] = _quietly(module.install_from_fab)
    most = json.loads(Path("job.json").read_text(encoding="utf-8"))["most_bytes"]
    grid = importlib.import_module("flwr.superlink.grid.http_grid")
    vars(grid)["inflate_object_from_contents"] = within(most, grid.inflate_object_from_contents)
    how = transport(ca)
    module.run_serverapp(
        address,
        Queue(),
        sys.stdin.readline().strip(),
        insecure=how["insecure"],
        certificates=how["root_certificates"],
    )


def run_client_app(address: str, token: str) -> None:
    """Handle one message with the app that is installed here. The bundle that came with it is inspected but not run.

    Flower's own text about an exception is replaced, because it can hold a file's name.
    """
    from flwr.app.error import Error

    from borders.limits import BUDGET
    from federation.hospital.app import app_for
    from federation.runtime.bundle import code_in
    from federation.runtime.flower_objects import pulled_within

    objects = importlib.import_module("flwr.supercore.inflatable.inflatable_utils")
    vars(objects)["pull_objects"] = pulled_within(BUDGET, objects.pull_objects)
    module = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    came: list[str] = []
    vars(module).update(
        install_from_fab=lambda content, **_: came.append(code_in(content)),
        get_load_client_app_fn=lambda **_: lambda *_: app_for(came[0]),
        Error=lambda code, reason: Error(code=code, reason="at the hospital"),
    )
    module.run_clientapp(address, token, insecure=True)


def _quietly(install: Callable) -> Callable:
    """`install`, without its output on the user's terminal for each message."""

    def quiet(*arguments: Any, **options: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return install(*arguments, **options)

    return quiet


def serve_hospital(address: str) -> None:
    """Run the app for each message that arrives: in a fork that has everything loaded, or in a new process."""
    for module in (CLIENT_APP, "flwr.supernode.runtime.run_clientapp"):
        importlib.import_module(module)
    importlib.import_module("federation.runtime.bundle").hospital_files()  # forks need not look for them
    source = TaskSource(address, "flwr-clientapp")
    while True:
        token = source.next_token()
        if token is None:
            time.sleep(POLL)
            continue
        if CAN_FORK:
            code = run_in_fork(address, token)
        else:
            command = [*PROGRAM, str(os.getpid()), "clientapp", address]
            code = subprocess.run(command, input=token + "\n", text=True, check=False).returncode
        # perhaps without an answer, for which the SuperNode would wait for ever: run_client.py restarts both
        if code:
            why = "killed, perhaps because memory ran out" if code < 0 else f"exit code {code}"
            sys.exit(f"the program that handles a message ended too early ({why})")


def run_in_fork(address: str, token: str) -> int:
    """Handle one message in a fork of this process; returns its exit code, negative if a signal ended it."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(
            os.waitpid(child, 0)[1]
        )  # one message at a time, because the SuperNode hands out one at a time
    code = 1
    try:
        tie_to_parent(parent)
        run_client_app(address, token)
    except SystemExit as end:
        # as everywhere in Python, a text instead of a code means 1
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    parent, program, *options = sys.argv[1:]
    if program == "gateway":
        return run_gateway(int(parent), options)
    tie_to_parent(int(parent))
    steady_output()
    if program == "superlink":
        run_superlink(options)
    elif program == "supernode":
        run_supernode(float(options[0]), options[1:])
    elif program == "serverapp":
        run_server_app(*options)
    elif program == "hospital":
        serve_hospital(*options)
    elif program == "clientapp":
        (address,) = options
        run_client_app(address, sys.stdin.readline().strip())
    else:
        sys.exit(f"there is no program {program}")


if __name__ == "__main__":
    main()
