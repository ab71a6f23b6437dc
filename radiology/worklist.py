"""An archive's studies, prepared one after the other: fetched, prepared, remembered, and their files removed."""

from collections.abc import Callable, Iterable

from common import MedFLError
from radiology.archive import Preparation
from radiology.ledger import Entry, Ledger
from radiology.retrieval import FoundStudy, Missing, Retrieval


def prepare_study(study: FoundStudy, retrieval: Retrieval, preparation: Preparation, ledger: Ledger) -> Entry:
    """What became of a study; nothing is fetched where it is prepared already and did not change.

    Raises MedFLError where the archive or the disk fails; Missing where the archive has the study no more.
    """
    listed = retrieval.archive.find_series(study.uid)
    state = retrieval.state_of(listed)
    known = ledger.find(study.uid, state)
    if known is not None and (not known.name or preparation.is_whole(known.name)):
        return known
    with retrieval.fetched(study, listed) as whole:
        name, rows = preparation.prepare_one(whole)
    again = bool(whole.channels) and not name  # what could not be prepared may be once a decoder is installed
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
    """What became of each study, those that the archive no longer has left out and told.

    Raises MedFLError where nothing can go on; what is prepared until then stays, and another run goes on there.
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
