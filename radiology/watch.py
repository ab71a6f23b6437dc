"""The watch of a worker over an archive: it finds studies that are new or changed and seem to be complete, and records
the results."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from common import MedFLError
from radiology.ledger import Entry, Ledger
from radiology.retrieval import (
    Archive,
    Denied,
    FoundSeries,
    FoundStudy,
    Query,
    Retrieval,
    Unreachable,
    ordered,
)

Deal = Callable[[FoundStudy, list[FoundSeries]], Entry]


@dataclass
class _Seen:
    """A study that may still be arriving. state: its digest; since: when this state was first seen (monotonic s)."""

    state: str
    since: float


class Watch:
    """Processes each matching study when it has not changed for `quiet` seconds, once for each state.

    deal: processes a study; its entry is recorded. tell: takes a sentence, which names no patient and no number.
    """

    def __init__(
        self,
        retrieval: Retrieval,
        query: Query,
        ledger: Ledger,
        quiet: float,
        deal: Deal,
        tell: Callable[[str], None],
        about: str = "",
    ):
        self._retrieval, self._query, self._ledger, self._quiet = retrieval, query, ledger, quiet
        self._deal, self._tell, self._about = deal, tell, about
        self._waiting: dict[str, _Seen] = {}

    @property
    def waiting(self) -> int:
        """The number of studies that may still be arriving."""
        return len(self._waiting)

    def look(self) -> int:
        """Process the studies that are due, and return their number. Raises Unreachable if the archive does
        not answer; the next query continues."""
        archive: Archive = self._retrieval.archive
        dealt = 0
        studies = ordered(archive.find_studies(self._query))
        self._waiting = {
            study.uid: self._waiting[study.uid] for study in studies if study.uid in self._waiting
        }
        for study in studies:
            listed = archive.find_series(study.uid)
            state = f"{self._about} {self._retrieval.state_of(listed)}".strip()
            if self._ledger.find(study.uid, state) is not None:
                self._waiting.pop(study.uid, None)
            elif self._is_quiet(study.uid, state):
                self._ledger.add(self._outcome(study, listed, state))
                self._waiting.pop(study.uid, None)
                dealt += 1
        return dealt

    def _is_quiet(self, uid: str, state: str) -> bool:
        now = time.monotonic()
        seen = self._waiting.get(uid)
        if seen is None or seen.state != state:
            seen = self._waiting[uid] = _Seen(state, now)
        return now - seen.since >= self._quiet

    def _outcome(self, study: FoundStudy, listed: list[FoundSeries], state: str) -> Entry:
        """The result for a study. A study that can't be used is recorded too, and not tried again until it changes.
        Raises Denied, Unreachable, and MedFLError for a fault of this machine."""
        try:
            made = self._deal(study, listed)
        except (Denied, Unreachable):
            raise
        except MedFLError as error:
            if isinstance(error.__cause__, OSError):  # a full disk is not the study's fault
                raise
            self._tell(
                f"a study is left out; {self._ledger.file.name} says why"
            )  # the reason can quote its headers
            return Entry(study.uid, state, why=str(error))
        return Entry(study.uid, state, made.name, made.rows, made.why)
