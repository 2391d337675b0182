"""A small Hugging Face hub on this machine, and processes that resolve names on it.

huggingface_hub reads its environment when it is imported. So every use of it has a process of its own; they are forked
from one that has imported the rest.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from urllib.parse import unquote, urlsplit

from launchers import FORKS

from sharded_llama.checkpoint import hub
from sharded_llama.errors import CheckpointError

GOOD_TOKEN, STRANGERS_TOKEN = "hf_good", "hf_stranger"


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@dataclass
class FakeRepo:
    """One repository with one commit."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False

    @property
    def commit(self) -> str:
        return _sha1(json.dumps({file: _sha1(data) for file, data in self.files.items()}).encode())


def from_folder(folder: Path, **more: bytes) -> FakeRepo:
    """The files of a folder as a repository, and more of them."""
    return FakeRepo({file.name: file.read_bytes() for file in folder.iterdir()} | more)


@dataclass
class FakeHub:
    """What the server has, what it was asked, and how it fails."""

    repos: dict[str, FakeRepo]
    url: str = ""
    requests: list[str] = field(
        default_factory=list
    )  # "GET /org/name/resolve/COMMIT/file", "... bytes=5-" with a range
    cuts: dict[str, list[int]] = field(default_factory=dict)  # file -> after how many bytes each GET breaks off
    stalls: dict[str, threading.Event] = field(default_factory=dict)  # file -> set once half of it was sent; it hangs
    silent: threading.Event = field(default_factory=threading.Event)  # set: requests are accepted and never answered
    stopped: threading.Event = field(default_factory=threading.Event)

    def fetched(self, repo: str) -> list[str]:
        """The files of `repo` that were fetched, once for each time."""
        found = (re.fullmatch(rf"GET /{repo}/resolve/[^/]+/(\S+)( .*)?", request) for request in self.requests)
        return sorted(match[1] for match in found if match)


@contextlib.contextmanager
def serve(repos: dict[str, FakeRepo]) -> Iterator[FakeHub]:
    """Serves `repos` at the hub's `url` until the block ends."""
    hub = FakeHub(repos)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """The part of the API that huggingface_hub asks for when it downloads: info, tree, and files."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for the acknowledgement of its headers
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        span = self.headers.get("Range")
        if re.match(r"/api/models/|/[^/]+/[^/]+/resolve/", path):
            self.hub.requests.append(f"{self.command} {path}" + (f" {span}" if span else ""))
        if self.hub.silent.is_set():
            self.hub.stopped.wait()
            self.close_connection = True
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", GOOD_TOKEN, STRANGERS_TOKEN):
            self._refuse(401, None, "Invalid credentials in Authorization header")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._api(token, *match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(token, *match.groups())
        else:
            self._refuse(404, None, "Not Found")

    def _find(self, token: str, name: str, revision: str | None) -> FakeRepo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and token != GOOD_TOKEN):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif revision not in (None, "main", repo.commit):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo
        return None

    def _api(self, token: str, name: str, what: str | None, revision: str | None) -> None:
        repo = self._find(token, name, revision)
        if repo is None:
            return
        if what == "tree":
            answer = [
                {"type": "file", "path": file, "size": len(data), "oid": _sha1(data)}
                for file, data in repo.files.items()
            ]
        else:
            answer = {"id": name, "sha": repo.commit, "siblings": [{"rfilename": file} for file in repo.files]}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, token: str, name: str, revision: str, file: str) -> None:
        repo = self._find(token, name, revision)
        if repo is None:
            return
        if repo.gated and token != GOOD_TOKEN:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        elif file not in repo.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            data = repo.files[file]
            headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{_sha1(data)}"'}
            span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if span:
                headers["Content-Range"] = f"bytes {span[1]}-{len(data) - 1}/{len(data)}"
                data = data[int(span[1]) :]
            self._send(206 if span else 200, data, headers, file)

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str], file: str = "") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cuts[file].pop(0) if self.hub.cuts.get(file) else None
        stall = self.hub.stalls.get(file)
        try:
            if cut is not None:
                self.wfile.write(data[:cut])
                self.close_connection = True
            elif stall is not None:
                self.wfile.write(data[: len(data) // 2])
                stall.set()
                self.hub.stopped.wait()
                self.close_connection = True
            else:
                self.wfile.write(data)
        except OSError:  # the client is gone
            self.close_connection = True


@dataclass(frozen=True)
class Resolving:
    """A process that resolves names one after another."""

    process: BaseProcess
    out: Path
    err: Path
    count: int

    def finish(self) -> list[dict[str, str]]:
        """For each name {"folder": ...} or {"error": ...}. Standard error must be free of bars and tracebacks."""
        self.process.join(120)
        err = self.err.read_text()
        assert self.process.exitcode == 0, err
        assert "Traceback" not in err
        assert "%|" not in err
        answers = [json.loads(line) for line in self.out.read_text().splitlines()]
        assert len(answers) == self.count, err
        return answers


def start(url: str, home: Path, *names: str, patience: float = 60, **env: str) -> Resolving:
    """Starts a process that resolves `names` on the hub at `url`, with its cache in `home`.

    With a complete snapshot in the cache, it waits `patience` seconds for the hub.
    """
    home.mkdir(exist_ok=True)
    number = len(list(home.glob("*.out")))
    out, err = home / f"{number}.out", home / f"{number}.err"
    out.touch()
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": url} | env
    process = FORKS.Process(target=_resolve, args=(names, patience, settings, out, err))
    process.start()
    return Resolving(process, out, err, len(names))


def _resolve(names: tuple[str, ...], patience: float, settings: dict[str, str], out: Path, err: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith("HF_") or name.upper().endswith("_PROXY"):
            del os.environ[name]
    os.environ.update(settings)
    assert "huggingface_hub" not in sys.modules
    with open(err, "wb") as file:
        os.dup2(file.fileno(), 2)
    hub.ANSWER_SECONDS_IF_CACHED = patience
    with open(out, "w") as file:
        for name in names:
            try:
                answer = {"folder": str(hub.resolve(name))}
            except CheckpointError as e:
                answer = {"error": str(e)}
            print(json.dumps(answer), file=file, flush=True)
