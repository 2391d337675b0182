"""Hub names: what is downloaded and what is not, the cache, and every way it can fail."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import GOOD_TOKEN, STRANGERS_TOKEN, FakeHub, FakeRepo, from_folder, serve, start
from hf_models import assert_bits_equal

from sharded_llama.checkpoint import hub as hub_module, open_checkpoint
from sharded_llama.checkpoint.hub import resolve
from sharded_llama.errors import CheckpointError

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "sharded_llama/demo_checkpoint"
DEMO_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
SHARDS = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-[a]*.safetensors"]
UNNAMED = ["model-00003-of-00003.safetensors", "model-abc.safetensors"]  # by the index; the last shard is no pattern
INDEX = "model.safetensors.index.json"
LARGE = np.arange(3 << 20, dtype=np.uint32).tobytes()


def run(url: str, home: Path, *names: str, **options: Any) -> list[dict[str, str]]:
    """For each name {"folder": ...} or {"error": ...}; the options are those of `start`."""
    return start(url, home, *names, **options).finish()


def index(*files: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor{i}": file for i, file in enumerate(files)}}).encode()


def names_in(folder: str | Path) -> list[str]:
    return sorted(os.listdir(folder))


def repositories() -> dict[str, FakeRepo]:
    junk = {
        "pytorch_model.bin": b"pickle",
        "model.gguf": b"GGUF",
        "consolidated.safetensors": b"twice",
        "original/consolidated.00.pth": b"pickle",
        "original/params.json": b"{}",
        "sub/config.json": b"{}",
        "../../../evil.safetensors": b"outside",
        "../config.json": b"outside",
        "sub/model.safetensors": b"other",
        "modeling_llama.py": b"raise SystemExit",
        "chat_template.py": b"raise SystemExit",
        "chat_template.jinja.png": b"image",
    }
    config = {"config.json": b"{}"}
    sharded = config | {INDEX: index(*SHARDS, SHARDS[0])} | {file: file.encode() * 999 for file in (*SHARDS, *UNNAMED)}
    meta = {"params.json": b"{}", "tokenizer.model": b"bpe", "checklist.chk": b"md5"}
    meta |= {"consolidated.00.pth": b"first", "consolidated.01.pth": b"second", "consolidated.x.pth": b"other"}
    return {
        "org/demo": from_folder(DEMO, **junk),
        "org/sharded": FakeRepo(sharded),
        "org/meta": FakeRepo(meta),
        "org/large": FakeRepo(config | {"model.safetensors": LARGE}),
        "org/both": FakeRepo(sharded | meta | {"model.safetensors": b"single", "chat_template.jinja": b"{{ x }}"}),
        "org/pickled": FakeRepo(config | {"pytorch_model.bin": b"pickle", "README.md": b"", "q4/x.gguf": b""}),
        "org/empty": FakeRepo({".gitattributes": b""}),
        "org/outside": FakeRepo(
            config | {INDEX: index("../../../evil.safetensors"), "../../../evil.safetensors": b"x"}
        ),
        "org/program": FakeRepo(config | {INDEX: index("setup.py"), "setup.py": b"raise SystemExit"}),
        "org/list": FakeRepo(config | {INDEX: b'{"weight_map": {"a": ["b"]}}'}),
        "org/lost": FakeRepo(config | {INDEX: index("model-1.safetensors")}),
        "org/gated": FakeRepo(config | {"model.safetensors": b"licensed"}, gated=True),
        "org/private": FakeRepo(config | {"model.safetensors": b"secret"}, private=True),
    }


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve(repositories()) as hub:
        yield hub


# Failures that need no cache and no account share one process: (name, what the message says).
REFUSED = {
    "org/nothing": "org/nothing: neither a folder nor a repository of the Hugging Face hub of this name exists",
    "org/demo@v9": "org/demo@v9: the repository org/demo has no revision v9.",
    "org/a--b": "org/a--b is not a folder, and no repository of the Hugging Face hub can have this name.",
    "org/gated": "org/gated is gated: accept its licence at {url}/org/gated, and log in",
    "org/private": "org/private: neither a folder nor a repository",
    "org/pickled": "It has pytorch_model.bin, q4/x.gguf.",
    "org/empty": "org/empty has no weights that can be read",
    "org/outside": f"{INDEX}: weight_map names '../../../evil.safetensors', which is not a .safetensors file beside it",
    "org/program": f"{INDEX}: weight_map names 'setup.py', which is not a .safetensors file beside it",
    "org/list": f"{INDEX}: is not an index",
    "org/lost": f"org/lost: {INDEX} names files that the repository does not have: model-1.safetensors.",
}


def test_what_is_refused_and_why(hub: FakeHub, tmp_path: Path):
    answers = run(hub.url, tmp_path / "home", *REFUSED)
    for (name, message), answer in zip(REFUSED.items(), answers, strict=True):
        assert message.format(url=hub.url) in answer.get("error", "no error"), name
        assert set(hub.fetched(name)) <= {"config.json", INDEX}, name
    assert names_in(tmp_path) == ["home"]
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(tmp_path.rglob("*.py"))


def test_the_demo_checkpoint_from_the_hub(hub: FakeHub, tmp_path: Path):
    (answer,) = run(hub.url, tmp_path, "org/demo")
    folder = Path(answer["folder"])
    assert names_in(folder) == DEMO_FILES
    assert hub.fetched("org/demo") == DEMO_FILES
    source, expected = open_checkpoint(folder), open_checkpoint(DEMO)
    assert source.read_config() == expected.read_config()
    assert source.tensors.keys() == expected.tensors.keys()
    for name, info in expected.tensors.items():
        got, want = np.zeros(info.shape, info.dtype), np.ones(info.shape, info.dtype)
        everything = (slice(None),) * got.ndim
        source.read(name, everything, got)
        expected.read(name, everything, want)
        assert_bits_equal(got, want)


def test_only_what_is_needed_is_fetched_and_only_once(hub: FakeHub, tmp_path: Path):
    wanted = {
        "org/demo": DEMO_FILES,
        "org/sharded": ["config.json", *SHARDS, INDEX],
        "org/meta": ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"],
        "org/both": ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.model"],
    }
    first = run(hub.url, tmp_path, *wanted, *wanted)
    for (name, files), answer in zip([*wanted.items()] * 2, first, strict=True):
        assert names_in(answer["folder"]) == sorted(files)
        assert hub.fetched(name) == sorted(files)
        for file in files:
            assert (Path(answer["folder"]) / file).read_bytes() == hub.repos[name].files[file]

    hub.requests.clear()
    commit = hub.repos["org/demo"].commit
    assert run(hub.url, tmp_path, *wanted, f"org/demo@{commit}") == [*first[:4], first[0]]
    assert hub.requests == [f"GET /api/models/{name}" for name in wanted]  # a commit needs no question

    hub.requests.clear()
    hub.repos["org/demo"].files["tokenizer_config.json"] = b"{ }"
    (newer,) = run(hub.url, tmp_path, "org/demo")
    assert (Path(newer["folder"]) / "tokenizer_config.json").read_bytes() == b"{ }"
    assert hub.fetched("org/demo") == ["tokenizer_config.json"]


def test_without_a_network(hub: FakeHub, tmp_path: Path):
    names = ["org/demo", "org/sharded", "org/meta"]
    cached = run(hub.url, tmp_path, *names)
    hub.requests.clear()
    # Cut short: a shard, and a file that only the list of the repository tells.
    (Path(cached[1]["folder"]) / SHARDS[1]).unlink()
    (Path(cached[2]["folder"]) / "tokenizer.model").unlink()

    nowhere = "http://127.0.0.1:1"  # nothing listens there
    offline = run(hub.url, tmp_path, *names, "org/other", HF_HUB_OFFLINE="1")
    unreachable = run(nowhere, tmp_path, *names, "org/other")
    assert hub.requests == []
    for answers, reason in (offline, "offline mode is enabled"), (unreachable, "Connection refused"):
        assert answers[0] == cached[0]
        for answer, state in zip(
            answers[1:],
            (
                f"The cache has only a part of it: it lacks {SHARDS[1]}.",
                "The cache has only a part of it: it lacks tokenizer.model.",
                "The cache does not have it.",
            ),
            strict=True,
        ):
            assert "is not a folder, and it cannot be downloaded from http" in answer["error"]
            assert reason in answer["error"]
            assert state in answer["error"]

    # The rest is fetched, and nothing else.
    assert run(hub.url, tmp_path, *names) == cached
    assert [hub.fetched(name) for name in names] == [[], [], []]  # the cache still had the contents
    assert run(hub.url, tmp_path, *names, HF_HUB_OFFLINE="1") == cached


def test_a_snapshot_without_a_list_of_its_repository(hub: FakeHub, tmp_path: Path):
    """As older libraries, and downloads file by file, leave it."""
    cached = run(hub.url, tmp_path, "org/sharded", "org/demo")
    for trees in list(tmp_path.glob("hub/*/trees/*.json")):
        trees.unlink()
    (Path(cached[1]["folder"]) / "config.json").unlink()
    whole, part = run(hub.url, tmp_path, "org/sharded", "org/demo", HF_HUB_OFFLINE="1")
    assert whole == cached[0]
    assert "it lacks config.json." in part["error"]
    os.unlink(os.path.realpath(Path(cached[0]["folder"]) / SHARDS[0]))  # the link is left
    (part,) = run(hub.url, tmp_path, "org/sharded", HF_HUB_OFFLINE="1")
    assert f"it lacks {SHARDS[0]}." in part["error"]
    assert run(hub.url, tmp_path, "org/sharded") == [cached[0]]
    assert (Path(cached[0]["folder"]) / SHARDS[0]).read_bytes() == hub.repos["org/sharded"].files[SHARDS[0]]


def test_a_hub_that_does_not_answer(hub: FakeHub, tmp_path: Path):
    cached = run(hub.url, tmp_path, "org/demo")
    hub.silent.set()
    assert run(hub.url, tmp_path, "org/demo", patience=0.1) == cached


def test_tokens(hub: FakeHub, tmp_path: Path):
    good = run(hub.url, tmp_path, "org/gated", "org/private", HF_TOKEN=GOOD_TOKEN)
    assert [(Path(a["folder"]) / "model.safetensors").read_bytes() for a in good] == [b"licensed", b"secret"]
    home = tmp_path / "other"
    gated, private = run(hub.url, home, "org/gated", "org/private", HF_TOKEN=STRANGERS_TOKEN)
    assert f"org/gated is gated: accept its licence at {hub.url}/org/gated" in gated["error"]
    assert "private repository, log in with an account that may read it" in private["error"]
    (bad,) = run(hub.url, home, "org/demo", HF_TOKEN="hf_expired")
    assert "org/demo: the hub refuses access" in bad["error"]
    assert "`hf auth login`, or a token in HF_TOKEN" in bad["error"]
    assert "hf_expired" not in bad["error"]


def test_a_transfer_that_breaks_off_goes_on(hub: FakeHub, tmp_path: Path):
    hub.cuts["model.safetensors"] = [11 << 20]
    (answer,) = run(hub.url, tmp_path, "org/large")
    assert (Path(answer["folder"]) / "model.safetensors").read_bytes() == LARGE
    (request,) = [request for request in hub.requests if "bytes=" in request]
    assert request.endswith("/model.safetensors bytes=10485760-")  # the library writes blocks of 10 MiB


def test_a_transfer_that_keeps_breaking_off(hub: FakeHub, tmp_path: Path):
    hub.cuts[SHARDS[1]] = [0] * 20
    (answer,) = run(hub.url, tmp_path, "org/sharded")
    assert "org/sharded is not a folder, and it cannot be downloaded" in answer["error"]
    assert f"The cache has only a part of it: it lacks {SHARDS[1]}." in answer["error"]
    hub.cuts.clear()
    hub.requests.clear()
    (answer,) = run(hub.url, tmp_path, "org/sharded")
    assert hub.fetched("org/sharded") == [SHARDS[1]]
    assert (Path(answer["folder"]) / SHARDS[1]).read_bytes() == hub.repos["org/sharded"].files[SHARDS[1]]


def test_a_process_that_is_killed_in_the_middle(hub: FakeHub, tmp_path: Path):
    stalled = hub.stalls["model.safetensors"] = threading.Event()
    killed = start(hub.url, tmp_path, "org/demo")
    assert stalled.wait(60)
    killed.process.kill()
    killed.process.join()
    hub.stalls.clear()
    (part,) = run(hub.url, tmp_path, "org/demo", HF_HUB_OFFLINE="1")
    assert "it lacks model.safetensors." in part["error"]
    hub.requests.clear()
    (answer,) = run(hub.url, tmp_path, "org/demo")
    assert hub.fetched("org/demo") == ["model.safetensors"]
    assert (Path(answer["folder"]) / "model.safetensors").read_bytes() == (DEMO / "model.safetensors").read_bytes()


def test_a_cache_that_cannot_be_written(hub: FakeHub, tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    (answer,) = run(hub.url, tmp_path, "org/demo", HF_HOME=str(file))
    assert answer["error"].startswith("org/demo: the cache cannot be written: ")
    assert str(file) in answer["error"]
    assert "Set HF_HOME to a folder that can." in answer["error"]


def test_several_processes_at_once(hub: FakeHub, tmp_path: Path):
    processes = [start(hub.url, tmp_path, "org/demo") for _ in range(3)]
    answers = [process.finish()[0]["folder"] for process in processes]
    assert len(set(answers)) == 1
    assert hub.fetched("org/demo") == DEMO_FILES
    assert (Path(answers[0]) / "model.safetensors").read_bytes() == (DEMO / "model.safetensors").read_bytes()


def test_something_else_than_a_hub(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FakeRepo, "commit", "../../../evil")  # would be the name of a folder
    (answer,) = run(hub.url, tmp_path / "home", "org/demo")
    assert answer["error"] == f"{hub.url} does not answer like a Hugging Face hub; check HF_ENDPOINT."
    assert not list(tmp_path.rglob("*evil*"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for the library fails the test."""
    monkeypatch.setattr(hub_module, "_resolve", lambda repo, show: pytest.fail(f"asked the hub for {repo}"))


