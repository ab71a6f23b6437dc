"""The run's status page, written after every event. It shows what the terminal shows, for people who are not there."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common import MedFLError, utc_now
from federation.protocol import page
from federation.server.events import Journal
from federation.server.history import scores_of
from federation.server.judging import mean_dice

if TYPE_CHECKING:
    from federation.server.rounds import Federation

PAGE = Path("status") / "index.html"
HEAD = ("hospital", "state", "last seen", "Dice", "loss", "left out")
KEPT = 30  # events on the page
SCARCE = 10  # times the size of the run's file; less free disk is reported
NEARLY = 0.9  # share of epsilon; more is reported


class Status:
    """Writes the page into `out`, and reports when the disk is nearly full or epsilon is nearly spent."""

    def __init__(self, federation: "Federation", journal: Journal, out: Path):
        self.federation, self.journal, self.out = federation, journal, out
        self.events: list[tuple[str, str, str, str]] = []
        self.seen: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self._told: set[str] = set()

    def __call__(self, event: str, about: dict) -> None:
        """Process an event, and write the page again."""
        now = utc_now().replace("T", " ")[:19]
        who = str(about.get("hospital") or ", ".join(about.get("hospitals", ())) or "")
        why = str(about.get("why", about.get("then", "")))
        number = about.get("round")
        self.events.append((now, f"{event} {number}" if number is not None else event, who, why))
        del self.events[:-KEPT]
        for label in about.get("hospitals") or [about.get("hospital")]:
            if label and event in ("joined", "round"):
                self.seen[label] = now
        if event == "left_out":
            self.left_out[who] = f"round {number}: {why}"
        try:
            self.write(event)
        except MedFLError as error:  # a full disk ends the run where it writes a file that matters
            if "page" not in self._told:
                self.federation.say(f"no status page: {error}")
            self._told.add("page")
        if event == "round":
            self._warn()

    def write(self, event: str = "") -> None:
        """Write the page."""
        state = self.federation.state
        done, settings = state.progress, state.federation
        rounds = [row for row in done.rows if row["examples"] is not None]
        left = done.seconds / done.round * (settings.rounds - done.round) if done.round else None
        lead = f"round {done.round} of {settings.rounds}" + (
            f", about {_in_words(left)} to go" if left and event != "end" else ", over" * (event == "end")
        )
        if not settings.rounds:
            lead = "a model is scored, nothing is trained" + ", over" * (event == "end")
        facts = [
            ("updated", f"{utc_now().replace('T', ' ')[:19]} UTC"),
            ("best model", f"Dice {done.best:.3f} after round {done.best_round}" if done.best >= 0 else None),
            ("epsilon of a hospital spent", done.epsilon),
            (
                "sent and received",
                f"{_megabytes(done.rows, 'bytes_sent')}, {_megabytes(done.rows, 'bytes_received')}",
            ),
            ("peak memory of the server", _memory()),
            ("disk free", f"{shutil.disk_usage(self.out).free / 1e9:.1f} GB"),
            ("audit log's last line, SHA-256", self.journal.head),
        ]
        numbers = sorted({row["round"] for row in rounds})
        means = [
            (number - 1, mean)
            for number in numbers
            if (mean := mean_dice(scores_of([r for r in rounds if r["round"] == number]))[0]) is not None
        ]
        curve = page.curve(means, "Dice over rounds") or page.text(
            "drawn once hospitals have sent their Dice in two rounds"
        )
        sections = [
            ("The run", page.table(("", ""), facts)),
            ("Hospitals", page.table(HEAD, self._hospitals())),
            ("Validation Dice, mean over patients", curve),
            ("Events", page.table(("time (UTC)", "event", "hospital", "why"), reversed(self.events))),
        ]
        page.write_page(self.out / PAGE, "MedFL federation", lead, sections)

    def _hospitals(self) -> list[tuple]:
        """A row for each hospital that is or was there."""
        membership, done = self.federation.membership, self.federation.state.progress
        admitted, lines = membership.labels(), []
        last = {row["site"]: row for row in done.rows}
        # the last model is scored without training, so those rows have no loss
        losses = {row["site"]: row["train_loss"] for row in done.rows if row["train_loss"] is not None}
        for label in sorted({*membership.members, *done.hospitals, *self.seen}):
            member = membership.members.get(label)
            if member:
                state = (
                    "behind" if member.behind else "observes" if member.facts.role == "observe" else "present"
                )
            else:
                state = "revoked" if admitted is not None and label not in admitted.values() else "gone"
            dice, loss = last[label]["val_dice"] if label in last else None, losses.get(label)
            lines.append((label, state, self.seen.get(label), dice, loss, self.left_out.get(label)))
        return lines

    def _warn(self) -> None:
        state = self.federation.state
        if state.last.exists() and shutil.disk_usage(self.out).free < SCARCE * state.last.stat().st_size:
            self._once("disk", {"free": shutil.disk_usage(self.out).free})
        most, spent = state.federation.dp_epsilon, state.progress.epsilon
        if most and spent and spent > NEARLY * most:
            self._once("epsilon", {"spent": round(spent, 4), "of": most})

    def _once(self, event: str, about: dict) -> None:
        if event not in self._told:
            self._told.add(event)
            self.journal.tell(event, about)


def _megabytes(rows: list, name: str) -> str:
    return f"{sum(row[name] for row in rows) / 1e6:.1f} MB"


def _memory() -> str | None:
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{most / (1 if sys.platform == 'darwin' else 1 / 1024) / 1e6:.0f} MB"


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
