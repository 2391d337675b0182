"""The fingerprint of weights: one for a model in all formats, another for another model, blind where it says so."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hf_models import CONFIG as GROUPED, save_random_model
from meta_models import CONFIG, PARAMS, save_meta

from sharded_llama.checkpoint import CheckpointSource, ExportFormat, TensorInfo, convert, open_checkpoint
from sharded_llama.checkpoint.layout import canonical_shapes
from sharded_llama.errors import CheckpointError
from sharded_llama.parity.fingerprint import fingerprint

PART = {name: f"layers.1.{name}" for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "attention_norm", "ffn_norm")}
MATRICES = ["tok_embeddings", "output", *(PART[name] for name in ("wv", "wo", "w1", "w2", "w3"))]
NORMS = ["norm", PART["attention_norm"], PART["ffn_norm"]]


@dataclasses.dataclass(frozen=True)
class Changed:
    """A checkpoint one of whose tensors is changed when it is read."""

    source: CheckpointSource
    name: str
    change: Callable[[np.ndarray], None]
    location: str = "changed"

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return dict(self.source.tensors)

    def stored_name(self, name: str) -> str:
        return self.source.stored_name(name)

    def read(self, name: str, slices: tuple[slice, ...], out: np.ndarray) -> int:
        info = self.source.tensors[name]
        whole = np.empty(info.shape, info.dtype)
        count = self.source.read(name, tuple(slice(0, n) for n in info.shape), whole)
        if name == self.name:
            self.change(whole)
        out[...] = whole[slices]
        return count


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    state = save_random_model(folder, CONFIG)
    save_meta(folder.parent / "meta", state, CONFIG, files=4, params=PARAMS)
    return folder


@pytest.fixture(scope="module")
def source(folder) -> CheckpointSource:
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def original(source) -> str:
    return fingerprint(source, CONFIG)


def changed(source: CheckpointSource, name: str, row: int, factor: float = 2) -> str:
    def change(tensor: np.ndarray) -> None:
        tensor[row] *= factor

    return fingerprint(Changed(source, name, change), CONFIG)


def test_is_a_sha256_that_repeats(source, original):
    assert len(bytes.fromhex(original)) == 32
    assert fingerprint(source, CONFIG) == original


@pytest.mark.parametrize("form", ["torch's Meta", "hf", "meta", "orbax"])
def test_is_the_same_in_every_format(folder, source, original, form, tmp_path):
    if form == "torch's Meta":
        other = open_checkpoint(folder.parent / "meta")
    else:
        convert(source, CONFIG, tmp_path / form, ExportFormat(form, meta_files=2), progress=False)
        other = open_checkpoint(tmp_path / form)
    assert fingerprint(other, CONFIG) == original


def test_of_grouped_heads_and_tied_embeddings(tmp_path):
    """Shapes that Meta's layout cannot have; fields that are no shapes do not matter."""
    config = GROUPED.replace(tie_embeddings=True, dtype="bfloat16")
    save_random_model(tmp_path / "hf", config)
    source = open_checkpoint(tmp_path / "hf")
    convert(source, config, tmp_path / "orbax", ExportFormat("orbax"), progress=False)
    assert fingerprint(open_checkpoint(tmp_path / "orbax"), config) == fingerprint(source, config)
    assert fingerprint(source, config.replace(dtype="float64", max_seq_len=9)) == fingerprint(source, config)


def test_wider_types_hold_the_same_values_narrower_ones_do_not(source, original, tmp_path):
    for dtype, equal in (("float64", True), ("bfloat16", False), ("float16", False)):
        convert(source, CONFIG.replace(dtype=dtype), tmp_path / dtype, progress=False)
        assert (fingerprint(open_checkpoint(tmp_path / dtype), CONFIG) == original) is equal


def test_other_random_weights_have_another(original, tmp_path):
    save_random_model(tmp_path / "other", CONFIG, seed=1)
    assert fingerprint(open_checkpoint(tmp_path / "other"), CONFIG) != original


@pytest.mark.parametrize("name", NORMS)
def test_sees_every_value_of_a_norm(source, original, name):
    size = canonical_shapes(CONFIG)[name][0]
    assert len({original, *(changed(source, name, row) for row in range(size))}) == 1 + size


@pytest.mark.parametrize("name", MATRICES)
def test_sees_the_middle_row_of_a_matrix_alone(source, original, name):
    """A place that it does not see is where tests can hide a fault."""
    middle = canonical_shapes(CONFIG)[name][0] // 2
    assert changed(source, name, middle) != original
    assert {changed(source, name, row) for row in (0, middle - 1, middle + 1, -1)} == {original}


def test_sees_a_single_bit(source, original):
    def change(tensor: np.ndarray) -> None:
        row, column = tensor.shape[0] // 2, 5
        tensor[row, column] = np.nextafter(tensor[row, column], np.float32(np.inf))

    assert fingerprint(Changed(source, PART["w2"], change), CONFIG) != original


@pytest.mark.parametrize("name", [PART["wq"], PART["wk"]])
def test_does_not_see_what_a_wrong_order_of_rows_would_change(source, original, name):
    assert fingerprint(Changed(source, name, lambda tensor: tensor.fill(0)), CONFIG) == original


def test_a_tensor_that_is_missing(source, tmp_path):
    with pytest.raises(CheckpointError) as error:
        fingerprint(source, CONFIG.replace(n_layers=3))
    assert str(error.value) == f"{source.location}: lacks model.layers.2.input_layernorm.weight."


def test_reads_little_of_a_large_matrix(tmp_path):
    """A row of each matrix and the norms: not the whole of a checkpoint that may have hundreds of gigabytes."""
    save_random_model(tmp_path, GROUPED.replace(dtype="bfloat16"))
    source = open_checkpoint(tmp_path)
    read = []

    class Counting(Changed):
        def read(self, name: str, slices: tuple[slice, ...], out: np.ndarray) -> int:
            assert out.dtype == ml_dtypes.bfloat16
            read.append(source.read(name, slices, out))
            return read[-1]

    assert fingerprint(Counting(source, "", lambda x: None), GROUPED) == fingerprint(source, GROUPED)
    shapes = {n: s for n, s in canonical_shapes(GROUPED).items() if not n.endswith((".wq", ".wk"))}
    assert sum(read) == 2 * sum(shape[-1] for shape in shapes.values())
