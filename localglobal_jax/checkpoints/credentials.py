# SPDX-License-Identifier: Apache-2.0
"""Wrong credentials of gcsfs: one line with the variable, the file and the remedy.

gcsfs takes them from its option ``token`` (``FSSPEC_GS_TOKEN``: a file, a word such as
``google_default``, or an access token) or from ``GOOGLE_APPLICATION_CREDENTIALS``. Its own errors
are of many classes (JSONDecodeError, KeyError, requests' and google-auth's) and name neither.
"""

import contextlib
import json
import os
import pathlib
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from google.auth import exceptions
from google.oauth2 import service_account
from requests import RequestException

from localglobal_jax.checkpoints import store

GOOGLE_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
DEFAULT = "google_default"
WORDS = ("anon", "cache", "cloud", DEFAULT)  # of gcsfs, in place of a file
OF_USERS = ("refresh_token", "client_secret", "client_id")
REMEDY = (
    "Give the file of a service account's key, or log in (gcloud auth application-default login) "
    "and leave the variable out"
)


def chosen(token: Any) -> Any:
    """Returns the option ``token`` for gcsfs.

    It is ``google_default`` where only ``GOOGLE_APPLICATION_CREDENTIALS`` is set: gcsfs would take
    a damaged file for no file, and read without credentials.
    """
    on_google = store.server_of("gcsfs") == store.GOOGLE
    return DEFAULT if token is None and on_google and os.environ.get(GOOGLE_FILE) else token


@contextlib.contextmanager
def named(token: Any) -> Iterator[None]:
    """Context manager in which gcsfs loads the credentials of `token`, its option.

    Raises WrongCredentials, or StoreFailed where Google's services did not answer.
    """
    if isinstance(token, str) and not token:
        raise store.WrongCredentials(f"{_variable()} is empty. {REMEDY}")
    if _is_path(token) and not os.path.exists(token):
        raise store.WrongCredentials(f"{_variable()}={token}: there is no such file. {REMEDY}")
    try:
        yield
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        if not any(frame.f_globals["__name__"] == "gcsfs.credentials" for frame, _ in frames):
            raise  # another option is wrong
        # without its cause in a traceback: a URL in it may contain the token
        raise _error(error, token) from None


def _is_path(token: Any) -> bool:
    starts = ("/", "~", "./", "../")
    return isinstance(token, str) and (token.endswith(".json") or token.startswith(starts))


def _error(error: Exception, token: Any) -> Exception:
    reason = (str(error).splitlines() or [""])[0].rstrip(". ")[:200]
    if token == DEFAULT:
        if file := os.environ.get(GOOGLE_FILE):
            return store.WrongCredentials(f"{GOOGLE_FILE}={file}: {reason}. {REMEDY}")
        said = f"{_variable()}={token}: {reason}. "
        return store.WrongCredentials(
            f"{said}Log in (gcloud auth application-default login), or name the file of a key: "
            f"{GOOGLE_FILE}=FILE"
        )
    if token == "cloud":
        return store.StoreFailed(
            f"{_variable()}={token}: no credentials from the metadata server of this machine "
            f"({reason or type(error).__name__}). Outside Google Cloud, leave the variable out and "
            f"name the file of a key: {GOOGLE_FILE}=FILE"
        )
    if isinstance(token, str) and (token in WORDS or os.path.exists(token)):
        said = _fault(token) if token not in WORDS else ""
        return store.WrongCredentials(f"{_variable()}={token}: {said or reason}. {REMEDY}")
    if isinstance(token, Mapping):
        return store.WrongCredentials(f"{_variable()}: {_fault_of(token) or reason}. {REMEDY}")
    if isinstance(error, RequestException | exceptions.TransportError):
        return store.StoreFailed(
            f"{_variable()} is neither the name of a file here nor one of {', '.join(WORDS)}, so "
            f"it is taken for an access token, and {_server(error)} cannot be asked about it "
            f"({type(error).__name__}). Check the network, or give the file of a key"
        )
    return store.WrongCredentials(
        f"{_variable()} is neither the name of a file here nor one of {', '.join(WORDS)}, nor an "
        f"access token: {reason}. {REMEDY}"
    )


def _server(error: Exception) -> str:
    url = getattr(getattr(error, "request", None), "url", None) or ""
    return "/".join(url.split("/")[2:3]) or "oauth2.googleapis.com"


def _fault(file: str) -> str:
    """Returns the fault of a file of credentials; "" if none is found."""
    try:
        return _fault_of(json.loads(pathlib.Path(file).read_text(encoding="utf-8")))
    except OSError as error:
        return str(error.strerror)
    except ValueError as error:
        return f"it is not JSON ({error})"


def _fault_of(tree: Any) -> str:
    """Returns the fault of credentials that gcsfs does not take; "" if none is found."""
    if not isinstance(tree, Mapping):
        return "want a JSON object, as Google's tools write it"
    kind = tree.get("type", "authorized_user")
    if kind == "service_account":
        try:
            service_account.Credentials.from_service_account_info(tree)
        except Exception as error:  # also of cryptography
            return f"the key cannot be read ({str(error).splitlines()[0][:200]})"
        return ""
    if kind == "authorized_user":
        missing = [name for name in OF_USERS if not tree.get(name)]
        return f"no {', '.join(missing)}" if missing else ""
    return f"gcsfs does not take the type {kind}: name the file by {GOOGLE_FILE} instead"


def _variable() -> str:
    """Returns the name of the variable that sets gcsfs's option ``token``."""
    given = {name.upper(): name for name in os.environ}
    names = ("FSSPEC_GCS_TOKEN", "FSSPEC_GS_TOKEN", "FSSPEC_GCS", "FSSPEC_GS")
    found = next((given[name] for name in names if name in given), None)
    return found or "token in ~/.config/fsspec"
