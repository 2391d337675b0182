"""The compare launcher as a user meets it. Most runs are in this process: starting another one takes seconds."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from hf_models import save_random_model
from hf_reference import LLAMA3_ROPE, make_model, save
from meta_models import CONFIG as META, PARAMS, save_meta
from safetensors.numpy import load_file, save_file

from launch import compare as launcher
from sharded_llama.checkpoint import ExportFormat, convert, open_checkpoint
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.loading import encode_text
from sharded_llama.errors import MeshError, ParityError, RequestError, ShardedLlamaError, TokenizerError
from sharded_llama.mesh import make_mesh
from sharded_llama.parity.reference_file import check_same_model
from sharded_llama.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "sharded_llama" / "demo_checkpoint"
# Most of the time goes into compiling: one mesh and one shape are shared by most runs, and few continue a prompt.
MESH = "--mesh=data:2,model:2"
FEW = ("--token_ids=5,3,60,2,41,7", "--chunk=4", "--new_tokens=3")
SHORT = (*FEW[:2], "--new_tokens=0")
TINY = ("--token_ids=5,3", "--chunk=1", "--new_tokens=0")
FIELDS = {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 97}


class Run(NamedTuple):
    """What a run of the launcher left."""

    status: int
    text: str  # standard output
    report: dict[str, Any]  # what --json has


def run(json_file: Path, *args: object) -> Run:
    """Runs the launcher in this process."""
    with parsed(f"--json={json_file}", *args), contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            launcher.main()
            status = 0
        except SystemExit as end:
            status = end.code
    return Run(status, out.getvalue(), read_json(json_file))


@contextlib.contextmanager
def parsed(*args: object) -> Iterator[None]:
    with flagsaver.flagsaver():
        flags.FLAGS(["compare", *map(str, args)])
        try:
            yield
        finally:
            jax.config.update("jax_enable_x64", False)  # where a float64 model turned it on


def read_json(file: Path) -> dict[str, Any]:
    """The report in strict JSON, which knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def start(*args: object, missing: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Starts the launcher in a process of its own, as on a machine where the packages `missing` are not installed."""
    program = f"import sys; sys.modules |= dict.fromkeys({missing}); from launch import compare; compare.cli()"
    return subprocess.Popen(
        [sys.executable, *(["-c", program] if missing else ["-m", "launch.compare"]), *map(str, args)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(*processes: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """(exit status, standard output, standard error) of each."""
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:  # a hung collective ignores SIGTERM
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small float32 model without a tokenizer."""
    fields = {**FIELDS, "rope_parameters": LLAMA3_ROPE}
    return save(make_model("grouped", **fields), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory) -> Path:
    """What --save_reference writes for `folder`."""
    file = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    with parsed(f"--checkpoint={folder}", f"--save_reference={file}", *FEW):
        launcher.main()
    return file


def changed(folder: Path, target: Path, tensor: str, change: Callable[[np.ndarray], None]) -> Path:
    """A copy of a Hugging Face folder with one tensor changed."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors[tensor])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def to(folder: Path, target: Path, format: str = "hf", **changes: Any) -> Path:
    """A folder converted to another format."""
    source = open_checkpoint(folder)
    convert(source, source.read_config().replace(**changes), target, ExportFormat(format), progress=False)
    return target


def rows(report: dict[str, Any], mode: str) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["mode"] == mode]


# --- runs of whole commands


def test_a_checkpoint_with_a_tokenizer_on_eight_devices(short_demo, tmp_path):
    flags_given = (f"--checkpoint={short_demo}", "--simulate_devices=8", "--mesh=data:2,model:4")
    files = (f"--json={tmp_path / 'report.json'}", f"--plot={tmp_path / 'errors.png'}")
    ((status, stdout, stderr),) = finish(start(*flags_given, *files))
    assert status == 0, stderr
    assert stdout.startswith(f"checkpoint: {short_demo} (Hugging Face safetensors)\n")
    assert "bfloat16, mesh data:2,model:4 on cpu" in stdout
    assert "of the default prompts" in stdout
    assert "PASS: 44 components compared" in stdout
    assert "%|" not in stderr, "no progress bar in a pipe"
    report = read_json(tmp_path / "report.json")
    assert (report["passed"], report["first_failure"]) == (True, None)
    assert len(report["rows"]) == 44
    assert [row["length"] for row in report["greedy"]] == [16, 16]
    assert (tmp_path / "errors.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["errors.png", "report.json"]


def test_a_saved_reference_on_a_machine_without_torch(folder, reference, tmp_path):
    """It gives the numbers of the direct comparison; what needs torch says so, at once."""
    where = (f"--checkpoint={folder}", MESH, "--simulate_devices=8", "--chunk=4")
    missing = ("torch", "transformers", "matplotlib")
    saved = start(*where, f"--reference={reference}", f"--json={tmp_path / 'saved.json'}", missing=missing)
    direct = run(tmp_path / "direct.json", f"--checkpoint={folder}", MESH, *FEW)
    ((status, stdout, stderr),) = finish(saved)
    assert (status, direct.status) == (0, 0), stderr
    assert "PASS: 82 components compared" in stdout
    assert stdout.endswith(direct.text[direct.text.index("Isolated:") :])
    report = read_json(tmp_path / "saved.json")
    for part in ("passed", "first_failure", "rows", "logits", "greedy"):
        assert report[part] == direct.report[part]
    assert report["settings"]["reference"] == direct.report["settings"]["reference"]

    ((status, stdout, stderr),) = finish(start(f"--checkpoint={folder}", missing=missing))
    assert (status, stdout) == (1, "")
    message = stderr.splitlines()[-1]
    assert message.startswith("error: the reference needs torch and")
    assert "pip install 'sharded_llama[parity]'" in message
    assert "--reference=FILE" in message
    assert "Traceback" not in stderr
    assert "weights:" not in stderr, "nothing was loaded"


def test_a_wrong_weight_is_named(folder, tmp_path):
    """The reference is of weights that differ where the fingerprint does not look."""

    def change(w1_FD: np.ndarray) -> None:
        w1_FD[17] *= 1.01

    other = changed(folder, tmp_path / "other", "model.layers.1.mlp.gate_proj.weight", change)
    with parsed(f"--checkpoint={other}", f"--save_reference={tmp_path / 'file'}", *SHORT):
        launcher.main()
    against = (f"--reference={tmp_path / 'file'}", "--chunk=4", "--every_layer")
    done = run(tmp_path / "report.json", f"--checkpoint={folder}", MESH, *against)
    assert done.status == 1
    assert "FAIL: isolated, layers.1, gate: the relative distance" in done.text
    assert "\n  layers.1   gate " in done.text
    failure = done.report["first_failure"]
    assert (failure["mode"], failure["stage"], failure["component"]) == ("isolated", "layers.1", "gate")
    worst = failure["difference"]["worst"]
    assert worst["position"][2] == 17
    assert worst["theirs"] == pytest.approx(1.01 * worst["ours"], rel=1e-5)


def test_two_processes_compare_with_a_file(folder, reference, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"--coordinator_address=127.0.0.1:{s.getsockname()[1]}"
    common = (f"--checkpoint={folder}", "--simulate_devices=2", "--mesh=data:1,model:4", "--mode=cumulative", *SHORT)
    files = (f"--reference={reference}", f"--json={tmp_path / 'report.json'}")
    (status0, stdout0, stderr0), (status1, stdout1, stderr1) = finish(
        *(start(*common, *files, address, "--num_processes=2", f"--process_id={i}") for i in (0, 1))
    )
    assert (status0, status1) == (0, 0), stderr0 + stderr1
    assert "PASS: 35 components compared" in stdout0
    assert "mesh data:1,model:4 on cpu" in stdout0
    assert stdout1 == "", "only process 0 writes the output"
    assert read_json(tmp_path / "report.json")["passed"]
    assert [f.name for f in tmp_path.iterdir()] == ["report.json"]


# --- formats, types, meshes


@pytest.fixture(scope="module")
def meta(tmp_path_factory) -> Path:
    """Meta's folder of two files in float32, with scaled rotary embeddings whose factor it cannot say."""
    top = tmp_path_factory.mktemp("meta")
    state = {name: 0.1 * x for name, x in save_random_model(top / "hf", META).items()}
    save_meta(top / "meta", state, META, files=2, params=PARAMS | {"use_scaled_rope": True, "rope_theta": 500.0})
    return top / "meta"


def test_a_meta_folder_in_two_files(meta, tmp_path):
    done = run(tmp_path / "report.json", f"--checkpoint={meta}", MESH, "--rope_factor=4", *TINY, "--chunk=999999999")
    assert done.status == 0, done.text
    assert [row["way"] for row in done.report["logits"]] == [
        "one piece",
        "chunks of 2",
        "token by token",
        "prefill + decode",
    ]
    assert done.report["settings"]["checkpoint"] == f"{meta} (Meta)"
    assert "a plain model in Meta's layout" in done.report["settings"]["reference"]
    assert len(done.report["rows"]) == 82


def test_the_factor_of_scaled_rotary_embeddings_is_part_of_the_model(meta, tmp_path):
    file = tmp_path / "file"
    with parsed(f"--checkpoint={meta}", "--rope_factor=4", f"--save_reference={file}", *SHORT):
        launcher.main()
    message = mistake(f"--checkpoint={meta}", f"--reference={file}")
    assert "is of another model. rope_scaling: it has RopeScaling(factor=4.0" in message
    # A second form of the same folder has the same factor.
    other, source = shutil.copytree(meta, tmp_path / "copy"), open_checkpoint(meta, rope_factor=4)
    with parsed("--rope_factor=4", f"--against_checkpoint={other}"):
        second = launcher.choose_second(source, source.read_config(), make_mesh())
    assert second.source.location == str(other)
    assert second.source.read_config() == source.read_config()


def test_an_orbax_folder(folder, tmp_path, monkeypatch):
    """It is exported for PyTorch; nothing of that is left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    checkpoint = to(folder, tmp_path / "orbax", "orbax")
    done = run(tmp_path / "report.json", f"--checkpoint={checkpoint}", MESH, *SHORT)
    assert done.status == 0, done.text
    assert done.report["settings"]["checkpoint"] == f"{checkpoint} (orbax)"
    assert "transformers" in done.report["settings"]["reference"]
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(("dtype", "attention"), [("float64", "reference"), ("float16", "blockwise")])
def test_types(folder, dtype, attention, tmp_path):
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)  # which is done before `main`
    where = (f"--checkpoint={folder}", "--mesh=data:1", f"--dtype={dtype}", f"--attention={attention}")
    done = run(tmp_path / "report.json", *where, "--mode=isolated", *TINY)
    assert done.status == 0, done.text
    assert done.report["settings"]["ours"].startswith(f"{dtype}, ")
    assert f"attention: {attention}" in done.report["settings"]["ours"]
    assert done.report["settings"]["reference"].startswith(f"{dtype}, transformers")
    assert {row["mode"] for row in done.report["rows"]} == {"isolated"}
    assert [row["way"] for row in done.report["logits"]] == [
        "one piece",
        "chunks of 1",
        "token by token",
        "prefill + decode",
    ]


def test_a_conversion_is_equal_bit_for_bit(folder, tmp_path):
    """Whatever a converted config says beside the model, and whatever the cache of compiled programs has."""
    converted = to(folder, tmp_path / "orbax", "orbax", max_seq_len=48, eos_ids=())
    done = run(tmp_path / "report.json", f"--checkpoint={folder}", MESH, f"--against_checkpoint={converted}", *SHORT)
    assert done.status == 0, done.text
    cumulative = rows(done.report, "cumulative")
    assert {(row["bound"], row["difference"]["bit_equal"]) for row in cumulative} == {(0.0, 1.0)}
    assert len(cumulative) == 35
    assert {row["bound"] for row in rows(done.report, "isolated")} >= {1e-6}
    assert done.report["settings"]["expected"].startswith("equal values")
    assert done.report["settings"]["reference"].endswith(f", {converted} (orbax)")


def test_a_conversion_that_is_wrong_in_one_bit(folder, tmp_path):
    def change(w3_FD: np.ndarray) -> None:
        w3_FD[30, 7] = np.nextafter(w3_FD[30, 7], np.float32(9))

    other = changed(folder, tmp_path / "other", "model.layers.1.mlp.up_proj.weight", change)
    done = run(tmp_path / "report.json", f"--checkpoint={folder}", MESH, f"--against_checkpoint={other}", *SHORT)
    assert done.status == 1
    failure = done.report["first_failure"]
    assert (failure["mode"], failure["stage"], failure["component"]) == ("cumulative", "layers.1", "up")
    assert failure["difference"]["worst"]["position"][2] == 30
    assert "FAIL: cumulative, layers.1, up" in done.text


@pytest.mark.parametrize(
    ("dtype", "expected", "bounds"),
    [("float32", "the numerics contract", {0, 1e-6, 3e-6}), ("bfloat16", "nothing: the types differ", {None})],
)
def test_another_form_of_the_weights_in_isolation(folder, dtype, expected, bounds, tmp_path):
    """What is fed comes from programs of its own: no bits are expected. Nothing is, of weights that were rounded."""
    other = to(folder, tmp_path / "other", dtype=dtype)
    against = (f"--against_checkpoint={other}", "--mode=isolated")
    done = run(tmp_path / "report.json", f"--checkpoint={folder}", MESH, *against, *SHORT)
    assert done.status == 0, done.text
    assert done.report["settings"]["expected"] == expected
    assert {row["bound"] for row in done.report["rows"]} == bounds


def test_another_mesh_and_another_type(folder, tmp_path):
    mesh = run(tmp_path / "mesh.json", f"--checkpoint={folder}", MESH, "--against_mesh=model:8", *SHORT)
    assert mesh.status == 0, mesh.text
    assert "mesh data:2,model:2 on cpu" in mesh.report["settings"]["ours"]
    assert "mesh data:1,model:8 (cpu)" in mesh.report["settings"]["reference"]
    assert mesh.report["settings"]["expected"] == "the numerics contract"
    assert {row["bound"] for row in rows(mesh.report, "isolated")} == {0, 1e-6, 3e-6}

    flag = "--against_dtype=float64"
    dtype = run(tmp_path / "dtype.json", f"--checkpoint={folder}", "--mesh=data:1", "--mode=cumulative", flag, *TINY)
    assert dtype.status == 0, dtype.text
    assert dtype.report["settings"]["reference"].startswith("float64, sharded_llama")
    assert dtype.report["settings"]["expected"] == "nothing: the types differ"
    assert {row["bound"] for row in dtype.report["rows"]} == {None}
    last = dtype.report["rows"][-1]
    assert last["component"] == "logits"
    assert 1e-8 < last["difference"]["relative"] < 1e-5  # what float32 costs


# --- tokens


def chosen(folder: Path, *args: object) -> tuple[np.ndarray, str]:
    with parsed(*args):
        ids, what = launcher.choose_tokens(folder, open_checkpoint(folder).read_config(), None)
    return np.array(ids), what


def test_the_default_prompts(tmp_path):
    """Two rows as long as the longer one; the shorter goes on from its start, BOS included."""
    ids, what = chosen(DEMO)
    assert what == "of the default prompts"
    assert ids.shape == (2, 45)
    starts = [np.flatnonzero(row == ids[0, 0]).tolist() for row in ids]
    assert sorted(map(len, starts)) == [1, 2]
    again = max(max(starts))
    shorter = ids[0 if len(starts[0]) == 2 else 1]
    np.testing.assert_array_equal(shorter[again:], shorter[: 45 - again])


def test_prompts_that_are_given(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(DEMO)
    first, second = (tokenizer.encode(text, bos=tokenizer.adds_bos) for text in ("ROMEO:", "Before we proceed"))
    assert len(first) < len(second)
    ids, what = chosen(DEMO, "--prompt=ROMEO:", "--prompt=Before we proceed")
    assert ids.tolist() == [(first * 9)[: len(second)], second]
    assert what == "of the prompts given"
    monkeypatch.setattr("sys.stdin", io.StringIO("ROMEO:\n"))  # which can be read once
    assert chosen(DEMO, "--prompt_file=-")[0].tolist() == [first]
    assert chosen(DEMO, "--prompt=")[0].tolist() == [[load_tokenizer(DEMO).bos_id]]
    assert chosen(DEMO, "--token_ids=7, 3,9")[0].tolist() == [[7, 3, 9]]


def test_a_checkpoint_without_a_tokenizer_that_can_be_used(folder, tmp_path):
    ids, what = chosen(folder)
    assert what == "random"
    assert ids.shape == (2, 24)
    assert len(np.unique(ids)) > 24
    assert ids.max() < 97
    np.testing.assert_array_equal(chosen(folder)[0], ids)  # the same ones on every machine
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    np.testing.assert_array_equal(chosen(broken)[0], ids)
    shutil.copy(DEMO / "tokenizer.json", broken)  # of 1024 tokens
    np.testing.assert_array_equal(chosen(broken)[0], ids)
    with parsed("--prompt=a"), pytest.raises(TokenizerError, match="1024 tokens, but the model's vocabulary only 97"):
        launcher.choose_tokens(broken, open_checkpoint(broken).read_config(), None)


@pytest.mark.parametrize(
    ("context", "args", "length", "new_tokens"),
    [
        (64, (), 24, 16),
        (30, (), 15, 15),
        (8, (), 4, 4),
        (1, (), 1, 0),
        (30, ("--new_tokens=10",), 20, 10),
        (64, ("--new_tokens=0",), 24, 0),
        (64, ("--token_ids=1,2,3",), 3, 16),
        (9, ("--token_ids=1,2,3",), 3, 6),
    ],
)
def test_what_is_not_given_fits_the_context(folder, context, args, length, new_tokens):
    config = open_checkpoint(folder).read_config().replace(max_seq_len=context)
    with parsed(*args):
        ids, _ = launcher.choose_tokens(folder, config, None)
        assert len(ids[0]) == length
        assert launcher.choose_new_tokens(config, length, None) == new_tokens


def test_an_empty_prompt_where_there_is_no_bos(folder):
    class NoBos:
        bos_id, adds_bos = None, False

        def encode(self, text: str, *, bos: bool) -> list[int]:
            return [ord(c) for c in text]

    config = open_checkpoint(folder).read_config()
    assert encode_text(NoBos(), config, "") == [1]  # the model's own
    assert encode_text(NoBos(), config, "ab") == [97, 98]
    with pytest.raises(RequestError, match="the prompt is empty and the model has no BOS token"):
        encode_text(NoBos(), config.replace(bos_id=None), "")


# --- mistakes


def mistake(*args: object, kind: type[ShardedLlamaError] = ParityError) -> str:
    """The one message that a mistake prints."""
    with parsed(*args), pytest.raises(kind) as error:
        launcher.main()
    return str(error.value)


@pytest.fixture
def nothing_is_computed(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights are read before the mistake is found")

    for module, name in ((launcher.common, "LLM"), (launcher, "LLM"), (launcher, "torch_reference")):
        monkeypatch.setattr(module, name, refuse)


BAD_FLAGS = [
    (["--token_ids="], "--token_ids=: expected whole numbers such as 1,306,4658."),
    (["--token_ids=1,two"], "--token_ids=1,two: expected whole numbers"),
    (["--token_ids=" + "9" * 5000], "expected whole numbers"),
    (["--token_ids=1,97"], "--token_ids: 97 is no token id of the model; they are 0 to 96."),
    (["--token_ids=1,-1"], "--token_ids: -1 is no token id"),
    (["--token_ids=99999999999999"], "--token_ids: 99999999999999 is no token id"),
    (["--token_ids=1", "--prompt=x"], "give --token_ids or prompts, not both"),
    (["--token_ids=1", "--prompt_file=x"], "give --token_ids or prompts, not both"),
    (
        ["--token_ids=" + ",".join(["1"] * 65)],
        "prompt of 65 tokens and 0 new ones do not fit the model's context of 64",
    ),
    (["--new_tokens=64"], "and 64 new ones do not fit the model's context of 64"),
    (["--reference_device=cuda:99"], "device='cuda:99' cannot be used"),
    (["--reference_device=gpu"], "device='gpu' cannot be used"),
    (["--json=/nowhere/x.json"], "--json=/nowhere/x.json: its folder does not exist."),
    (["--json=/"], "--json=/ is a folder or a device"),
    (["--json=/dev/null"], "--json=/dev/null is a folder or a device"),
    (["--json=/proc/x.json"], "--json=/proc/x.json: its folder cannot be written to"),
    (["--json="], "--json is empty"),
    (["--plot=/nowhere/x.png"], "--plot=/nowhere/x.png: its folder does not exist."),
    (["--plot=errors.jpg"], "--plot=errors.jpg: a picture's name has to end with .png, .svg, .pdf."),
    (["--plot=png"], "--plot=png: a picture's name has to end with"),
    (["--save_reference=/nowhere/x"], "--save_reference=/nowhere/x: its folder does not exist."),
    (["--json=x.png", "--plot=./x.png"], "--json and --plot name the same file"),
    (["--reference=/nowhere"], "/nowhere: cannot be read"),
    (["--reference="], "--reference is empty"),
    (["--reference=x", "--json=x"], "--reference and --json name the same file"),
    (["--reference=x", "--save_reference=y"], "--save_reference and --reference cannot be given together"),
    (["--reference=x", "--against_mesh=model:2"], "--reference and --against_mesh cannot be given together"),
    (["--save_reference=x", "--against_dtype=float16"], "--save_reference and --against_dtype cannot"),
    (["--save_reference=x", "--json=y"], "--save_reference compares nothing: give --json with"),
    (["--save_reference=x", "--plot=y.svg"], "--save_reference compares nothing: give --plot with"),
    (["--reference=x", "--reference_device=cpu"], "which does not run with --reference"),
    (["--against_mesh=model:2", "--reference_device=cpu"], "which does not run with --against_mesh"),
    (["--against_checkpoint="], "--against_checkpoint is empty"),
]


@pytest.mark.parametrize(("args", "message"), BAD_FLAGS, ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "")
def test_bad_flags(folder, args, message, nothing_is_computed):
    assert message in mistake(f"--checkpoint={folder}", *args)


@pytest.mark.parametrize(
    ("args", "message", "kind"),
    [
        (["--prompt=hello"], "has no tokenizer.json and no tokenizer.model", TokenizerError),
        (["--prompt_file=/nowhere"], "--prompt_file=/nowhere: cannot be read", RequestError),
        (["--prompt_file="], "--prompt_file=: cannot be read", RequestError),
        (["--against_mesh=tensor:2"], "expected sizes such as data:2,model:4, got 'tensor:2'", MeshError),
        (["--against_mesh=model:16"], "needs 16 devices, but there are 8", MeshError),
        (["--against_mesh=model:3"], "Sizes that work: 1, 2, 4, 8.", MeshError),
        (["--against_checkpoint=/nowhere"], "/nowhere", ShardedLlamaError),
        (["--rope_factor=8"], "a rope factor was given, but its own config says it", ShardedLlamaError),
        (["--against_dtype=float16", "--attention=gpu"], "attention='gpu' needs an NVIDIA GPU", ShardedLlamaError),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "",
)
def test_bad_values(folder, args, message, kind, nothing_is_computed):
    assert message in mistake(f"--checkpoint={folder}", *args, kind=kind)


@pytest.mark.parametrize("args", [["--mode=all"], ["--new_tokens=-1"], ["--chunk=0"], ["--against_dtype=int8"]])
def test_values_that_absl_refuses(args):
    with pytest.raises(flags.Error, match=args[0].split("=")[0]), parsed(*args):
        pass


def test_prompt_files_without_prompts(tmp_path, nothing_is_computed):
    for text, message in (("\n\n", "has no prompts."), ("[" * 100_000, "line 1: expected an object")):
        file = tmp_path / "prompts.jsonl"
        file.write_text(text)
        assert message in mistake("--checkpoint=demo", f"--prompt_file={file}", kind=RequestError)


def test_pictures_need_matplotlib(folder, tmp_path, monkeypatch, nothing_is_computed):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = mistake(f"--checkpoint={folder}", f"--plot={tmp_path / 'x.png'}")
    assert "pictures need a package: pip install 'sharded_llama[parity]'" in message


def test_several_processes_need_a_file(folder, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for args in ((), ("--save_reference=x",)):
        assert "with several processes, give --reference=FILE" in mistake(f"--checkpoint={folder}", *args)


def test_a_checkpoint_that_does_not_hold_its_model(folder, tmp_path, nothing_is_computed):
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 93}))
    for args in ((), (f"--save_reference={tmp_path / 'x'}",)):
        message = mistake(f"--checkpoint={broken}", *args, kind=ShardedLlamaError)
        assert "mlp.gate_proj.weight is (92, 40), should be (93, 40)" in message


def test_another_form_that_lacks_a_tensor(folder, tmp_path, nothing_is_computed):
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    message = mistake(f"--checkpoint={folder}", f"--against_checkpoint={broken}", kind=ShardedLlamaError)
    assert f"{broken} does not hold the configured model; missing tensors: model.norm.weight (40,)" in message


class TestWrongReferences:
    """Each is refused before anything is loaded, by a message that says what would be right."""

    @pytest.fixture(autouse=True)
    def _reference(self, reference, nothing_is_computed):
        self.flag = f"--reference={reference}"

    def test_of_another_model(self, tmp_path):
        save(make_model("grouped", **FIELDS, rms_norm_eps=1e-6, rope_parameters=LLAMA3_ROPE), tmp_path)
        message = mistake(f"--checkpoint={tmp_path}", self.flag)
        assert message.endswith("is of another model. norm_eps: it has 1e-05, this run 1e-06.")

    def test_of_other_weights(self, tmp_path):
        save(make_model("grouped", seed=1, **FIELDS, rope_parameters=LLAMA3_ROPE), tmp_path)
        assert "is a reference of other weights" in mistake(f"--checkpoint={tmp_path}", self.flag)

    def test_of_another_type(self, folder):
        message = mistake(f"--checkpoint={folder}", self.flag, "--dtype=bfloat16")
        assert "the reference is float32, this run bfloat16: give --dtype=float32" in message

    def test_of_other_tokens(self, folder):
        message = mistake(f"--checkpoint={folder}", self.flag, "--token_ids=5,3,60,2,42,7")
        assert "The first difference is in row 0 at position 4: it has 41, and 42 is asked for." in message
        assert "is for tokens of shape (1, 6), not (1, 2)" in mistake(
            f"--checkpoint={folder}", self.flag, "--token_ids=5,3"
        )

    def test_with_a_shorter_continuation(self, folder):
        message = mistake(f"--checkpoint={folder}", self.flag, "--new_tokens=4")
        assert "holds a continuation of 3 tokens: give no more, or make a reference with more." in message

    def test_cut_short(self, folder, reference, tmp_path):
        file = tmp_path / "cut"
        file.write_bytes(reference.read_bytes()[:-1])
        assert "is truncated" in mistake(f"--checkpoint={folder}", f"--reference={file}")

    def test_of_another_kind(self, folder):
        message = mistake(f"--checkpoint={folder}", f"--reference={folder / 'model.safetensors'}")
        assert "is not a parity reference" in message


def test_against_another_model(folder, tmp_path, nothing_is_computed):
    """All fields that differ are listed, but for those that do not change the numbers."""
    fields = FIELDS | {"num_hidden_layers": 3, "max_position_embeddings": 32}
    save(make_model("grouped", **fields, rope_parameters=LLAMA3_ROPE | {"factor": 4.0}), tmp_path)
    message = mistake(f"--checkpoint={folder}", f"--against_checkpoint={tmp_path}")
    assert f"{tmp_path}: is of another model. n_layers: it has 3, this run 2; rope_scaling: it has" in message
    assert "; max_seq_len:" not in message


# --- files that are written


def test_an_error_at_the_end_does_not_lose_the_report(folder, tmp_path, monkeypatch):
    """The disk filled up while it computed: the text is printed, and the message says which file."""

    def full(*args: object) -> None:
        raise ParityError("report.json: cannot be written: No space left on device.")

    monkeypatch.setattr(launcher, "write_json_report", full)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        message = mistake(
            f"--checkpoint={folder}", MESH, "--mode=isolated", f"--json={tmp_path / 'report.json'}", *SHORT
        )
    assert "No space left" in message
    assert "PASS: 47 components compared" in out.getvalue()


def test_pytorch_alone_leaves_the_accelerator_to_pytorch(folder, tmp_path, monkeypatch):
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *update: updates.append(update))
    monkeypatch.setattr(launcher, "check_flags", lambda: updates.append("before anything asks for devices"))
    with parsed(f"--checkpoint={folder}", f"--save_reference={tmp_path / 'file'}", *TINY):
        launcher.main()
    assert updates[:2] == [("jax_platforms", "cpu"), "before anything asks for devices"]


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert launcher.named_file("~/report.json") == tmp_path / "report.json"
    with parsed("--json=~/x", f"--save_reference={tmp_path / 'x'}"), pytest.raises(ParityError, match="the same file"):
        launcher.check_files()
    with parsed("--json=~/report.json", "--save_reference=~/reference"):
        launcher.check_files()
    assert list(tmp_path.iterdir()) == []  # nothing is left of the attempt to write


def test_fields_that_do_not_change_the_numbers():
    config = LlamaConfig(
        dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=8, vocab_size=9, norm_eps=1e-5, rope_theta=1e4
    )
    same = config.replace(dtype="float32", max_seq_len=7, bos_id=1, eos_ids=(2,))
    check_same_model("there", same, config)
    with pytest.raises(ParityError) as error:
        check_same_model("there", same.replace(tie_embeddings=True, vocab_size=10), config)
    assert str(error.value) == (
        "there: is of another model. vocab_size: it has 10, this run 9; tie_embeddings: it has True, this run False."
    )
