"""The bundle of code that the server sends to the hospitals: what both apps import of this repository, and
nothing else."""

from common import ROOT, __version__, files_needed
from federation.runtime.flower import CLIENT_APP, SERVER_APP, build_bundle


def make_bundle() -> bytes:
    """The bundle; the same files give the same bytes. Text files travel with line feeds, whatever the
    checkout has."""
    names = ["LICENSE", *files_needed(*(app.replace(".", "/") + ".py" for app in (SERVER_APP, CLIENT_APP)))]
    return build_bundle(
        {name: (ROOT / name).read_bytes().replace(b"\r\n", b"\n") for name in names}, __version__
    )
