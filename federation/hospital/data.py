"""A hospital's data in a federation: its scans, and which of its patients train, validate and test."""

from pathlib import Path

from common import counted
from dataset import Dataset, load_dataset
from federation.hospital.identity import Identity
from federation.hospital.pretraining import scans_without_masks
from federation.protocol.answers import Images, Part
from federation.protocol.settings import FederationSettings
from partition import make_partition
from split import PARTS, make_split, split_for


class HospitalData:
    """A hospital's scans and their split. Raises MedFLError for data that can't be used.

    Attributes: dataset; split: of this hospital's patients; split_sha256, partition_sha256: of the whole
    dataset where it is divided, None with own data, because a hash of own patients' names would say something
    of them; unlabelled: the slices of the volumes that pretraining sees, None where masks are learnt from.
    """

    dataset: Dataset
    split_sha256: str | None = None
    partition_sha256: str | None = None
    unlabelled: list[list[Path]] | None = None

    def __init__(self, identity: Identity, settings: FederationSettings, seed: int):
        self.dataset = load_dataset(
            identity.data,
            identity.label if identity.own_data else None,
            progress=False,
            mask_suffix=identity.mask_suffix,
        )
        sites = {p.name: p.site for p in self.dataset.patients}
        fractions = (settings.val_fraction, settings.test_fraction)
        if identity.cid is None:
            self.split = split_for(identity.file("split.json"), sites, seed, *fractions)
        else:
            split = make_split(sites, seed, *fractions)
            partition = make_partition(
                self.dataset.table, split, settings.partition, settings.clients, settings.alpha, seed
            )
            self.split = partition.hospitals[identity.cid]
            self.split_sha256, self.partition_sha256 = split.sha256(), partition.sha256()
        if settings.pretraining:
            self.unlabelled = scans_without_masks(identity, self.split)

    def without_tumour(self) -> str | None:
        """A sentence where no mask that trains here shows tumour, as it can be in a share of a dataset."""
        train = self.split.train
        if not train or self.unlabelled or self.dataset.with_tumour(train):
            return None
        return (
            f"note: no mask of the {counted(len(train), 'patient')} that train here shows tumour, so this hospital can "
            "only teach what is none; look at the _mask files, or choose another partition"
        )

    def parts(self) -> dict[str, Part]:
        """How many patients and slices each part of the split has. Pretraining learns from volumes without masks,
        and scores none."""
        if self.unlabelled:
            learnt = Part(patients=len(self.unlabelled), slices=sum(map(len, self.unlabelled)))
            none = Part(patients=0, slices=0)
            return {"train": learnt, "val": none, "test": none}
        slices = self.dataset.table.set_index("patient")["slices"]
        return {
            part: Part(
                patients=len(self.split.part(part)), slices=int(slices[list(self.split.part(part))].sum())
            )
            for part in PARTS
        }

    def images(self) -> Images | None:
        """What the training images look like on average; None of too few patients."""
        return self.dataset.image_statistics(self.split.train)
