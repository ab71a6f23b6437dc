"""The parts of Flower used here that are not public API, except those of the programs (`programs.py`) and of the
SuperLink's objects (`flower_objects.py`). These names may change with Flower's version."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

MOST_ANSWER = 16 * 2**20  # bytes of a server's answer; the largest are pieces of 5 MB of an array
SERVER_APP, CLIENT_APP = "federation.server.app", "federation.hospital.app"
PYPROJECT = """[project]
name = "medfl"
version = "{version}"
[tool.flwr.app]
publisher = "medfl"
[tool.flwr.app.components]
serverapp = "{server}:app"
clientapp = "{client}:app"
"""


def name_home_where_missing() -> None:
    """Name a folder for Flower if the user, such as a service's, has no home: Flower asks for a folder when it is
    imported. Flower's programs get one of their own (`processes.environment`); this process writes nothing there."""
    try:
        Path.home()
    except RuntimeError:
        os.environ.setdefault("FLWR_HOME", str(Path.cwd() / ".flwr"))


name_home_where_missing()


def build_bundle(files: dict[str, bytes], version: str) -> bytes:
    """Flower's app bundle (FAB) of these files; the same files give the same bytes."""
    from flwr.cli.build import build_fab_from_files

    pyproject = PYPROJECT.format(version=version, server=SERVER_APP, client=CLIENT_APP)
    return build_fab_from_files({"pyproject.toml": pyproject.encode(), **files})[0]


class Control:
    """The SuperLink's Control API at `address`. ca: the certificate authority's file, if it speaks TLS."""

    def __init__(self, address: str, ca: Path | None = None):
        from flwr.supercore.control.control_http_client import ControlHttpClient

        self._client = ControlHttpClient.from_server_address(address, **transport(ca), interceptors=[])

    def submit(self, bundle: bytes) -> int:
        """Start a run of the bundle; returns the run's id."""
        from flwr.common.serde import fab_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        return self._client.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id

    def register(self, public_key: bytes, label: str) -> int:
        """Admit the holder of a key (PEM); returns the node's id."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        return self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=label)).node_id

    def unregister(self, node: int) -> None:
        """Remove a node for good."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))


def ask_admission(address: str, ca: Path, key: Path) -> str:
    """The SuperLink's verdict on a hospital's key (an OpenSSH file): "admitted", "unknown", "clock" (this machine's
    clock is wrong), or "" if it gives no answer.

    The SuperLink refuses an unknown key in the same way as a key whose former connection is still open. A request with
    an impossible heartbeat is refused too, but for another reason if the key is known.
    """
    import httpx
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    private = cast(EllipticCurvePrivateKey, load_ssh_private_key(Path(key).read_bytes(), None))
    public = private.public_key()
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(private, public),
    ]
    asked = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=0)
    try:
        with careful_client().from_server_address(
            address, **transport(ca), interceptors=interceptors
        ) as client:
            client.ActivateNode(asked)
    except httpx.HTTPStatusError as error:
        return {400: "admitted", 412: "unknown", 401: "clock"}.get(error.response.status_code, "")
    except httpx.RequestError:
        pass
    return ""


def careful_client() -> type[Any]:
    """Flower's client of a hospital, limited in what it takes of the server's answers.

    Flower's own (1.41) follows a redirect, so a server could have a hospital send requests to any machine of the
    hospital's network, in clear text as well. And it unpacks and reads answers of any length: 3 MB of gzip took 5 GB.
    """
    import httpx
    from flwr.supernode.fleet_http_client import FleetHttpClient

    class Limited(httpx.SyncByteStream):
        def __init__(self, stream: httpx.SyncByteStream):
            self.stream = stream

        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for piece in self.stream:
                if (size := size + len(piece)) > MOST_ANSWER:
                    raise httpx.DecodingError(f"The server's answer takes more than {MOST_ANSWER} bytes.")
                yield piece

        def close(self) -> None:
            self.stream.close()

    def limit(response: httpx.Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise httpx.DecodingError("The server's answer is compressed, which was not asked for.")
        response.stream = Limited(cast(httpx.SyncByteStream, response.stream))

    class CarefulClient(FleetHttpClient):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            self._client.follow_redirects = False
            self._client.headers["accept-encoding"] = "identity"
            self._client.event_hooks = {"response": [limit]}  # called before the answer's body is read

    return CarefulClient


def transport(ca: Path | str | None) -> dict:
    """The arguments that make Flower's clients speak TLS, or not."""
    return {"insecure": ca is None, "root_certificates": None if ca is None else Path(ca).read_bytes()}


class TaskSource:
    """Hands out the tasks that are waiting at a SuperLink ("flwr-serverapp") or a SuperNode ("flwr-clientapp")."""

    def __init__(self, address: str, kind: str, ca: Path | None = None):
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supercore.retry import make_simple_http_retry_invoker
        from flwr.supercore.runtime import RuntimeHttpClient

        self.kind = kind
        self._client = RuntimeHttpClient.from_server_address(
            server_address=address,
            **transport(ca),
            retry_invoker=make_simple_http_retry_invoker(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
        )

    def next_token(self) -> str | None:
        """The token of a task that now belongs to this process, or None."""
        from flwr.proto.runtime_pb2 import AcquireTaskRequest

        got = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[self.kind]))
        return got.token if got.HasField("task") and got.token else None
