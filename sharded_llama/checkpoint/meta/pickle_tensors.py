"""The pickle in a PyTorch checkpoint, `data.pkl`: a dictionary of tensors, read and written without the pickle module.

A pickle is a program for a small stack machine (https://docs.python.org/3/library/pickletools.html). `torch.save`
writes a state dict with few of its opcodes: a tensor is the call `torch._utils._rebuild_tensor_v2(storage, offset,
shape, strides, requires_grad, OrderedDict())`, a storage the persistent id `("storage", type, key, location, numel)`.
Only those opcodes are interpreted, and the names that a pickle would import are only compared with a short list:
nothing is imported, called or looked up. What `torch.load(weights_only=True)` refuses is refused here as well.

The file may be hostile. Time and memory are linear in its size. Values that it makes are never hashed, compared
or printed before their type is known, because a tuple may hold itself twice, many levels deep.
"""

import math
import pickletools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from ...errors import CheckpointError
from ..source import TensorInfo, shorten

STORAGE_DTYPES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
STORAGE_TYPES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
# Known, so that a message can name the tensor that has such a type.
OTHER_STORAGES = {
    *(f"torch.{name}Storage" for name in ("Long", "Int", "Short", "Char", "Byte", "Bool")),
    *(f"torch.{name}Storage" for name in ("ComplexDouble", "ComplexFloat", "QUInt8", "QInt8", "QInt32")),
    *("torch.QUInt4x2Storage", "torch.QUInt2x4Storage", "torch.storage.UntypedStorage"),
}

FUNCTIONS = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")

MAX_OPCODES = 2_000_000  # 30 or so for a tensor. An object or a memo entry takes about 200 bytes: 400 MB at worst
MAX_DIMS = 32  # what every NumPy can hold
_OPCODE_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}
_LINE = re.compile(rb"[^\n]{0,500}(?=\n)")  # a name of a global


@dataclass(frozen=True, eq=False)
class PickledStorage:
    """The numbers that tensors are views of: `numel` of them in the archive's entry `data/{key}`."""

    type: str  # a key of STORAGE_DTYPES, or one of OTHER_STORAGES
    key: str
    numel: int


@dataclass(frozen=True, eq=False)
class PickledTensor:
    """A view of a storage. The numbers count elements; they are not negative and below 2**63, else unchecked."""

    storage: PickledStorage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Global:
    """A name that the pickle would import."""

    name: str


class OrderedDict(dict):
    """What the pickle calls a collections.OrderedDict."""


def show(text: str) -> str:
    """A string from a file as a message may print it: ASCII in quotes, not too long."""
    return ascii(text if len(text) <= 100 else text[:100] + "...")


def read_state_dict(data: bytes, where: str) -> dict[str, PickledTensor]:
    """The tensors by name, in the file's order; `where` is what messages call `data`.

    Raises CheckpointError for anything but a dictionary of strings to tensors (or parameters) as `torch.save` writes
    it with protocol 2 or 3.
    """
    return _Machine(data, where).run()


