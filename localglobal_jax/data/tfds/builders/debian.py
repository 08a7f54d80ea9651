# SPDX-License-Identifier: Apache-2.0
"""Files of Debian packages, fetched and unpacked without root and without installing anything."""

import contextlib
import dataclasses
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

TIMEOUT = 300  # seconds for one command; the largest package we ask for has 31 MB


def fetch(packages: Sequence[str], directory: pathlib.Path) -> pathlib.Path | None:
    """Downloads `packages` and unpacks them below ``directory``, which stands for ``/``.

    None where that is impossible: no apt, no network, no such package in its index.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    directory.mkdir(parents=True, exist_ok=True)

    def run(*command: str) -> None:
        subprocess.run(  # nosec B603 # an argument list of our own words
            command, cwd=directory, check=True, capture_output=True, timeout=TIMEOUT
        )

    try:
        run("apt-get", "download", *packages)
        for path in sorted(directory.glob("*.deb")):
            run("dpkg-deb", "-x", path.name, ".")
            path.unlink()
    except (OSError, subprocess.SubprocessError):
        return None
    return directory


@dataclasses.dataclass(frozen=True)
class Files:
    """Raw files that Debian packages hold. ``config``: the name of the builder's config, or ""."""

    packages: Callable[[str], Sequence[str]]
    installed: pathlib.PurePosixPath  # where the packages put them
    locate: Callable[[str, str], Any]  # (directory, config); ValueError where files are missing

    def find(self, config: str, staging: pathlib.Path) -> str | None:
        """Returns the directory of the installed files, if none is missing, or of fetched ones."""
        with contextlib.suppress(ValueError):
            self.locate(str(self.installed), config)
            return str(self.installed)
        root = fetch(self.packages(config), staging)
        return str(root / self.installed.relative_to("/")) if root else None
