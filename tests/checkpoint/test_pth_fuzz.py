"""Damaged PyTorch checkpoints: refused as such, or read as PyTorch reads them. `--fuzz=N`: N examples of each kind."""

import io
import pickletools
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import mutations
import numpy as np
import pytest
import torch
from hf_models import assert_bits_equal, to_numpy
from hypothesis import given, strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from mutations import fuzz_settings, guarded, mutated, mutated_tail, rezipped, spliced, unzipped

from sharded_llama.checkpoint.files import read_slices
from sharded_llama.checkpoint.meta.pth import PthWriter, read_pth
from sharded_llama.checkpoint.source import TensorInfo
from sharded_llama.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol 3")


def saved(state: object) -> bytes:
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def state_dict() -> bytes:
    """An OrderedDict with metadata, and storages of four dtypes."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5).half(), torch.nn.Linear(1, 2).bfloat16())
    return saved(layer.state_dict())


def views() -> bytes:
    """A plain dictionary with parameters, and with tensors that share storages."""
    torch.manual_seed(1)
    base = torch.randn(6, 4, dtype=torch.float64)
    tied = torch.nn.Parameter(torch.randn(3, 3))
    return saved({"all": base, "rows": base[2:5], "row": base[5], "tied": tied, "again": tied, "none": base[:0]})


def without_byteorder() -> bytes:
    """What PyTorch wrote before 2.1, with the zip headers of another writer."""
    kept = ("archive/data.pkl", "archive/version")
    return rezipped({n: c for n, c in unzipped(views()).items() if n in kept or n.startswith("archive/data/")})


def ours(folder: Path) -> bytes:
    tensors = {
        "w": TensorInfo((4, 3), np.dtype(np.float32)),
        "b": TensorInfo((5,), np.dtype(ml_dtypes.bfloat16)),
        "e": TensorInfo((0, 2), np.dtype(np.float16)),
    }
    with PthWriter(folder / "ours.pth", tensors) as writer:
        for name, info in tensors.items():
            writer.write(name, np.arange(np.prod(info.shape)).astype(info.dtype).reshape(info.shape))
    return (folder / "ours.pth").read_bytes()


def verdict(file: Path, data: bytes) -> str:
    """Reads a damaged file and, when that succeeds, compares every value with what PyTorch reads.

    The file names a device for each storage, which is nothing of ours; `map_location` has PyTorch ignore it, too.
    """
    file.write_bytes(data)
    with guarded(len(data)):
        try:
            tensors = read_pth(file)
        except CheckpointError as e:
            return "refused" if str(e).startswith(f"{file}: ") else "refused without naming the file"
        arrays = {}
        for name, tensor in tensors.items():
            arrays[name] = np.zeros(tensor.shape, tensor.dtype)
            read_slices(tensor, tuple(slice(None) for _ in tensor.shape), arrays[name], name)
    expected = torch.load(file, weights_only=True, mmap=False, map_location="cpu")  # a refusal here is a failure, too
    assert list(arrays) == list(expected)
    for name, tensor in expected.items():
        assert_bits_equal(arrays[name], to_numpy(tensor.detach().contiguous()))
    return "read"


def run(request: pytest.FixtureRequest, folder: Path, strategy: SearchStrategy[bytes]) -> None:
    """Judges the examples of a strategy. Both verdicts must occur, or the damage does not test anything."""
    verdicts: Counter[str] = Counter()

    @fuzz_settings(request)
    @given(strategy)
    def check(data: bytes) -> None:
        verdicts[verdict(folder / "damaged.pth", data)] += 1

    check()
    assert verdicts.keys() == {"read", "refused"}


@pytest.fixture(params=[state_dict, views, without_byteorder], ids=lambda f: f.__name__)
def valid(request: pytest.FixtureRequest) -> bytes:
    return request.param()


def test_the_guard_stops_what_hangs_or_takes_memory(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MemoryError), guarded(1000):
        np.empty(2 << 30, np.uint8)
    np.empty(2 << 30, np.uint8)  # afterwards it may
    monkeypatch.setattr(mutations, "SECONDS", 0.05)
    with pytest.raises(mutations.Hang), guarded(1000):
        all(iter(lambda: 1, 0))  # without an end


def test_undamaged_files_are_read(valid: bytes, tmp_path: Path):
    assert verdict(tmp_path / "valid.pth", valid) == "read"
    assert verdict(tmp_path / "valid.pth", ours(tmp_path)) == "read"


def test_damage_anywhere(request: pytest.FixtureRequest, tmp_path: Path):
    sources = [state_dict(), views(), without_byteorder(), ours(tmp_path)]
    run(request, tmp_path, st.sampled_from(sources).flatmap(mutated))


def test_damage_to_the_zip_directory(request: pytest.FixtureRequest, tmp_path: Path):
    sources = [(state_dict(), 1000), (without_byteorder(), 400), (ours(tmp_path), 600)]
    run(request, tmp_path, st.sampled_from(sources).flatmap(lambda source: mutated_tail(*source)))


def test_two_files_spliced(request: pytest.FixtureRequest, tmp_path: Path):
    sources = st.permutations([state_dict(), views(), without_byteorder()])
    run(request, tmp_path, sources.flatmap(lambda files: spliced(files[0], files[1])))


def test_damage_to_the_bytes_of_the_pickle(request: pytest.FixtureRequest, tmp_path: Path):
    sources = [unzipped(state_dict()), unzipped(views())]

    def damage(entries: dict[str, bytes]) -> SearchStrategy[bytes]:
        return mutated(entries["archive/data.pkl"]).map(lambda data: rezipped(entries | {"archive/data.pkl": data}))

    run(request, tmp_path, st.sampled_from(sources).flatmap(damage))


def test_damage_to_the_opcodes_of_the_pickle(request: pytest.FixtureRequest, tmp_path: Path):
    sources = [unzipped(state_dict()), unzipped(views())]
    pool = [op for entries in sources for op in opcodes(entries["archive/data.pkl"])] + OTHER_OPCODES

    def damage(entries: dict[str, bytes]) -> SearchStrategy[bytes]:
        program = reprogrammed(opcodes(entries["archive/data.pkl"]), pool)
        return program.map(lambda data: rezipped(entries | {"archive/data.pkl": data}))

    run(request, tmp_path, st.sampled_from(sources).flatmap(damage))


# Opcodes that torch.save does not write here, and numbers and names that it could have written.
OTHER_OPCODES = [
    *(b"0", b"2", b"1", b"l", b"]", b"a", b"e", b"o", b"\x81", b"\x8f", b"N", b"\x88", b"\x89", b"}", b")", b"\x94"),
    *(b"K\x00", b"K\x01", b"K\x02", b"K\x03", b"K\x18", b"M\x00\x01", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f"),
    *(b"\x8a\x00", b"\x8a\x01\x02", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\x09" + b"\x01" * 9, b"U\x03cpu"),
    *(b"ctorch\nFloatStorage\n", b"ctorch\nDoubleStorage\n", b"ctorch\nHalfStorage\n", b"ctorch\nLongStorage\n"),
    *(b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_parameter\n", b"cbuiltins\nset\n", b"ctorch\nTensor\n"),
    *(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001", b"X\x04\x00\x00\x00meta", b"X\x01\x00\x00\x00\xff"),
]


def opcodes(pickle: bytes) -> list[bytes]:
    starts = [position for _, _, position in pickletools.genops(pickle)] + [len(pickle)]
    return [pickle[start:end] for start, end in pairwise(starts)]


@st.composite
def reprogrammed(draw: DrawFn, program: list[bytes], pool: list[bytes]) -> bytes:
    """A pickle with one to three opcodes replaced, added, dropped, or exchanged for one another."""
    program = list(program)
    other: Callable[[], bytes] = lambda: draw(st.sampled_from(pool))  # noqa: E731
    for _ in range(draw(st.integers(1, 3))):
        at, to = draw(st.integers(0, len(program) - 1)), draw(st.integers(0, len(program) - 1))
        match draw(st.sampled_from(["replace", "alike", "insert", "delete", "exchange", "copy"])):
            case "replace":
                program[at] = other()
            case "alike":  # by another of its kind: a size by a size, a name by a name
                program[at] = draw(st.sampled_from([op for op in pool if op[0] == program[at][0]]))
            case "insert":
                program.insert(at, other())
            case "delete" if len(program) > 1:
                del program[at]
            case "exchange":
                program[at], program[to] = program[to], program[at]
            case "copy":
                program[at:at] = program[to : to + draw(st.integers(1, 40))]
    return b"".join(program)
