"""PyTorch's zip checkpoints: values against torch.save and torch.load; every way a file can be broken or hostile."""

import io
import os
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hf_models import assert_bits_equal, to_numpy
from mutations import guarded, rezipped, unzipped

from sharded_llama.checkpoint.files import read_slices
from sharded_llama.checkpoint.meta import pickle_tensors, pth
from sharded_llama.checkpoint.meta.pth import PthWriter, read_pth
from sharded_llama.checkpoint.source import TensorInfo
from sharded_llama.errors import CheckpointError

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def random_bits(dtype: str, *shape: int) -> torch.Tensor:
    """Any bits at all: numbers, infinities, NaNs."""
    width = getattr(torch, dtype).itemsize
    bits = torch.randint(-(2**15), 2**15, (*shape, width // 2), dtype=torch.int16)
    return bits.view(getattr(torch, dtype)).reshape(shape)


def read_all(file: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for name, tensor in read_pth(file).items():
        arrays[name] = np.zeros(tensor.shape, tensor.dtype)
        read_slices(tensor, tuple(slice(None) for _ in tensor.shape), arrays[name], name)
    return arrays


def assert_reads(file: Path, expected: dict[str, torch.Tensor]) -> None:
    arrays = read_all(file)
    assert list(arrays) == list(expected)
    for name, tensor in expected.items():
        assert_bits_equal(arrays[name], to_numpy(tensor.contiguous()))


def refuses(file: Path, data: bytes, message: str) -> None:
    """Writes a file; reading it must be refused, naming it, quickly and within its memory."""
    file.write_bytes(data)
    with guarded(len(data)), pytest.raises(CheckpointError, match=message) as caught:
        read_pth(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value)) < 1000


# --- reading what PyTorch writes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_values_of_every_dtype(tmp_path: Path, dtype: str, kind: type):
    state = kind(w=random_bits(dtype, 31, 7), v=random_bits(dtype, 5), s=random_bits(dtype, 1)[0])
    torch.save(state, tmp_path / "m.pth")
    assert_reads(tmp_path / "m.pth", state)
    assert {tensor.dtype for tensor in read_pth(tmp_path / "m.pth").values()} == {DTYPES[dtype]}


def test_a_state_dict_with_its_metadata(tmp_path: Path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Embedding(6, 4)).bfloat16()
    torch.save(model.state_dict(), tmp_path / "m.pth")
    assert_reads(tmp_path / "m.pth", dict(model.state_dict()))


def test_views_and_shared_storages(tmp_path: Path):
    base, half = torch.randn(9, 4), random_bits("float16", 6)
    state = {
        "rows": base[3:7],
        "one": base[8, 3],
        "column": base[8:, 2:3],  # strides (4, 1) of a single element
        "all": base,
        "again": base,
        "tail": half[4:],
        "transposed": base[5:6].T,  # strides (1, 4), but one axis has length 1
    }
    torch.save(state, tmp_path / "m.pth")
    assert_reads(tmp_path / "m.pth", state)
    tensors = read_pth(tmp_path / "m.pth")
    assert tensors["again"].offset == tensors["all"].offset == tensors["rows"].offset - 3 * 16


def test_parameters(tmp_path: Path):
    tied = torch.nn.Parameter(torch.randn(3, 2))
    state = {"a": tied, "b": tied, "fixed": torch.nn.Parameter(torch.randn(4), requires_grad=False)}
    torch.save(state, tmp_path / "m.pth")
    assert_reads(tmp_path / "m.pth", {name: tensor.detach() for name, tensor in state.items()})


def test_empty_tensors_and_no_tensors(tmp_path: Path):
    state = {
        "none": torch.zeros(0),
        "rows": torch.zeros(0, 5),
        "slice": torch.zeros(4, 3)[2:2],
        "deep": torch.ones(1, 1),
    }
    torch.save(state, tmp_path / "m.pth")
    assert_reads(tmp_path / "m.pth", state)
    torch.save({}, tmp_path / "m.pth")
    assert read_pth(tmp_path / "m.pth") == {}


def test_many_tensors(tmp_path: Path):
    """More than the pickler's batch of 1000 items, and memo entries past one byte."""
    state = {f"layers.{i}.wéight": torch.full((2,), i) for i in range(2345)}
    state = {name: tensor.float() for name, tensor in state.items()} | {"again": torch.ones(4)[1:]}
    state["and again"] = state["again"]
    torch.save(state, tmp_path / "m.pth")
    pickled = unzipped((tmp_path / "m.pth").read_bytes())["m/data.pkl"]
    assert {"SETITEMS", "LONG_BINPUT", "LONG_BINGET"} <= {op.name for op, _, _ in pickletools.genops(pickled)}
    assert_reads(tmp_path / "m.pth", state)


@pytest.mark.parametrize("protocol", [2, 3])
def test_pickle_protocols(tmp_path: Path, protocol: int):
    state = torch.nn.Linear(3, 4).state_dict()
    torch.save(state, tmp_path / "m.pth", pickle_protocol=protocol)
    assert_reads(tmp_path / "m.pth", dict(state))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [4, 5])
def test_pickle_protocols_that_torch_refuses(tmp_path: Path, protocol: int):
    torch.save(torch.nn.Linear(3, 4).state_dict(), tmp_path / "m.pth", pickle_protocol=protocol)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "m.pth", weights_only=True)
    with pytest.raises(CheckpointError, match=r"m\.pth: data\.pkl, .* not a pickle of protocol 2 or 3"):
        read_pth(tmp_path / "m.pth")