class _Machine:
    """The stack machine, in the middle of one pickle."""

    def __init__(self, data: bytes, where: str):
        self.data, self.where = data, where
        self.opcode, self.start, self.end = "PROTO", 0, 0  # the current opcode, its first byte, and the next one's
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack; what lies below the last one is out of reach
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, PickledStorage] = {}
        self.tensors: list[PickledTensor] = []

    def run(self) -> dict[str, PickledTensor]:
        """Interprets the pickle to its end."""
        if self.take(1) != b"\x80" or self.take(1) not in (b"\x02", b"\x03"):
            self.fail("it is not a pickle of protocol 2 or 3, which torch.save writes by default")
        for _ in range(MAX_OPCODES):
            self.start = self.end
            code = self.take(1)[0]
            self.opcode = _OPCODE_NAMES.get(code, f"0x{code:02x}")
            if self.opcode == "STOP":
                return self.result()
            self.step()
        self.fail(f"it has more than {MAX_OPCODES} opcodes")

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.where}, byte {self.start}, opcode {self.opcode}: {problem}.")

    def check(self, condition: bool, problem: str) -> None:
        if not condition:
            self.fail(problem)

    def take(self, count: int) -> bytes:
        """The next bytes of the pickle."""
        self.check(len(self.data) - self.end >= count, "the pickle ends too early")
        self.end += count
        return self.data[self.end - count : self.end]

    def take_int(self, count: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(count), "little", signed=signed)

    def pop(self) -> Any:
        self.check(len(self.stack) > (self.marks[-1] if self.marks else 0), "the stack is empty")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        self.check(bool(self.marks), "no mark was set")
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def step(self) -> None:
        """Executes the current opcode."""
        push = self.stack.append
        match self.opcode:
            case "BINPUT" | "LONG_BINPUT":
                index = self.take_int(1 if self.opcode == "BINPUT" else 4)
                push(self.pop())
                self.memo[index] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                index = self.take_int(1 if self.opcode == "BINGET" else 4)
                self.check(index in self.memo, f"nothing was memoized as {index}")
                push(self.memo[index])
            case "BININT1":
                push(self.take_int(1))
            case "BININT2":
                push(self.take_int(2))
            case "BININT":
                push(self.take_int(4, signed=True))
            case "LONG1":
                count = self.take_int(1)
                self.check(count <= 8, f"an integer of {count} bytes is not a size")
                push(self.take_int(count, signed=True))
            case "BINUNICODE":
                try:
                    push(self.take(self.take_int(4)).decode())
                except UnicodeDecodeError:
                    self.fail("a string is not UTF-8")
            case "NONE":
                push(None)
            case "NEWTRUE":
                push(True)
            case "NEWFALSE":
                push(False)
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                push(tuple(self.pop_mark()))
            case "EMPTY_TUPLE":
                push(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(self.opcode[-1]))]
                push(tuple(reversed(items)))
            case "EMPTY_DICT":
                push({})
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_mark())
            case "GLOBAL":
                push(_Global(self.take_global()))
            case "BINPERSID":
                push(self.storage(self.pop()))
            case "REDUCE":
                args, function = self.pop(), self.pop()
                push(self.call(function, args))
            case "BUILD":  # state_dict() leaves the attribute _metadata on its OrderedDict; load_state_dict reads it
                state, target = self.pop(), self.pop()
                known = type(target) is OrderedDict and type(state) is dict and len(state) == 1 and "_metadata" in state
                self.check(known, "it sets something other than the attribute _metadata of an OrderedDict")
                push(target)
            case _:
                self.fail("torch.save does not write this opcode for a state dict")

    def set_items(self, items: list[Any]) -> None:
        """Adds keys and values that alternate to the dictionary on top of the stack."""
        self.check(len(items) % 2 == 0, "a key has no value")
        target = self.pop()
        self.check(type(target) in (dict, OrderedDict), f"items are set in a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.check(type(key) is str, f"a key of a dictionary is a {type(key).__name__}, not a string")
            if key in target:
                self.fail(f"the key {show(key)} occurs twice")
            target[key] = value
        self.stack.append(target)

    def take_global(self) -> str:
        """The next two lines: module and name."""
        lines = []
        for _ in range(2):
            line = _LINE.match(self.data, self.end)
            if line is None:
                self.fail("the name of a global does not end")
            self.end = line.end() + 1
            lines.append(line[0].decode(errors="backslashreplace"))
        name = ".".join(lines)
        if not (name in FUNCTIONS or name in STORAGE_DTYPES or name in OTHER_STORAGES):
            self.fail(f"the global {show(name)} is not allowed: only dictionaries of plain tensors are read")
        return name

    def storage(self, ident: Any) -> PickledStorage:
        """The storage that a persistent id stands for. The location, a device's name, does not matter."""
        match ident if type(ident) is tuple else None:
            case (str("storage"), _Global(name=kind), str(key), str(), numel) if _is_size(numel):
                self.check(kind in STORAGE_DTYPES or kind in OTHER_STORAGES, f"{kind} is not a type of storage")
            case _:
                self.fail("a persistent id is not ('storage', type, key, location, number of elements)")
        storage = self.storages.setdefault(key, PickledStorage(kind, key, numel))
        same = (storage.type, storage.numel) == (kind, numel)
        self.check(same, f"storage {show(key)} has two types or sizes")
        return storage

    def call(self, function: Any, args: Any) -> Any:
        """The value of one of the three functions."""
        self.check(type(function) is _Global and type(args) is tuple, "what is called is not a global")
        match function.name, args:
            case "collections.OrderedDict", ():
                return OrderedDict()
            case "torch._utils._rebuild_parameter", (PickledTensor() as tensor, bool(), hooks):
                self.check_no_hooks(hooks)
                return tensor
            case "torch._utils._rebuild_tensor_v2", (
                PickledStorage() as storage,
                offset,
                tuple(shape),
                tuple(strides),
                bool(),
                hooks,
            ):
                self.check_no_hooks(hooks)
                # The number of axes first: a pickle may call this often with one long tuple.
                plain = len(shape) == len(strides) <= MAX_DIMS and all(map(_is_size, (offset, *shape, *strides)))
                self.check(plain, "a tensor's offset, shape or strides are not sizes, or not as many")
                tensor = PickledTensor(storage, offset, shape, strides)
                self.tensors.append(tensor)
                return tensor
        self.fail(f"{function.name} is not called with the arguments that torch.save gives it")

    def check_no_hooks(self, hooks: Any) -> None:
        self.check(type(hooks) is OrderedDict and not hooks, "a tensor has hooks")

    def result(self) -> dict[str, PickledTensor]:
        """What is on the stack at the end, if it is a dictionary of all the tensors."""
        self.check(self.end == len(self.data), "the pickle goes on after its end")
        self.check(len(self.stack) == 1 and not self.marks, "the stack does not hold one value")
        state = self.stack[0]
        self.check(
            type(state) in (dict, OrderedDict), f"it holds a {type(state).__name__}, not a dictionary of tensors"
        )
        for name, value in state.items():
            if type(value) is not PickledTensor:
                self.fail(
                    f"the key {show(name)} holds a {type(value).__name__}, not a tensor. "
                    "Load the file with PyTorch and save the dictionary of its tensors alone"
                )
        named = {id(tensor) for tensor in state.values()}
        used = {tensor.storage.key for tensor in state.values()}
        self.check(all(id(t) in named for t in self.tensors), "a tensor stands outside the dictionary")
        self.check(used == self.storages.keys(), "a storage belongs to no tensor")
        return dict(state)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def write_state_dict(tensors: Mapping[str, TensorInfo], aliases: Mapping[str, str] | None = None) -> bytes:
    """The pickle, of protocol 2, of a dictionary of contiguous tensors; the i-th has the storage `str(i)` of its own.

    `aliases` are further names, each of one of the tensors, whose storage it shares. Raises ValueError for a dtype that
    is not in STORAGE_TYPES, and for an alias that is the name of a tensor, or of none.
    """
    for name, info in tensors.items():
        if info.dtype not in STORAGE_TYPES:
            raise ValueError(f"{name}: dtype {info.dtype} is not one of {', '.join(map(str, STORAGE_TYPES))}.")
    described = {name: _tensor(str(i), info) for i, (name, info) in enumerate(tensors.items())}
    for alias, name in (aliases or {}).items():
        if alias in tensors or name not in tensors:
            raise ValueError(f"{alias}: cannot be another name of {name}: the tensors are {shorten(tensors)}.")
        described[alias] = described[name]
    return b"\x80\x02}(" + b"".join(_text(name) + tensor for name, tensor in described.items()) + b"u."


def _tensor(key: str, info: TensorInfo) -> bytes:
    numel, kind = math.prod(info.shape), _global(STORAGE_TYPES[info.dtype])
    storage = b"(" + _text("storage") + kind + _text(key) + _text("cpu") + _int(numel) + b"tQ"
    strides = [math.prod(max(n, 1) for n in info.shape[i + 1 :]) for i in range(len(info.shape))]
    hooks = _global("collections.OrderedDict") + b")R"
    args = storage + _int(0) + _ints(info.shape) + _ints(strides) + b"\x89" + hooks  # not requiring gradients
    return _global("torch._utils._rebuild_tensor_v2") + b"(" + args + b"tR"


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + value.to_bytes(4, "little")
    return b"\x8a\x08" + value.to_bytes(8, "little")


def _ints(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"
