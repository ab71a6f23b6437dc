"""An archive's studies, one after the other: fetched, prepared, recorded, and their files removed."""

from collections.abc import Callable, Iterable

from common import MedFLError
from radiology.archive import Preparation
from radiology.ledger import Entry, Ledger
from radiology.retrieval import FoundStudy, Missing, Retrieval


def prepare_study(study: FoundStudy, retrieval: Retrieval, preparation: Preparation, ledger: Ledger) -> Entry:
    """The result for a study. Nothing is fetched if it was already prepared and has not changed.

    Raises MedFLError if the archive or the disk fails, Missing if the archive no longer has the study.
    """
    listed = retrieval.archive.find_series(study.uid)
    state = retrieval.state_of(listed)
    known = ledger.find(study.uid, state)
    if known is not None and (not known.name or preparation.is_whole(known.name)):
        return known
    with retrieval.fetched(study, listed) as whole:
        name, rows = preparation.prepare_one(whole)
    again = bool(whole.channels) and not name  # try again in the next run: a decoder may be installed by then
    entry = Entry(study.uid, "" if again else state, name, rows)
    ledger.add(entry)
    return entry


def prepare_studies(
    studies: Iterable[FoundStudy],
    retrieval: Retrieval,
    preparation: Preparation,
    ledger: Ledger,
    tell: Callable[[str], None],
) -> list[Entry]:
    """The results for the studies. Studies that the archive no longer has are left out and reported.

    Raises MedFLError if the run can't continue. Prepared studies stay, and another run continues from there.
    """
    entries = []
    for study in studies:
        try:
            entries.append(prepare_study(study, retrieval, preparation, ledger))
        except Missing as error:
            tell(f"{preparation.pseudonyms.name(study.patient_id, study.uid)} is left out: {error}")
        except MedFLError as error:
            raise MedFLError(f"{error} (the same command goes on here)") from error
    return entries
