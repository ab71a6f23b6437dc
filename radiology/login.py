"""The login for an archive: token, password or client certificate, from a file or a prompt.

    token = "..."                                            a bearer token, or
    user = "..."                                             user and password
    password = "..."
    certificate = "client.pem"                               a client certificate and its key, with either or alone
    key = "client.key"
    authority = "hospital-ca.pem"                            the CA of the archive's certificate, if it is not public

No secret appears in a command line, message or file of MedFL.
"""

import getpass
import os
import ssl
import stat
import tomllib
from pathlib import Path
from typing import Any

import requests
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, model_validator
from requests.auth import HTTPBasicAuth

from common import MedFLError
from storage.files import text_of

PROMPT = "ask"  # instead of a file's name


class Login(BaseModel):
    """The login for an archive. Paths are absolute. Without an entry, the archive is used without a login."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    token: SecretStr | None = None
    user: str | None = None
    password: SecretStr | None = None
    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> "Login":
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password belong together")
        if self.token is not None and self.user is not None:
            raise ValueError("a token or a user, not both")
        if self.key is not None and self.certificate is None:
            raise ValueError("the key has no certificate")
        return self

    def session(self) -> requests.Session:
        """An HTTP session that uses this login. Certificates are always verified."""
        session = requests.Session()
        session.trust_env = False  # use no proxy, ~/.netrc or authorities from the environment
        session.auth = self._sign
        session.verify = str(self.authority) if self.authority else True
        if self.certificate:
            session.cert = (str(self.certificate), str(self.key)) if self.key else str(self.certificate)
        return session

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """The `auth` of requests, which removes the login if an archive redirects to another host."""
        if self.token is not None:
            request.headers["Authorization"] = f"Bearer {self.token.get_secret_value()}"
        elif self.user is not None and self.password is not None:
            HTTPBasicAuth(self.user.encode(), self.password.get_secret_value().encode())(request)
        return request

    def tls(self) -> ssl.SSLContext | None:
        """A TLS context for DIMSE, or None if the login names neither a certificate nor an authority."""
        if not (self.certificate or self.authority):
            return None
        return self._context(ssl.Purpose.SERVER_AUTH)

    def listening_tls(self) -> ssl.SSLContext | None:
        """The same for our own port, to which an archive sends by C-MOVE: the archive must present a certificate from
        the login's authority. Raises MedFLError if the login has no certificate of our own or no authority."""
        if not (self.certificate or self.authority):
            return None
        if not (self.certificate and self.authority):
            raise MedFLError(
                "with --move-port over TLS the archive connects to us, so the login needs certificate, key "
                "and authority; add the missing ones, or leave out --move-port"
            )
        context = self._context(ssl.Purpose.CLIENT_AUTH)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(purpose, cafile=self.authority)
            if self.certificate:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise MedFLError(
                "the login's certificates can't be used; check that they are PEM files"
            ) from error
        return context


def read_login(source: str | None) -> Login:
    """The login from a file, or from a prompt if `source` is "ask". Raises MedFLError for a file that is missing, that
    others can read, or that has other content."""
    if source is None:
        return Login()
    if source == PROMPT:
        return _ask()
    path = Path(source)
    try:
        if os.name != "nt" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise MedFLError(
                f"{path} can be read by others, but gives access to the archive; chmod 600 {path}"
            )
        content: dict[str, Any] = tomllib.loads(text_of(path))
        for name in {"certificate", "key", "authority"} & content.keys():
            content[name] = (path.parent / str(content[name])).resolve()
            if not content[name].is_file():
                raise MedFLError(f"{path} names the {name} {content[name]}, which does not exist; correct it")
        return Login(**content)
    except OSError as error:
        raise MedFLError(
            f"the login {path} can't be read ({error.strerror or error}); check --login"
        ) from error
    except ValidationError as error:  # its own text is long; it does not show the inputs
        first = error.errors()[0]
        about = ".".join(map(str, first["loc"])) or first["msg"].removeprefix("Value error, ")
        raise MedFLError(
            f"the login {path} is wrong at: {about}; docs/archive.md shows its content"
        ) from error
    except ValueError:  # from TOML; its message can quote a secret
        raise MedFLError(f"the login {path} is not TOML; docs/archive.md shows its content") from None


def _ask() -> Login:
    try:
        return Login(user=input("user at the archive: "), password=SecretStr(getpass.getpass("password: ")))
    except EOFError as error:
        raise MedFLError("there is no terminal to ask for the password; name a file with --login") from error