def test_archives_of_older_versions_and_other_devices(tmp_path: Path):
    """No byte order before PyTorch 2.1; storages that were on a GPU; headers of another zip writer."""
    state = {"w": torch.randn(4, 3), "b": torch.randn(3).half()}
    out = io.BytesIO()
    torch.save(state, out)
    entries = {name: c for name, c in unzipped(out.getvalue()).items() if "/." not in name and "byteorder" not in name}
    assert b"X\x03\x00\x00\x00cpu" in entries["archive/data.pkl"]
    entries["archive/data.pkl"] = entries["archive/data.pkl"].replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:1")
    (tmp_path / "m.pth").write_bytes(rezipped(entries))
    assert_reads(tmp_path / "m.pth", state)


def test_offsets_past_4_gib_in_torchs_own_file(tmp_path: Path):
    """PyTorch writes the headers and leaves holes for the data, so the file takes no space."""
    state = {"big": torch.empty(9 << 28, dtype=torch.bfloat16), "small": torch.empty(3, 2)}
    with torch.serialization.skip_data():
        torch.save(state, tmp_path / "m.pth")
    tensors = read_pth(tmp_path / "m.pth")
    big, small = tensors["big"], tensors["small"]
    assert (big.shape, small.shape) == ((9 << 28,), (3, 2))
    assert small.offset > big.offset + big.nbytes > 1 << 32
    for tensor, name in ((big, "big"), (small, "small")):
        with open(tmp_path / "m.pth", "r+b") as f:
            f.seek(tensor.offset + tensor.nbytes - 4)
            f.write(name[:4].ljust(4).encode())
    loaded = torch.load(tmp_path / "m.pth", weights_only=True, mmap=True)
    for name, tensor in tensors.items():
        out = np.zeros_like(to_numpy(loaded[name][-1:]))
        last = slice(tensor.shape[0] - 1, tensor.shape[0])
        read_slices(tensor, (last, *[slice(None)] * (len(tensor.shape) - 1)), out, name)
        assert out.any()
        assert_bits_equal(out, to_numpy(loaded[name][-1:]))


