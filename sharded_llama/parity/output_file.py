"""Files that a comparison writes: complete, or not there."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import ParityError


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Gives another name in the same folder, and renames what was written there to `file` when the block ends.

    An error or interrupt leaves nothing new, and what was there as it was. Raises ParityError when nothing can be
    written there.
    """
    if file.is_dir():
        raise ParityError(f"{file}: is a folder; name a file.")
    temporary = file.parent / f"{file.name}.{os.getpid()}.tmp"
    try:
        with naming(file):
            temporary.touch()  # so that it shows before anything is computed
        yield temporary
        with naming(file):
            os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def check_writable(file: Path) -> None:
    """Raises ParityError, before anything is computed, when `file` could not be written in the end."""
    if not file.absolute().parent.is_dir():
        raise ParityError(f"{file}: its folder does not exist.")
    if file.exists() and not file.is_file():
        raise ParityError(f"{file} is a folder or a device; name a file.")
    try:
        with tempfile.TemporaryFile(dir=file.absolute().parent):  # rights alone do not tell
            pass
    except OSError as error:
        raise ParityError(f"{file}: its folder cannot be written to: {error.strerror or error}.") from error


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Turns an OSError into a ParityError that names the file to be written."""
    try:
        yield
    except OSError as e:
        raise ParityError(f"{file}: cannot be written: {e.strerror or e}.") from e
