"""Cases that a user may upload, and the app's folder where its modules find each other."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def picture():
    """A function that makes the bytes of a picture: pixels or a mode and a size, and Pillow's options."""

    def make(pixels=None, kind: str = "PNG", mode: str | None = None, size=(32, 32), **options) -> bytes:
        image = Image.fromarray(pixels) if pixels is not None else Image.new(mode, size)
        file = io.BytesIO()
        image.save(file, format=kind, **options)
        return file.getvalue()

    return make


@pytest.fixture
def zipped():
    """A function that packs (name, bytes) into a ZIP."""

    def make(files) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files:
                archive.writestr(name, content)
        return file.getvalue()

    return make


@pytest.fixture
def slices(picture):
    """(name, bytes) of 12 unpadded slices of one patient, told apart by their brightness."""
    return [(f"anna_{k}.png", picture(np.full((32, 32, 3), 10 * k, np.uint8))) for k in range(1, 13)]
