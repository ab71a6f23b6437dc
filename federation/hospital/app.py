"""The hospital's side of a federation: Flower's ClientApp. It runs in the folder that run_client.py made for
it."""

import traceback
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from federation.hospital.answering import Answers, Handle, failed
from federation.hospital.faults import HospitalError
from federation.hospital.identity import ENDED, WAITING, Identity
from federation.protocol.log import say
from federation.protocol.messages import Failure, Query, message, read
from storage.files import write_json

Before = Callable[[Message, Context, Handle], Message]


def make_app(
    folder_of: Callable[[Context], Path] = lambda context: Path(),
    before: Before = lambda incoming, context, handle: handle(incoming, context),
) -> ClientApp:
    """The app.

    Args:
        folder_of: gives a hospital's folder, where it finds who it is; run_client.py starts it there.
        before: gets each message first, with the function that handles it.
    """
    answers = Answers(folder_of)

    def keep_errors_here(incoming: Message, context: Context, handle: Handle) -> Message:
        try:
            return answers.signed(incoming, context, handle)
        except Exception:  # a kit that is gone, for instance; Flower would tell the server its path
            say(traceback.format_exc())
            return Message(message({"failure": Failure.BUG}), reply_to=incoming)

    app = ClientApp(mods=[keep_errors_here, before])
    app.query()(answers.query)
    app.train()(answers.train)
    app.evaluate()(answers.evaluate)
    return app


def app_for(code: str) -> ClientApp:
    """The app for messages of a server whose bundle has this SHA-256: this one, or, if it is not the bundle
    that the MedFL here makes, one that does nothing and says so."""
    here, waiting = Identity.load(Path()), Path() / WAITING
    if code == here.code:
        if waiting.exists():
            for path in (waiting, Path() / ENDED):
                path.unlink(missing_ok=True)
        return app

    def refuse(incoming: Message, context: Context, handle: Handle) -> Message:
        about = read(incoming.content)
        if about.get("query") == Query.END:
            return handle(incoming, context)
        versions = about.get("versions")
        versions = versions if isinstance(versions, dict) else {}
        theirs = version_in_words(str(versions.get("medfl", "unknown"))[:32], versions.get("commit"), code)
        sentence = (
            f"the server's code is {theirs} and the one installed here is "
            f"{version_in_words(here.medfl, here.commit, here.code)}; nothing of it was run; install the server's "
            "version here, after a look at what changed, or ask the coordinator"
        )
        new = not waiting.exists()
        write_json(waiting, {"sentence": sentence})
        if new:
            raise HospitalError(Failure.CODE, sentence)
        return Message(message(failed(Failure.CODE, here)), reply_to=incoming)

    return make_app(before=refuse)


def version_in_words(version: str, commit: object, code: str) -> str:
    """A MedFL by its version, its commit and what it runs at a hospital."""
    of = f"commit {str(commit)[:12]}, " if commit else ""
    return f"MedFL {version} ({of}code {code[:12]}...)"


app = make_app()
