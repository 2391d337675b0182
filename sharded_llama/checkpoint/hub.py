"""Hugging Face hub names: `org/name` becomes the folder of its downloaded snapshot.

The cache, its locks and the transfers are those of huggingface_hub (the extra `hub`), with its environment: HF_HOME,
HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and the others
(https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables). Of a repository only the files
that this package reads are downloaded. Their names are fixed, or plain names from the index of the weights: whatever
a repository calls its files, none of them is written outside its snapshot.
"""

import errno
import glob
import os
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging

from ..errors import CheckpointError
from ..hf_config import GENERATION_CONFIG
from ..meta_config import PARAMS
from .hf.safetensors import INDEX_FILE, SINGLE_FILE, read_index
from .hf.writer import CONFIG
from .source import shorten

TEXT_FILES = (  # that a checkpoint may have beside its weights
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
LIKE_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")  # to say what is there

ANSWER_SECONDS = 20  # to wait for the hub
ANSWER_SECONDS_IF_CACHED = 5

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*))?", re.ASCII)
_META_WEIGHTS = re.compile(r"consolidated\.\d+\.pth", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _Repo:
    """A repository of the hub, at a branch, tag or commit; None is its main branch."""

    id: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


def resolve(name: str | Path, *, progress: bool = True) -> Path:
    """The folder of a checkpoint: `name` itself if it exists, else the snapshot of the hub repository `name`.

    A repository is a str `org/name`, or `org/name@revision` with a branch, a tag or a commit (a name without slashes).
    A Path, and a str with another form (./org/name, /a/b, a/b/c), is a folder and never goes to the network.

    A snapshot has the repository's config, tokenizer files and weights: model.safetensors, else the shards that the
    index names, else Meta's params.json and consolidated.*.pth. What the cache has is not downloaded again. With a
    complete snapshot in the cache the hub is only asked whether there is a newer one, and where it does not answer
    the cached one is used; a commit that is in the cache needs no network at all. Several processes may resolve the
    same name at once. `progress` shows bars when standard error is a terminal.

    Raises CheckpointError, saying what to do, when there is neither such a folder nor such a repository,
    huggingface_hub is not installed, access is refused, the repository has no weights of a known format, or the
    snapshot cannot be downloaded completely.
    """
    if os.path.lexists(name):
        return Path(name)
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise CheckpointError(f"{name} is not a folder.")
    repo = _Repo(*match.groups())
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as e:
        raise CheckpointError(
            f"{repo} is not a folder; to get it from the Hugging Face hub: pip install 'sharded_llama[hub]'."
        ) from e
    try:
        return _resolve(repo, show=progress and sys.stderr.isatty())
    except CheckpointError:
        raise
    except Exception as e:  # the library raises what its transports raise: httpx, httpx2, hf_xet's RuntimeError
        raise CheckpointError(_explain(repo, e)) from e


def _resolve(repo: _Repo, *, show: bool) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    folder, lacking = _cached(repo)
    complete = folder if not lacking else None
    if complete and complete.name == repo.revision:  # a commit never changes
        return complete
    seconds = ANSWER_SECONDS_IF_CACHED if complete else ANSWER_SECONDS
    try:
        info = HfApi().model_info(repo.id, revision=repo.revision, timeout=seconds)
    except Exception as e:
        if complete is None:
            raise
        level = logging.INFO if isinstance(e, OfflineModeIsEnabled) else logging.WARNING
        logging.log(level, "Using %s from the cache, which may be outdated: %s", repo, _reason(e))
        return complete
    if not _COMMIT.fullmatch(info.sha or ""):  # it becomes the name of a folder
        raise CheckpointError(f"{HfApi().endpoint} does not answer like a Hugging Face hub; check HF_ENDPOINT.")
    files = {file.rfilename for file in info.siblings or ()}
    if complete and complete.name == info.sha and not _lacking(complete, files):
        return complete
    return _download(repo, files, show=show)


def _download(repo: _Repo, files: Collection[str], *, show: bool) -> Path:
    """The snapshot of a repository that has `files`, made complete."""
    if not _has_weights(files):
        has = sorted(file for file in files if file.endswith(LIKE_WEIGHTS)) or sorted(files) or ["no files"]
        raise CheckpointError(
            f"{repo} has no weights that can be read: neither {SINGLE_FILE} nor {INDEX_FILE} at its top level, nor "
            f"Meta's {PARAMS} with consolidated.*.pth. It has {shorten(has)}."
        )
    # By branch or tag, so that the cache remembers which commit it stands for; the weights of the same commit after.
    folder = _fetch(repo.id, repo.revision, _text_files(files), show=show)
    weights = _weights(folder, files)
    absent = sorted(set(weights) - set(files))
    if absent:
        raise CheckpointError(f"{repo}: {INDEX_FILE} names files that the repository does not have: {shorten(absent)}.")
    _fetch(repo.id, folder.name, weights, show=show)
    lacking = _lacking(folder, files)
    if lacking:
        raise CheckpointError(f"{repo}: was not downloaded completely, it lacks {shorten(lacking)}; run it again.")
    return folder


def _fetch(repo_id: str, revision: str | None, files: Iterable[str], *, show: bool) -> Path:
    """The snapshot, in which those of `files` that the repository has are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Quiet(tqdm):
        """Shows nothing: some bars of the library also appear in a pipe."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **(kwargs | {"disable": True}))

    patterns = [glob.escape(file) for file in files]
    return Path(
        snapshot_download(repo_id, revision=revision, allow_patterns=patterns, tqdm_class=None if show else Quiet)
    )


def _cached(repo: _Repo) -> tuple[Path | None, list[str]]:
    """The snapshot that is in the cache, complete or not, and what it lacks. No network."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    find = {"repo_id": repo.id, "revision": repo.revision}
    try:
        folder = Path(huggingface_hub.snapshot_download(**find, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None, ["all files"]
    try:
        files = {file.path for file in huggingface_hub.get_cached_repo_tree(**find)}
    except Exception:  # an older library, or a snapshot that was made file by file: what is there must suffice
        files = set(os.listdir(folder))
        files |= {CONFIG} if PARAMS not in files else set()
    try:
        return folder, _lacking(folder, files)
    except CheckpointError:  # a newer commit may be better
        return folder, [f"a valid {INDEX_FILE}"]


def _lacking(folder: Path, files: Collection[str]) -> list[str]:
    """The files that the snapshot of a repository that has `files` lacks."""
    lacking = [file for file in _text_files(files) if not (folder / file).exists()]
    if lacking:  # perhaps the index
        return lacking
    weights = _weights(folder, files)
    return [file for file in weights if not (folder / file).exists()] if weights else ["weights"]


def _has_weights(files: Collection[str]) -> bool:
    return SINGLE_FILE in files or INDEX_FILE in files or _is_meta(files)


def _is_meta(files: Collection[str]) -> bool:
    return PARAMS in files and any(_META_WEIGHTS.fullmatch(file) for file in files)


def _text_files(files: Collection[str]) -> list[str]:
    """What is needed beside the weights, of the files of a repository."""
    wanted = list(TEXT_FILES)
    if SINGLE_FILE not in files:
        wanted.append(INDEX_FILE if INDEX_FILE in files else PARAMS)
    return [file for file in wanted if file in files]


def _weights(folder: Path, files: Collection[str]) -> list[str]:
    """The files with the weights, of a repository that has `files` and whose other files are in `folder`."""
    if SINGLE_FILE in files:  # what opens the snapshot prefers it too
        return [SINGLE_FILE]
    if INDEX_FILE not in files:
        return sorted(file for file in files if _META_WEIGHTS.fullmatch(file)) if _is_meta(files) else []
    return sorted(read_index(folder / INDEX_FILE))  # names of .safetensors files: no paths, pickles or programs


def _explain(repo: _Repo, error: Exception) -> str:
    """What went wrong with `repo`, and what to do."""
    from huggingface_hub import HfApi, constants, errors

    log_in = "`hf auth login`, or a token in HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    code = getattr(error, "errno", None)
    if isinstance(error, errors.HFValidationError):
        return f"{repo} is not a folder, and no repository of the Hugging Face hub can have this name."
    if isinstance(error, errors.GatedRepoError):
        page = f"{HfApi().endpoint}/{repo.id}"
        return f"{repo} is gated: accept its licence at {page}, and log in with the account that did ({log_in})."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo}: neither a folder nor a repository of the Hugging Face hub of this name exists. If it is a "
            f"private repository, log in with an account that may read it ({log_in})."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo}: the repository {repo.id} has no revision {repo.revision or 'main'}."
    if isinstance(error, errors.DisabledRepoError):
        return f"{repo}: the hub has disabled this repository."
    if status in (401, 403):
        return f"{repo}: the hub refuses access: {_reason(error)}. Check the token: {log_in}."
    if code in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{repo}: the disk of {constants.HF_HUB_CACHE} is full. Free some space, or set HF_HOME to a folder of "
            "another disk; files that are complete are kept."
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"{repo}: the cache cannot be written: {_reason(error)}. Set HF_HOME to a folder that can."
    elsewhere = f"hf download {repo.id}{f' --revision {repo.revision}' if repo.revision else ''} --local-dir FOLDER"
    return (
        f"{repo} is not a folder, and it cannot be downloaded from {HfApi().endpoint}: {_reason(error)}. "
        f"{_state(repo)} Run it again when the hub can be reached (files that are complete are kept), or download it "
        f"elsewhere (`{elsewhere}`), copy the folder here, and give its path."
    )


def _state(repo: _Repo) -> str:
    """What the cache has of a repository, as a sentence."""
    try:
        folder, lacking = _cached(repo)
    except Exception as e:
        return f"The cache cannot be read: {_reason(e)}."
    if folder is None:
        return "The cache does not have it."
    return f"The cache has only a part of it: it lacks {shorten(lacking)}."


def _reason(error: Exception) -> str:
    """The first line of an error of the library, or of what caused it."""
    text = str(error.__cause__ or error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    return first.rstrip(".")[:300]
