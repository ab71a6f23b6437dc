"""Write docs/reference.md: options of every script, files, columns and exit codes, from the code.

    python docs/make_reference.py

A test holds the page against the code.
"""

import argparse
import contextlib
import importlib
import re
from pathlib import Path
from unittest import mock

from common import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_NO_QUORUM, run_script
from evaluation.comparison import COLUMNS as OF_A_COMPARISON
from federation.server.history import COLUMNS as OF_A_FEDERATION
from runs.history import HISTORY as OF_A_TRAINING
from storage.files import atomic_write

PAGE = Path(__file__).with_name("reference.md")
SCRIPTS = (
    "train_centralized",
    "evaluate",
    "cross_validate",
    "pretrain",
    "predict",
    "run_server",
    "run_client",
    "provision",
    "partition",
    "data.make_phantoms",
    "data.download",
    "data.prepare_hospital",
    "data.prepare_task",
    "data.watch_archive",
    "deployment.export_onnx",
    "deployment.serve_browser",
    "deployment.push_to_space",
)
EXITS = {
    0: "done",
    1: "a bug, with a traceback",
    EXIT_BAD_INPUT: "bad input, a refusal, a loss that is not finite, a full disk: one sentence says what to do",
    EXIT_NO_QUORUM: "too few hospitals are left, or a hospital's server is gone",
    EXIT_INTERRUPTED: "stopped by Ctrl-C or SIGTERM; everything that the next start needs was saved",
}


class _Stop(Exception):
    """A script has made its parser."""


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that a script makes."""
    found = []

    def keep(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        found.append(parser)
        raise _Stop

    script = importlib.import_module(module)
    with mock.patch.object(argparse.ArgumentParser, "parse_args", keep), contextlib.suppress(_Stop):
        getattr(script, "parse", script.main)()
    return found[0]


def options(parser: argparse.ArgumentParser) -> list[str]:
    """A table's rows: what is given, and what it means."""
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                rows += [f"| **`{name}`** | {_cell(command.description or '')} |", *options(command)]
        elif not isinstance(action, argparse._HelpAction):
            given = ", ".join(action.option_strings) or action.dest
            if action.choices:
                given += " " + "\\|".join(map(str, action.choices))
            elif action.option_strings and action.nargs != 0:
                given += f" {action.metavar or action.dest.upper()}"
            rows.append(f"| `{given}` | {_cell(action.help or '')} |")
    return rows


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("%%", "%").replace("|", "\\|"))


def page() -> str:
    """The page's text."""
    lines = [
        "# Reference",
        "",
        "Options of every script, columns of the files that runs write, and exit codes. This page is made from the "
        "code by `python docs/make_reference.py`.",
        "",
    ]
    for module in SCRIPTS:
        parser = parser_of(module)
        lines += [f"## {module.replace('.', '/')}.py", "", _cell(parser.description or ""), ""]
        lines += ["| option | meaning |", "| --- | --- |", *options(parser), ""]
    lines += ["## Columns", "", "| file | columns |", "| --- | --- |"]
    for file, names in (
        ("centralized_history.csv", OF_A_TRAINING),
        ("federated_history.csv", OF_A_FEDERATION),
        ("evaluate.py --compare … --csv", OF_A_COMPARISON),
    ):
        lines.append(f"| `{file}` | {', '.join(f'`{name}`' for name in names)} |")
    lines += [
        "",
        "In `federated_history.csv` a row is a round at a hospital (`site`). `val_dice` is of the model that the "
        "round began with; the model after the last round is scored in rows of one round more, which have no "
        "training columns.",
        "",
        "## Exit codes",
        "",
        "| code | meaning |",
        "| --- | --- |",
        *(f"| {code} | {meaning} |" for code, meaning in EXITS.items()),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    with atomic_write(PAGE, "w") as file:
        file.write(page())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    run_script(main)
