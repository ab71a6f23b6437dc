"""Tasks: a task says what is segmented. It is a small file in this folder, and a dataset may carry its own.

name           of the file, and for --task
title          of the dataset, in tables and on cards
region         what is outlined, in the words of pages and tables: "tumour", "hippocampus"
channels       one to three; one fills all three of the network's input
labels         values of a mask that mark the region; several are taken together
classes        parts of the region, each with its name and its share of the labels, for models that outline each by
               itself (optional)
site           regular expression of a patient's name whose group is the site's code (optional)
normalisation  of the pixels; there is only one (preprocessing.py)
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

import preprocessing
from common import MedFLError
from storage.files import text_of

FOLDER = Path(__file__).parent
NAME = "task.toml"  # in a dataset's folder
DEFAULT = "lgg"
MOST_BYTES = 10_000  # of a task file
MOST_LETTERS = 200  # of a patient's name; the site is looked for in these
MOST_CLASSES = 8
# A regular expression comes with a dataset, and some take for ever on a name of 50 letters: those that repeat a group,
# or leave many choices.
REPEATED_GROUP, CHOICES, MOST_CHOICES = re.compile(r"\)[*+{]"), re.compile(r"[*+{|]|(?<!\()\?"), 3


class RegionClass(BaseModel):
    """A part of the region, with the values of a mask that mark it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z]([A-Za-z0-9 -]{0,28}[A-Za-z0-9])?$")
    labels: tuple[int, ...] = Field(min_length=1, max_length=255)


class Task(BaseModel):
    """A task file's content."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,30}$")
    title: str = Field(min_length=1, max_length=60)
    region: str = Field(min_length=1, max_length=30)
    channels: tuple[Annotated[str, Field(max_length=30)], ...] = Field(min_length=1, max_length=3)
    labels: tuple[int, ...] = Field(min_length=1, max_length=255)
    classes: tuple[RegionClass, ...] = Field(default=(), max_length=MOST_CLASSES)
    site: str | None = Field(default=None, max_length=1_000)
    normalisation: str = Field(max_length=60)

    @field_validator("title", "region", "channels")
    @classmethod
    def _printable(cls, text: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not "".join(text).isprintable():
            raise ValueError("holds characters that can't be printed")
        return text

    @field_validator("labels")
    @classmethod
    def _labels(cls, labels: tuple[int, ...]) -> tuple[int, ...]:
        if not all(0 < label <= 255 for label in labels):
            raise ValueError("labels must be from 1 to 255; 0 marks what is not outlined")
        return labels

    @field_validator("site")
    @classmethod
    def _site(cls, site: str | None) -> str | None:
        try:
            groups = 1 if site is None else re.compile(site).groups
        except re.error as error:
            raise ValueError(f"site is no regular expression ({error})") from error
        if groups != 1:
            raise ValueError("site must have one group, which is the site's code")
        if REPEATED_GROUP.search(site or "") or len(CHOICES.findall(site or "")) > MOST_CHOICES:
            raise ValueError(
                f"site repeats its group, or leaves more than {MOST_CHOICES} choices: it could take for ever"
            )
        return site

    @field_validator("normalisation")
    @classmethod
    def _normalisation(cls, name: str) -> str:
        if name != preprocessing.DESCRIPTION["name"]:
            raise ValueError(f"normalisation must be {preprocessing.DESCRIPTION['name']}")
        return name

    @model_validator(mode="after")
    def _classes_are_the_region(self) -> "Task":
        labels = [label for one in self.classes for label in one.labels]
        names = {one.name.lower() for one in self.classes}
        if self.classes and (sorted(labels) != sorted(set(self.labels)) or len(names) != len(self.classes)):
            raise ValueError("classes must have different names, and hold each of the labels once")
        if len(self.classes) == 1:
            raise ValueError("one class is the region itself; leave classes out")
        return self

    @property
    def outlines(self) -> tuple:
        """What is outlined, and in which images. If two tasks differ in this, their models outline different things."""
        return self.region, self.channels, self.labels, self.classes, self.normalisation

    @property
    def numbers(self) -> dict[int, int]:
        """The number of the class, from 1, of each label; empty if the region has no classes."""
        return {label: number for number, one in enumerate(self.classes, start=1) for label in one.labels}

    def site_of(self, patient: str) -> str | None:
        """The site's code in a patient's name, or None."""
        found = re.match(self.site, patient[:MOST_LETTERS]) if self.site else None
        return found[1] if found else None


LGG = Task(  # the content of tasks/lgg.toml, which a bundle and a page do not hold
    name=DEFAULT,
    title="LGG MRI segmentation",
    region="tumour",
    channels=preprocessing.CHANNELS,
    labels=(255,),
    site="^TCGA_([A-Z]{2})_",
    normalisation=str(preprocessing.DESCRIPTION["name"]),
)


def stored(task: Task | None) -> dict | None:
    """A task as a checkpoint holds it."""
    return task.model_dump(mode="json") if task else None


def of_all(task: Task | None) -> Task | None:
    """What the tasks of a federation's hospitals have in common: what is outlined. Name, title and sites are of one
    dataset."""
    return task and task.model_copy(update={"name": "own", "title": "own data", "site": None})


def read_task(path: Path) -> Task:
    """The task in a file. Raises MedFLError for a file that can't be read or holds a wrong value."""
    try:
        return Task(**tomllib.loads(text_of(path, most=MOST_BYTES)))
    except OSError as error:
        raise MedFLError(f"there is no task file {path}; the ones that come with MedFL: {known()}") from error
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            # only the classes are checked together with another entry, and then there is no place
            where = ".".join(map(str, first["loc"])) or "classes"
            raise MedFLError(
                f"{path}: {where}: {first['msg']}; correct it (tasks/lgg.toml shows one)"
            ) from error
        raise MedFLError(f"{path} is no task file ({error}); tasks/lgg.toml shows one") from error


def named_task(name: str) -> Task:
    """The task with that name, or in the file at that path."""
    return read_task(FOLDER / f"{name}.toml" if re.fullmatch(r"[a-z0-9-]+", name) else Path(name))


def known() -> str:
    """The names of the tasks that come with MedFL."""
    return ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))


def task_of(root: Path) -> Task | None:
    """The task that a dataset's folder carries, or None."""
    path = root / NAME
    return read_task(path) if path.exists() else None
