"""New checkpoint folders: filled under another name and renamed, so that they are complete or not there at all."""

import os
import shutil
from pathlib import Path

from absl import logging

from ..errors import CheckpointError
from ..hf_config import GENERATION_CONFIG
from ..json_file import read_json_object, write_json
from ..tokenizer import tokenizer_files


def new_folder(name: str | os.PathLike[str]) -> Path:
    """The place of a new folder, symbolic links resolved. Raises CheckpointError when something is there already."""
    folder = Path(os.path.realpath(name))
    try:
        if os.path.ismount(folder):
            raise CheckpointError(f"{folder} is where a disk is mounted; name a new folder in it.")
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} already exists; choose a new folder to write to.")
    except OSError as e:
        raise CheckpointError(f"{folder}: cannot be written: {e}") from e
    return folder


def side_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The tokenizer's files in a checkpoint folder, and the sampling defaults."""
    try:
        return [*tokenizer_files(folder), *(file for file in [Path(folder) / GENERATION_CONFIG] if file.is_file())]
    except OSError as e:
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: {e}") from e


def check_tokenizer(folder: str | os.PathLike[str]) -> None:
    """Raises CheckpointError when `folder` has no tokenizer to copy."""
    if all(file.name == GENERATION_CONFIG for file in side_files(folder)):
        raise CheckpointError(f"{folder} holds no tokenizer.")


def copy_side_files(files: list[Path], target: Path, eos_ids: tuple[int, ...]) -> None:
    """Copies `files`; sampling defaults that name other end-of-sequence ids would replace those of the config."""
    for file in files:
        shutil.copyfile(file, target / file.name)
        if file.name == GENERATION_CONFIG:
            settings = read_json_object(file, CheckpointError)
            stated = settings.get("eos_token_id")
            if stated is not None and eos_ids and stated not in (list(eos_ids), *eos_ids[: len(eos_ids) == 1]):
                ids = eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
                write_json(target / file.name, settings | {"eos_token_id": ids})


def make_partial(folder: Path, marker: str) -> Path:
    """Makes the folder, named `folder` + `marker` + this process, that becomes `folder` when it is complete."""
    _remove_leftovers(folder, marker)
    partial = folder.with_name(f"{folder.name}{marker}-{_host()}-{os.getpid()}")
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, folder: Path) -> None:
    """Gives the folder its name when all that is in it is on the disk."""
    for path in [*(file for file in partial.rglob("*") if not file.is_symlink()), partial]:
        sync(path)
    partial.rename(folder)
    try:
        sync(folder.parent)
    except OSError as e:  # the folder is there; only a power cut could still take its name away
        logging.warning("%s: its entry could not be flushed to the disk: %s", folder, e)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _host() -> str:
    return os.uname().nodename


def _remove_leftovers(folder: Path, marker: str) -> None:
    """Removes what runs of this machine that were killed left of the same folder."""
    prefix = f"{folder.name}{marker}-{_host()}-"
    for leftover in folder.parent.iterdir() if folder.parent.is_dir() else ():
        pid = leftover.name.removeprefix(prefix)
        if leftover.name.startswith(prefix) and pid.isascii() and pid.isdigit() and not _is_another_process(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_another_process(pid: int) -> bool:
    """Whether a process other than this one has the number; in containers every run may have the same."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
