"""Lines on the terminal of a server or a hospital, each with its time: a federation runs for days."""

import logging
import sys

from tqdm import tqdm

from borders import escaping


class _Terminal(logging.Handler):
    """Writes above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(escaping.lines(self.format(record)), file=sys.stdout)
            sys.stdout.flush()
        except Exception:  # as logging's own handlers do: what is said never ends a run
            self.handleError(record)


def terminal() -> logging.Logger:
    """The logger whose lines are shown there."""
    log = logging.getLogger("medfl")
    if not log.handlers:
        handler = _Terminal()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False  # Flower's and Ray's loggers have handlers of their own
    return log


def say(text: str) -> None:
    """Write a text of one or more lines; the first has the time."""
    terminal().info("%s", text)