# --- pickles


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name_of(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


ORDERED = name_of("collections.OrderedDict") + b")R"


def storage(kind: bytes = name_of("torch.FloatStorage"), key: bytes = text("0"), numel: bytes = b"K\x06") -> bytes:
    return b"(" + text("storage") + kind + key + text("cpu") + numel + b"tQ"


def tensor(
    stored: bytes = storage(), offset: bytes = b"K\0", shape: bytes = b"K\2K\3\x86", strides: bytes = b"K\3K\1\x86",
    grad: bytes = b"\x89", hooks: bytes = ORDERED, more: bytes = b"",
) -> bytes:  # fmt: skip
    args = stored + offset + shape + strides + grad + hooks + more
    return name_of("torch._utils._rebuild_tensor_v2") + b"(" + args + b"tR"


def state(*items: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(items) + b"u."


NUMBERS = np.arange(6, dtype=np.float32)


def archive(pickled: bytes, **more: bytes) -> bytes:
    """A checkpoint with one storage of six float32."""
    entries = {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", "data/0": NUMBERS.tobytes()}
    return rezipped({f"m/{name}": content for name, content in (entries | more).items()})


def test_the_pickles_below_are_valid_but_for_what_they_change(tmp_path: Path):
    (tmp_path / "m.pth").write_bytes(archive(state(text("w"), tensor())))
    assert_reads(tmp_path / "m.pth", {"w": torch.arange(6.0).reshape(2, 3)})
    assert_reads(tmp_path / "m.pth", torch.load(tmp_path / "m.pth", weights_only=True))


LONG = b"\x8a\x08" + struct.pack("<q", 2**62)
MINUS = b"J\xff\xff\xff\xff"
BROKEN_TENSORS = {
    "other dtype": (tensor(storage(name_of("torch.LongStorage"))), r"tensor 'w' has a dtype .* torch\.LongStorage"),
    "untyped": (tensor(storage(name_of("torch.storage.UntypedStorage"))), r"'w' .* torch\.storage\.UntypedStorage"),
    "no storage type": (tensor(storage(name_of("collections.OrderedDict"))), "is not a type of storage"),
    "string as type": (tensor(storage(text("torch.FloatStorage"))), "a persistent id is not"),
    "missing storage": (tensor(storage(key=text("7"))), "tensor 'w' has storage '7', which the archive lacks"),
    "outside": (tensor(storage(key=text("../version"))), "which the archive lacks"),
    "integer as key": (tensor(storage(key=b"K\0")), "a persistent id is not"),
    "short storage": (tensor(storage(numel=b"K\5")), "a storage of 20 bytes, but its entry in the archive has 24"),
    "long storage": (tensor(storage(numel=LONG)), "a storage of 18446744073709551616 bytes, but its entry"),
    "negative storage": (tensor(storage(numel=MINUS)), "a persistent id is not"),
    "bool as size": (tensor(storage(numel=b"\x88")), "a persistent id is not"),
    "none as size": (tensor(storage(numel=b"N")), "a persistent id is not"),
    "bare id": (tensor(text("storage") + b"Q"), "a persistent id is not"),
    "other id": (tensor(b"(" + text("module") + b"K\0tQ"), "a persistent id is not"),
    "id holding an id": (tensor(storage(key=storage())), "a persistent id is not"),
    "negative offset": (tensor(offset=MINUS), "offset, shape or strides are not sizes"),
    "offset": (tensor(offset=b"K\1"), "tensor 'w' ends at element 7 of its storage, which has 6"),
    "huge offset": (tensor(offset=LONG), "ends at element 4611686018427387910 of its storage"),
    "bool as offset": (tensor(offset=b"\x88"), "are not sizes"),
    "shape": (tensor(shape=b"K\3K\3\x86"), "ends at element 9 of its storage"),
    "huge shape": (tensor(shape=LONG + b"K\3\x86"), "too large"),
    "huge empty": (tensor(shape=b"K\0" + LONG + LONG + b"\x87", strides=b"K\0K\0K\0\x87"), r"shape \(0, .* too large"),
    "negative shape": (tensor(shape=MINUS + b"K\3\x86"), "are not sizes"),
    "bool in shape": (tensor(shape=b"K\2\x88\x86", strides=b"K\1K\1\x86"), "are not sizes"),
    "list as shape": (tensor(shape=text("ab")), "not called with the arguments"),
    "nested shape": (tensor(shape=b"K\2K\3\x86\x85"), "are not sizes, or not as many"),
    "fewer strides": (tensor(strides=b"K\3\x85"), "not as many"),
    "many axes": (tensor(shape=b"(" + b"K\1" * 33 + b"t", strides=b"(" + b"K\1" * 33 + b"t"), "are not sizes"),
    "transposed": (tensor(strides=b"K\1K\2\x86"), r"tensor 'w' of shape \(2, 3\) is not contiguous.* \(1, 2\)"),
    "expanded": (tensor(strides=b"K\0K\1\x86"), "is not contiguous"),
    "gap": (tensor(shape=b"K\2K\1\x86"), r"of shape \(2, 1\) is not contiguous: it has strides \(3, 1\)"),
    "integer as grad": (tensor(grad=b"K\0"), "not called with the arguments"),
    "hooks": (tensor(hooks=ORDERED + text("h") + b"K\0s"), "a tensor has hooks"),
    "no hooks": (tensor(hooks=b"N"), "a tensor has hooks"),
    "conjugate": (tensor(more=b"}" + text("conj") + b"\x88s"), "not called with the arguments"),
    "no arguments": (name_of("torch._utils._rebuild_tensor_v2") + b")R", "not called with the arguments"),
    "parameter": (name_of("torch._utils._rebuild_parameter") + b"(K\0\x89" + ORDERED + b"tR", "with the arguments"),
    "called twice": (tensor() + b")R", "what is called is not a global"),
    "called with a list": (name_of("collections.OrderedDict") + text("ab") + b"R", "is not a global"),
}


@pytest.mark.parametrize(("pickled", "message"), BROKEN_TENSORS.values(), ids=BROKEN_TENSORS)
def test_a_broken_tensor(tmp_path: Path, pickled: bytes, message: str):
    refuses(tmp_path / "m.pth", archive(state(text("w"), pickled)), rf"m\.pth: .*{message}")


# Tuples of two, each holding the one before twice: 2**64 elements, were they ever printed or hashed.
EXPONENTIAL = b"K\0" + b"q\0h\0\x86" * 64
BROKEN_PICKLES = {
    "empty": (b"", "the pickle ends too early"),
    "no protocol": (b"}.", "not a pickle of protocol 2 or 3"),
    "protocol 0": (pickle.dumps({}, 0), "not a pickle of protocol 2 or 3"),
    "no end": (b"\x80\x02}", "the pickle ends too early"),
    "truncated integer": (b"\x80\x02J\0\0", "opcode BININT: the pickle ends too early"),
    "truncated string": (b"\x80\x02X\xff\xff\xff\xffabc", "opcode BINUNICODE: the pickle ends too early"),
    "truncated global": (b"\x80\x02ctorch\n_utils", "the name of a global does not end"),
    "endless global": (b"\x80\x02c" + b"x" * 10**6, "the name of a global does not end"),
    "goes on": (state() + b".", "the pickle goes on after its end"),
    "nothing": (b"\x80\x02.", "the stack does not hold one value"),
    "two values": (b"\x80\x02}}.", "the stack does not hold one value"),
    "open mark": (b"\x80\x02}(.", "the stack does not hold one value"),
    "no mark": (b"\x80\x02}u.", "opcode SETITEMS: no mark was set"),
    "empty stack": (b"\x80\x02s.", "opcode SETITEM: the stack is empty"),
    "below the mark": (b"\x80\x02}(K\0\x86.", "opcode TUPLE2: the stack is empty"),
    "memo": (b"\x80\x02h\5.", "opcode BINGET: nothing was memoized as 5"),
    "memo of nothing": (b"\x80\x02q\5.", "opcode BINPUT: the stack is empty"),
    "wide integer": (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "an integer of 255 bytes is not a size"),
    "not UTF-8": (state(b"X\1\0\0\0\xff", tensor()), "opcode BINUNICODE: a string is not UTF-8"),
    "surrogate": (state(b"X\3\0\0\0\xed\xa0\x80", tensor()), "a string is not UTF-8"),
    "tensor alone": (b"\x80\x02" + tensor() + b".", "it holds a PickledTensor, not a dictionary"),
    "tuple": (b"\x80\x02K\1\x85.", "it holds a tuple, not a dictionary"),
    "exponential": (b"\x80\x02" + EXPONENTIAL + b".", "it holds a tuple, not a dictionary"),
    "exponential value": (state(text("w"), EXPONENTIAL), "the key 'w' holds a tuple, not a tensor"),
    "exponential key": (state(EXPONENTIAL, tensor()), "a key of a dictionary is a tuple, not a string"),
    "exponential id": (b"\x80\x02" + EXPONENTIAL + b"Q.", "a persistent id is not"),
    "exponential shape": (state(text("w"), tensor(shape=EXPONENTIAL)), "are not sizes"),
    "exponential callee": (b"\x80\x02" + EXPONENTIAL + b")R.", "what is called is not a global"),
    "nested states": (state(text("model"), state(text("w"), tensor())[2:-1]), "the key 'model' holds a dict, not a"),
    "step": (state(text("w"), tensor(), text("step"), b"K\3"), "the key 'step' holds a int, not a tensor"),
    "integer key": (state(b"K\1", tensor()), "a key of a dictionary is a int, not a string"),
    "twice": (state(text("w"), tensor(), text("w"), tensor()), "the key 'w' occurs twice"),
    "long name": (state(text("n" * 10**6), b"N"), r"the key 'n{100}\.\.\.' holds a NoneType"),
    "odd items": (b"\x80\x02}(" + text("w") + b"u.", "a key has no value"),
    "items of a tuple": (b"\x80\x02)(" + text("w") + b"Nu.", "items are set in a tuple"),
    "build on a dict": (b"\x80\x02}}" + text("_metadata") + b"}sb.", "opcode BUILD: it sets something other than"),
    "build of another": (b"\x80\x02" + ORDERED + b"}" + text("__class__") + b"}sb.", "opcode BUILD: it sets something"),
    "build with more": (
        b"\x80\x02" + ORDERED + b"}(" + text("_metadata") + b"}" + text("x") + b"}ub.",
        "opcode BUILD: it sets something",
    ),
    "hidden tensor": (
        b"\x80\x02" + ORDERED + b"}" + text("_metadata") + tensor() + b"sb.",
        "a tensor stands outside the dictionary",
    ),
    "hidden storage": (b"\x80\x02" + ORDERED + b"}" + text("_metadata") + storage() + b"sb.", "belongs to no tensor"),
    "two types": (
        state(text("w"), tensor(), text("v"), tensor(storage(name_of("torch.HalfStorage"), numel=b"K\x0c"))),
        "storage '0' has two types or sizes",
    ),
    "numpy": (
        state(text("w"), name_of("numpy.core.multiarray._reconstruct")),
        "multiarray._reconstruct' is not allowed",
    ),
}


@pytest.mark.parametrize(("pickled", "message"), BROKEN_PICKLES.values(), ids=BROKEN_PICKLES)
def test_a_broken_pickle(tmp_path: Path, pickled: bytes, message: str):
    refuses(tmp_path / "m.pth", archive(pickled), rf"m\.pth: data\.pkl, byte .*({message})")


def test_every_other_opcode_is_refused_by_name(tmp_path: Path):
    written = """GLOBAL REDUCE BUILD SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE EMPTY_DICT NONE
        NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET STOP"""
    others = [op for op in pickletools.opcodes if op.name not in written.split()]
    assert len(others) > 35
    for op in others:
        pickled = b"\x80\x02}" + op.code.encode("latin-1") + b"\x01\x00\n" * 20 + b"."
        message = rf"byte 3, opcode {op.name}: torch\.save does not write this opcode"
        refuses(tmp_path / "m.pth", archive(pickled), message)
    refuses(tmp_path / "m.pth", archive(b"\x80\x02}\xff."), "opcode 0xff: torch.save does not write")


COMMAND = "touch {canary}"
EVAL = "__import__('pathlib').Path({canary!r}).touch()"
RUNNING = {  # these run when unpickled
    "reduce": (name_of("os.system") + text(COMMAND) + b"\x85R", r"global 'os\.system' is not allowed"),
    "eval": (name_of("builtins.eval") + text(EVAL) + b"\x85R", r"global 'builtins\.eval' is not allowed"),
    "python 2": (name_of("__builtin__.eval") + text(EVAL) + b"\x85R", r"'__builtin__\.eval' is not allowed"),
    "stack global": (text("os") + text("system") + b"\x93" + text(COMMAND) + b"\x85R", "opcode STACK_GLOBAL: "),
    "inst": (b"(" + text(COMMAND) + b"ios\nsystem\n", "opcode INST: "),
    "obj": (b"(" + name_of("os.system") + text(COMMAND) + b"o", r"global 'os\.system' is not allowed"),
    "in a tensor": (
        tensor(hooks=name_of("os.system") + text(COMMAND) + b"\x85R"),
        r"global 'os\.system' is not allowed",
    ),
    "partial": (
        name_of("functools.partial") + name_of("os.system") + b"\x85R" + text(COMMAND) + b"\x85R",
        r"global 'functools\.partial' is not allowed",
    ),
    "setstate": (
        name_of("functools.partial") + b")\x81(" + name_of("os.system") + b")}NtbR" + text(COMMAND) + b"\x85R",
        r"global 'functools\.partial' is not allowed",
    ),
    "getattr": (
        name_of("builtins.getattr") + name_of("os.path") + text("os") + b"\x86R",
        r"global 'builtins\.getattr' is not allowed",
    ),
}


@pytest.mark.parametrize(("payload", "message"), RUNNING.values(), ids=RUNNING)
def test_a_pickle_that_would_run_a_program(tmp_path: Path, payload: bytes, message: str):
    canary = tmp_path / "canary"
    for pattern in (COMMAND, EVAL):  # the strings keep their length prefix right
        payload = payload.replace(text(pattern), text(pattern.format(canary=str(canary))))
    refuses(tmp_path / "m.pth", archive(b"\x80\x02" + payload + b"."), rf"m\.pth: data\.pkl, byte .*{message}")
    refuses(tmp_path / "m.pth", archive(state(text("w"), payload)), message)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["reduce", "eval", "stack global", "inst", "obj", "partial"])
def test_those_pickles_are_dangerous(tmp_path: Path, name: str):
    """Unpickled, they do write the file whose absence the test above asserts."""
    canary, payload = tmp_path / "canary", RUNNING[name][0]
    for pattern in (COMMAND, EVAL):
        payload = payload.replace(text(pattern), text(pattern.format(canary=str(canary))))
    pickle.loads(b"\x80\x02" + payload + b".")
    assert canary.exists()


NOT_RUNNING = {
    "obj of an allowed class": (b"(" + name_of("collections.OrderedDict") + b"o", "opcode OBJ: "),
    "newobj": (name_of("collections.OrderedDict") + b")\x81", "opcode NEWOBJ: "),
    "newobj_ex": (name_of("collections.OrderedDict") + b")}\x92", "opcode NEWOBJ_EX: "),
    "setstate": (ORDERED + b"}" + text("__setstate__") + name_of("torch.FloatStorage") + b"sb", "opcode BUILD: "),
    "text id": (b"Pos.system\n", "opcode PERSID: "),
    "extension": (b"\x82\x01", "opcode EXT1: "),
    "id of a function": (
        b"(" + text("storage") + name_of("os.system") + text("0") + text("cpu") + b"K\6tQ",
        "os.system'",
    ),
    "dotted": (name_of("torch._utils.os.system"), r"global 'torch\._utils\.os\.system' is not allowed"),
    "rebuilt type": (name_of("torch._tensor._rebuild_from_type_v2"), "_rebuild_from_type_v2' is not allowed"),
    "calling a storage": (name_of("torch.FloatStorage") + b"K\5\x85R", "FloatStorage is not called with the arguments"),
    "filling a class": (name_of("collections.OrderedDict") + text("a") + b"Ns", "items are set in a _Global"),
    "arguments of a class": (name_of("collections.OrderedDict") + b")\x85R", "OrderedDict is not called with"),
    "unprintable": (b"cos\x1b[2J\nsyst\xffem\n", r"global 'os\\x1b\[2J\.syst\\\\xffem' is not allowed"),
}


@pytest.mark.parametrize(("payload", "message"), NOT_RUNNING.values(), ids=NOT_RUNNING)
def test_other_tricks(tmp_path: Path, payload: bytes, message: str):
    refuses(tmp_path / "m.pth", archive(b"\x80\x02" + payload + b"."), rf"m\.pth: data\.pkl, byte .*{message}")


LARGE = {
    "memo": b"".join(b"}r" + struct.pack("<I", i) for i in range(400_000)),
    "one long tuple again and again": b"(" + b"K\0" * 400_000 + b"tq\3" + tensor(shape=b"h\3", strides=b"h\3") * 2_000,
    "globals without an end": b"c" + b"x" * (30 << 20),
}


@pytest.mark.parametrize("pickled", LARGE.values(), ids=LARGE)
def test_a_large_pickle_takes_no_more_than_its_share(tmp_path: Path, pickled: bytes):
    message = "does not hold one value|are not sizes|does not end"
    refuses(tmp_path / "m.pth", archive(b"\x80\x02" + pickled + b"."), message)


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = archive(state(text("w"), tensor()))
    for module, bound, value, message in (
        (pth, "MAX_PICKLE_BYTES", 50, r"its entry data\.pkl has \d+ bytes, more than 50"),
        (pth, "MAX_DIRECTORY_BYTES", 50, r"its zip directory has \d+ bytes, more than 50"),
        (pth, "MAX_RECORD_BYTES", 1, r"its entry version has 2 bytes, more than 1"),
        (pickle_tensors, "MAX_OPCODES", 10, "more than 10 opcodes"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, bound, value)
            refuses(tmp_path / "m.pth", data, message)
    assert read_pth(tmp_path / "m.pth").keys() == {"w"}


# --- the archive


def test_entries_that_say_what_the_archive_is(tmp_path: Path):
    valid = state(text("w"), tensor())
    for more, message in (
        ({"version": b"11\n"}, r"its entry version holds b'11\\n', which is not supported"),
        ({"version": b"0\n"}, "its entry version holds"),
        ({"version": b"x"}, "its entry version holds"),
        ({".data/version": b"99\n"}, r"its entry \.data/version holds"),
        ({"byteorder": b"big"}, "its entry byteorder holds b'big', which is not supported"),
        ({".storage_alignment": b"-64"}, r"its entry \.storage_alignment holds"),
        ({".data/serialization_id": b"\x80"}, r"its entry \.data/serialization_id holds"),
        ({"version": b"3" * 65}, "its entry version has 65 bytes, more than 64"),
        ({"constants.pkl": b""}, "is a TorchScript program, not a checkpoint"),
    ):
        refuses(tmp_path / "m.pth", archive(valid, **more), rf"m\.pth: {message}")
    for missing in ("data.pkl", "version"):
        entries = unzipped(archive(valid))
        del entries[f"m/{missing}"]
        refuses(tmp_path / "m.pth", rezipped(entries), rf"lacks the entry {missing} of a PyTorch checkpoint")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_other_formats_of_pytorch(tmp_path: Path):
    out = io.BytesIO()
    torch.save({"w": torch.ones(2)}, out, _use_new_zipfile_serialization=False)
    refuses(tmp_path / "m.pth", out.getvalue(), r"m\.pth: has the format from before PyTorch 1\.6.* torch\.save")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    refuses(tmp_path / "m.pth", out.getvalue(), r"m\.pth: is a tar archive, .* torch\.save")
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    refuses(tmp_path / "m.pth", script.getvalue(), "is a TorchScript program, not a checkpoint.* torch.save")


@pytest.mark.parametrize("data", [b"", b"PK", b"\x00" * 1000, b"\x80\x02}.", b"version https://git-lfs"])
def test_files_that_are_something_else(tmp_path: Path, data: bytes):
    refuses(tmp_path / "m.pth", data, r"m\.pth: is not a checkpoint of PyTorch: it does not begin as a zip archive")


def test_files_that_cannot_be_opened(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"gone\.pth: cannot be read: No such file or directory"):
        read_pth(tmp_path / "gone.pth")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_pth(tmp_path)


@pytest.fixture
def saved() -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.arange(6.0), "b": torch.arange(4.0)}, out)
    return out.getvalue()


@pytest.fixture
def plain() -> bytearray:
    """An archive with small headers, to break them: no flags, no extra fields, no zip64."""
    return bytearray(archive(state(text("w"), tensor()), **{"data/1": bytes(24), "data/2": bytes(24)}))


@pytest.mark.parametrize("kept", [4, 30, 100, 0.3, 0.7, -100, -22, -1])
def test_truncated(tmp_path: Path, saved: bytes, kept: float):
    data = saved[: int(kept * len(saved)) if isinstance(kept, float) else kept]
    refuses(tmp_path / "m.pth", data, r"m\.pth: is truncated")


def test_bytes_before_within_and_after_the_archive(tmp_path: Path, saved: bytes, plain: bytearray):
    for data in (saved, bytes(plain)):
        refuses(tmp_path / "m.pth", data + b"\0", "goes on after its zip directory")
        refuses(tmp_path / "m.pth", data[:100] + data, "do not agree|other bytes stand before")
        refuses(tmp_path / "m.pth", data[:-22] + b"\0" + data[-22:], "is damaged, or other bytes stand")
        refuses(tmp_path / "m.pth", data[:-2] + b"\4\0note", "goes on after its zip directory")


def test_the_end_of_the_directory_is_checked(tmp_path: Path, saved: bytes, plain: bytearray):
    """Every field, in both forms: each changed byte must be noticed."""
    for data, length in ((saved, 98), (bytes(plain), 22)):
        for position in range(len(data) - length, len(data)):
            within = position - (len(data) - length)
            if length == 98 and 12 <= within < 16:
                continue  # versions of the writer and of the reader that it wants
            changed = bytearray(data)
            changed[position] ^= 0x21
            refuses(tmp_path / "m.pth", bytes(changed), "its zip directory|is truncated|is empty")


def headers(data: bytes, name: str) -> tuple[int, int]:
    """Where the local and the central header of an entry begin."""
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        local = zipped.getinfo(name).header_offset
    return local, data.rindex(name.encode()) - 46


def change(data: bytearray, at: int, form: str, value: int | bytes) -> None:
    struct.pack_into(form, data, at, value)


# Which header of the entry m/data/1, where in it, the format and value of what is put there; the message.
DAMAGE = {
    "signature": ("central", 0, "<I", 0x02014B51, "its zip directory is damaged at byte"),
    "method": ("central", 10, "<H", 8, "'m/data/1' is compressed"),
    "encrypted": ("central", 8, "<H", 1, "'m/data/1' is encrypted"),
    "masked": ("central", 8, "<H", 1 << 13, "'m/data/1' is encrypted"),
    "sizes": ("central", 24, "<I", 25, "'m/data/1' is compressed"),
    "name": ("central", 46, "B", ord("n"), "'n/data/1' does not stand in the folder"),
    "not UTF-8": ("central", 53, "B", 0xFF, r"'m/data/\\\\xff' has a name that is"),
    "zero byte": ("central", 53, "B", 0, r"'m/data/\\x00' has a name with a zero"),
    "duplicate": ("central", 53, "B", ord("2"), "'m/data/2' occurs twice"),
    "same but for case": ("central", 48, "4s", b"DATA", "a local header"),
    "directory": ("central", 38, "<I", 0x10, "'m/data/1' is a directory"),
    "directory by name": ("central", 53, "B", ord("/"), "'m/data//' is a directory"),
    "comment": ("central", 32, "<H", 1, "its zip directory is damaged at byte"),
    "other disk": ("central", 34, "<H", 1, "its zip directory is damaged at byte"),
    "long name": ("central", 28, "<H", 60000, "its zip directory is damaged at"),
    "offset": ("central", 42, "<I", 1, "'m/data/1' overlaps the entry before it"),
    "elsewhere": ("central", 42, "<I", 10**9, "'m/data/1' lies outside the archive"),
    "zip64": ("central", 42, "<I", 2**32 - 1, "'m/data/1' lacks its zip64 extra"),
    "another": ("central", 42, "<I", 0, "'m/data.pkl' overlaps|a local header, at byte 0"),
    "local signature": ("local", 0, "B", 0, "'m/data/1' has a local header"),
    "local flags": ("local", 6, "<H", 8, "'m/data/1' has a local header"),
    "local method": ("local", 8, "<H", 8, "'m/data/1' has a local header"),
    "local size": ("local", 18, "<I", 23, "'m/data/1' has a local header"),
    "local zip64": ("local", 22, "<I", 2**32 - 1, "'m/data/1' has a local header"),
    "local no size": ("local", 18, "<Q", 0, "'m/data/1' has a local header"),
    "local name": ("local", 31, "B", ord("x"), "'m/data/1' has a local header"),
    "local name length": ("local", 26, "<H", 4, "'m/data/1' has a local header"),
    "local extra": ("local", 28, "<H", 9, "'m/data/2' overlaps the entry before it"),
    "local extra past the end": ("local", 28, "<H", 65535, "ends after byte"),
}


@pytest.mark.parametrize(("header", "position", "form", "value", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_header(
    tmp_path: Path, plain: bytearray, header: str, position: int, form: str, value: int | bytes, message: str
):
    local, central = headers(plain, "m/data/1")
    change(plain, (local if header == "local" else central) + position, form, value)
    refuses(tmp_path / "m.pth", bytes(plain), rf"m\.pth: .*({message})")


def test_names_that_differ_in_case_only(tmp_path: Path):
    """PyTorch finds entries whatever their case, so it would read either."""
    entries = [("m/data.pkl", state(text("w"), tensor())), ("m/version", b"3\n"), ("m/data/0", NUMBERS.tobytes())]
    refuses(tmp_path / "m.pth", rezipped([*entries, ("m/DATA/0", bytes(24))]), "its entry 'm/DATA/0' occurs twice")


def test_no_storage_may_reach_into_another(tmp_path: Path, plain: bytearray):
    """An entry that covers its neighbour, header and all, with both headers saying so."""
    local, central = headers(plain, "m/data/1")
    wide = 24 + 30 + len("m/data/2") + 24
    for at in (local + 18, local + 22, central + 20, central + 24):
        change(plain, at, "<I", wide)
    refuses(tmp_path / "m.pth", bytes(plain), "its entry 'm/data/2' overlaps the entry before it")
    for at in (local + 18, local + 22, central + 20, central + 24):
        change(plain, at, "<I", 10**6)
    refuses(tmp_path / "m.pth", bytes(plain), r"its entry 'm/data/1' ends after byte \d+")


def test_compressed_entries(tmp_path: Path):
    bomb = [("m/data.pkl", state()), ("m/version", b"3\n"), ("m/data/0", bytes(10**7))]
    refuses(tmp_path / "m.pth", rezipped(bomb, zipfile.ZIP_DEFLATED), r"its entry 'm/data\.pkl' is compressed")


def test_an_empty_archive(tmp_path: Path):
    refuses(
        tmp_path / "m.pth",
        b"PK\3\4" + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 0, 4, 0),
        "is an empty zip archive",
    )


def with_directory(content: bytes, entries: list[tuple[bytes, int, int]]) -> bytes:
    """`content` and a zip64 directory of (name, offset of the local header, size)."""
    form = struct.Struct("<4s4x2H8x2L3H8xL")
    records = [form.pack(b"PK\1\2", 0, 0, size, size, len(name), 0, 0, at) + name for name, at, size in entries]
    start, length, count = len(content), sum(map(len, records)), len(records)
    end64 = struct.pack("<4sQ4x2L4Q", b"PK\6\6", 44, 0, 0, count, count, length, start)
    end = struct.pack("<4sLQL4s4H2LH", b"PK\6\7", 0, start + length, 1, b"PK\5\6", 0, 0, 65535, 65535, length, start, 0)
    return content + b"".join(records) + end64 + end


def local_header(name: bytes, content: bytes, extra: bytes = b"") -> bytes:
    form = struct.Struct("<4s14x2L2H")
    return form.pack(b"PK\3\4", len(content), len(content), len(name), len(extra)) + name + extra + content


def test_one_hundred_thousand_entries(tmp_path: Path):
    contents = {b"m/data.pkl": state(text("w"), tensor()), b"m/version": b"3", b"m/data/0": NUMBERS.tobytes()}
    contents |= {f"m/x/{i}".encode(): b"" for i in range(100_000)}
    parts, entries, at = [], [], 0
    for name, content in contents.items():
        entries.append((name, at, len(content)))
        parts.append(local_header(name, content))
        at += len(parts[-1])
    (tmp_path / "m.pth").write_bytes(with_directory(b"".join(parts), entries))
    with guarded(at):
        assert read_all(tmp_path / "m.pth").keys() == {"w"}


def test_one_hundred_thousand_entries_with_the_same_header(tmp_path: Path):
    """They would all have the same long extra field read."""
    entries = [(f"m/{i:06}".encode(), 0, 0) for i in range(100_000)]
    data = with_directory(local_header(b"m/000000", b"", bytes(65535)), entries)
    refuses(tmp_path / "m.pth", data, "its entry 'm/000001' overlaps the entry before it")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, saved: bytes, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "m.pth").write_bytes(saved)
    real = os.pread
    monkeypatch.setattr(pth.os, "pread", lambda fd, count, offset: real(fd, count, offset)[:-1])
    with pytest.raises(CheckpointError, match=r"m\.pth: has become shorter while it was read"):
        read_pth(tmp_path / "m.pth")


# --- writing


def infos(arrays: dict[str, np.ndarray]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}


def write(
    file: Path, arrays: dict[str, np.ndarray], blocks: Iterable[tuple[str, np.ndarray]] | None = None, **options: Any
) -> None:
    """Writes a checkpoint of arrays like these, in these blocks; without blocks, the arrays."""
    with PthWriter(file, infos(arrays), **options) as writer:
        for name, block in arrays.items() if blocks is None else blocks:
            writer.write(name, block)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_loads_what_is_written(tmp_path: Path, dtype: str, mmap: bool):
    shapes = {
        "wéight": (7, 5),
        "one": (1,),
        "scalar": (),
        "none": (0,),
        "rows": (0, 3),
        "cube": (2, 3, 4),
        "last": (0,),
    }
    arrays = {name: to_numpy(random_bits(dtype, *shape)) for name, shape in shapes.items()}
    write(tmp_path / "m.pth", arrays)
    loaded = torch.load(tmp_path / "m.pth", weights_only=True, mmap=mmap)
    assert type(loaded) is dict
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert_bits_equal(to_numpy(loaded[name]), array)
        assert loaded[name].is_contiguous()
        assert not loaded[name].requires_grad
    back = read_all(tmp_path / "m.pth")
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert_bits_equal(back[name], array)
    assert all(tensor.offset % 64 == 0 for tensor in read_pth(tmp_path / "m.pth").values())


def test_zip_tools_accept_what_is_written(tmp_path: Path):
    arrays = {"a": np.arange(100, dtype=np.float32), "b": np.arange(7, dtype=np.float16)}
    write(tmp_path / "m.pth", arrays, root="märk")
    with zipfile.ZipFile(tmp_path / "m.pth") as zipped:
        assert zipped.testzip() is None  # the checksums
        assert zipped.namelist() == [
            f"märk/{name}" for name in ("data.pkl", "version", "byteorder", "data/0", "data/1")
        ]
        assert zipped.read("märk/data/0") == arrays["a"].tobytes()
    assert list(torch.load(tmp_path / "m.pth", weights_only=True)) == ["a", "b"]


def test_no_tensors_at_all(tmp_path: Path):
    write(tmp_path / "m.pth", {})
    assert torch.load(tmp_path / "m.pth", weights_only=True) == {}
    assert read_pth(tmp_path / "m.pth") == {}


def test_blocks_are_put_together(tmp_path: Path):
    array = to_numpy(random_bits("bfloat16", 10, 8))
    blocks = [("w", block) for block in (array[:3], array[3:4], array[4:4], array[4:].reshape(-1))]
    blocks += [("v", row) for row in array]
    write(tmp_path / "m.pth", {"w": array, "v": array}, blocks)
    loaded = torch.load(tmp_path / "m.pth", weights_only=True)
    assert_bits_equal(to_numpy(loaded["w"]), array)
    assert_bits_equal(to_numpy(loaded["v"]), array)


@pytest.mark.parametrize("mmap", [False, True])
def test_aliases_share_a_storage(tmp_path: Path, mmap: bool):
    arrays = {"w": to_numpy(random_bits("bfloat16", 5, 3)), "v": np.arange(4.0)}
    write(tmp_path / "m.pth", arrays, aliases={"tied": "w"})
    loaded = torch.load(tmp_path / "m.pth", weights_only=True, mmap=mmap)
    assert list(loaded) == list(read_pth(tmp_path / "m.pth")) == ["w", "v", "tied"]
    assert loaded["tied"].data_ptr() == loaded["w"].data_ptr()
    for name, array in (arrays | {"tied": arrays["w"]}).items():
        assert_bits_equal(to_numpy(loaded[name]), array)
        assert_bits_equal(read_all(tmp_path / "m.pth")[name], array)
    for aliases in ({"v": "w"}, {"tied": "u"}):
        with pytest.raises(ValueError, match=r"cannot be another name of [wu]: the tensors are w, v"):
            PthWriter(tmp_path / "m.pth", infos(arrays), aliases=aliases)


def test_the_file_is_on_the_disk_when_the_context_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = []
    monkeypatch.setattr(pth.os, "fsync", lambda fd: sizes.append(os.fstat(fd).st_size))
    write(tmp_path / "m.pth", {"w": np.ones(3)})
    assert sizes == [(tmp_path / "m.pth").stat().st_size]


@pytest.mark.parametrize("mmap", [False, True])
def test_many_small_tensors(tmp_path: Path, mmap: bool):
    arrays = {f"w{i}": np.full(3, i, np.float32) for i in range(1500)}
    write(tmp_path / "m.pth", arrays)
    loaded = torch.load(tmp_path / "m.pth", weights_only=True, mmap=mmap)
    assert [tensor[2].item() for tensor in loaded.values()] == list(range(1500))
    assert [array[1] for array in read_all(tmp_path / "m.pth").values()] == list(range(1500))


def test_more_than_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Blocks of zeros become holes, so that neither the disk nor the checksum sees them; all headers are zip64."""
    append = PthWriter._append

    def leave_hole(self: PthWriter, content: bytes | np.ndarray) -> None:
        if len(content) < 1 << 20:
            return append(self, content)
        self._out.seek(len(content), os.SEEK_CUR)
        self._missing -= len(content)

    monkeypatch.setattr(PthWriter, "_append", leave_hole)
    rows, ends = np.zeros((3, 3 << 28), ml_dtypes.bfloat16), np.arange(1, 5, dtype=ml_dtypes.bfloat16)
    tensors = {
        "big": TensorInfo((3 * (3 << 28) + 8,), rows.dtype),
        "after": TensorInfo((2, 2), rows.dtype),
        "empty": TensorInfo((0,), rows.dtype),
    }
    with PthWriter(tmp_path / "m.pth", tensors) as writer:
        for block in (ends, *rows, ends):
            writer.write("big", block)
        writer.write("after", ends)
    assert (tmp_path / "m.pth").stat().st_size > 4.5 * 2**30
    loaded = torch.load(tmp_path / "m.pth", weights_only=True, mmap=True)
    found = read_pth(tmp_path / "m.pth")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in tensors.items()}
    out = np.zeros(4, rows.dtype)
    for place in (slice(0, 4), slice(tensors["big"].shape[0] - 4, tensors["big"].shape[0])):
        read_slices(found["big"], (place,), out, "big")
        assert_bits_equal(out, ends)
        assert_bits_equal(to_numpy(loaded["big"][place]), ends)
    assert_bits_equal(to_numpy(loaded["after"]), ends.reshape(2, 2))
    read_slices(found["after"], (slice(None), slice(None)), out.reshape(2, 2), "after")
    assert_bits_equal(out, ends)


def test_what_a_writer_refuses(tmp_path: Path):
    arrays = {"a": np.ones((2, 3), np.float32), "empty": np.ones(0, np.float32), "b": np.ones(4, np.float16)}
    a, b = arrays["a"], arrays["b"]
    for blocks, message in (
        ([("b", b)], r"b: does not come now, but a \(24 bytes\)"),
        ([("c", b)], r"c: does not come now, but a"),
        ([("a", a[:1]), ("b", b)], r"b: does not come now, but a \(12 bytes\)"),
        ([("a", a), ("a", a[:1])], "a: 0 bytes are missing, the block has 12"),
        ([("a", a), ("b", b), ("a", a)], "a: does not come now, but the end"),
        ([("a", a.astype(np.float64))], "a: expected a C-contiguous block of float32, got float64"),
        ([("a", a.T)], "a: expected a C-contiguous block"),
        ([("a", np.ones(7, np.float32))], "a: 24 bytes are missing, the block has 28"),
        ([], "a: the last 24 bytes were not written"),
        ([("a", a), ("b", b[:3])], "b: the last 2 bytes were not written"),
        ([("a", a)], "b: the last 8 bytes were not written"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "m.pth", arrays, blocks)
        with pytest.raises(CheckpointError, match="is truncated"):  # what is left is no checkpoint
            read_pth(tmp_path / "m.pth")
    with pytest.raises(ValueError, match="n: dtype int64 is not one of float64, float32, float16, bfloat16"):
        PthWriter(tmp_path / "m.pth", infos({"n": np.ones(2, np.int64)}))
    with pytest.raises(ValueError, match="root 'a/b' is not the name of a folder"):
        PthWriter(tmp_path / "m.pth", {}, root="a/b")


def test_an_exception_closes_the_file_as_it_is(tmp_path: Path):
    def blocks() -> Iterator[tuple[str, np.ndarray]]:
        yield "w", np.ones(3)
        raise KeyError("from outside")

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyError, match="from outside"):
        write(tmp_path / "m.pth", {"w": np.ones(3)}, blocks())
    assert len(os.listdir("/proc/self/fd")) == before
    assert np.ones(3).tobytes() in (tmp_path / "m.pth").read_bytes()
    with pytest.raises(CheckpointError, match="is truncated"):
        read_pth(tmp_path / "m.pth")