def test_what_exists_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None):
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/link").symlink_to("gone")
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "./org/name", str(tmp_path), "org", "org/link", Path("org/name")):
        assert resolve(name) == Path(name)


@pytest.mark.parametrize(
    "name",
    [
        *("./org/name", "../name", "/org/name", "~/name", "~me/name", "a/b/c", "org/", "/name", "name", "", "-x/name"),
        *("org/name/", "org/name@", "org/name@a/b", "org/name@..", "org name/x", "örg/name", "org/name\n", "org\\a/b"),
        *("https://huggingface.co/org/name", "file:org/name\0", "x" * 5000, Path("org/name")),
    ],
    ids=repr,
)
def test_paths_never_go_to_the_network(name: str | Path, no_network: None):
    with pytest.raises(CheckpointError, match=r"is not a folder\.$"):
        resolve(name)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"org/name is not a folder; .* pip install 'sharded_llama\[hub\]'"):
        resolve("org/name")


def test_the_library_is_imported_only_when_it_is_needed():
    code = "import sys, sharded_llama.checkpoint.hub as h; h.resolve('.'); sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"org/name: the disk of .* is full\. Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), r"the cache cannot be written: .*'/cache'"),
        (RuntimeError("xet\nstack"), r"it cannot be downloaded from http.*: xet\. The cache does not have it\."),
        (ValueError(), r"it cannot be downloaded from http.*: ValueError\."),
    ],
    ids=["full", "not writable", "xet", "no text"],
)
def test_other_failures(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str):
    def fail(repo: object, show: bool) -> Path:
        raise error

    monkeypatch.setattr(hub_module, "_resolve", fail)
    monkeypatch.setattr(hub_module, "_cached", lambda repo: (None, []))
    with pytest.raises(CheckpointError, match=message) as info:
        resolve("org/name")
    assert info.value.__cause__ is error


def test_bars_only_on_a_terminal(hub: FakeHub, tmp_path: Path):
    """In a pipe there are none: every other test checks that."""
    code = """if True:
        import sys
        from sharded_llama.checkpoint.hub import resolve
        resolve("org/demo", progress=False)
        print("MIDDLE", file=sys.stderr)
        resolve("org/sharded")
    """
    terminal, stderr = os.openpty()
    termios.tcsetwinsize(stderr, (24, 80))
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stderr=stderr)
    os.close(stderr)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
        while block := os.read(terminal, 65536):
            shown += block
    os.close(terminal)
    assert process.wait() == 0
    quiet, bars = shown.split(b"MIDDLE")
    assert quiet == b""
    assert b"%|" in bars
