# SPDX-License-Identifier: Apache-2.0
"""Failures of downloads from the Hugging Face hub, in one line. Needs the extra ``hub``."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def naming_failures(given: str) -> Iterator[Any]:
    """Yields `huggingface_hub`; its errors become a ValueError or an OSError that names `given`.

    A ValueError is of a name, a file or a revision that is not there, of a token that may not read
    it, and of the extra ``hub`` that is not installed.
    """
    try:
        import huggingface_hub as client  # noqa: PLC0415, an optional package
        from huggingface_hub import errors  # noqa: PLC0415
    except ImportError:
        raise ValueError(
            f"{given} needs the extra hub: pip install 'localglobal_jax[hub]'"
        ) from None
    try:
        yield client
    except errors.RevisionNotFoundError:
        raise ValueError(f"{given}: it has no such revision") from None
    except errors.HFValidationError as error:
        raise ValueError(f"{given}: {_line(error)}") from None
    except Exception as error:  # of its HTTP library, of the network, of the disk
        offline = isinstance(error, errors.LocalEntryNotFoundError)
        if isinstance(error, errors.EntryNotFoundError) and not offline:
            lines = [line for line in str(error).split("\n") if "Not Found" in line]
            raise ValueError(f"{given}: {(lines or [_line(error)])[-1]}") from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):  # the hub answers 401 also for what is not there
            raise ValueError(
                f"{given}: the hub answers {status}: it has no such model, or the model is "
                "private: check the name, or set HF_TOKEN to a token that may read it"
            ) from None
        raise OSError(f"{given} cannot be downloaded: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
