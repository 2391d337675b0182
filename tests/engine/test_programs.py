"""Steps that were traced before are lowered from the disk, and are the same."""

import jax
import numpy as np
import pytest
from hf_reference import make_model, save

from sharded_llama.engine import programs, runner as runner_module
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.loading import load_model
from sharded_llama.mesh import make_mesh

SMALL = {"max_num_seqs": 2, "max_num_batched_tokens": 18, "decode_steps": 1, "seed": 0, "progress": False}
PROMPT = [1, 5, 9, 30]
STEPS = ("forward", "choose", "set_tables", "copy_pages", "change_slots", "count_known", "new_slots")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(make_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(monkeypatch, tmp_path):
    folder = tmp_path / "cache" / "programs"
    monkeypatch.setattr(runner_module, "programs_folder", lambda mesh: folder)
    return folder


def make_llm(model, mesh_shape=(1, 1), **options):
    loaded = load_model(model, mesh=make_mesh(*mesh_shape), skip_tokenizer=True, progress=False)
    return LLM(loaded, **{**SMALL, **options})


def answers(llm):
    """Greedy and sampled tokens with their log-probabilities."""
    outputs = [
        llm.generate(PROMPT, max_tokens=6, ignore_eos=True, logprobs=2, seed=1, temperature=t)[0].outputs[0]
        for t in (0.0, 1.0)
    ]
    return [(output.token_ids, output.logprobs) for output in outputs]


def contents(folder):
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


def forbid_tracing(monkeypatch):
    def never(*_, **__):
        raise AssertionError("this step is on the disk")

    for name in STEPS:
        monkeypatch.setattr(runner_module, name, never)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 2)], ids=str)
def test_a_second_start_traces_nothing_and_answers_the_same(model, folder, monkeypatch, mesh_shape):
    options = {"max_num_seqs": 2 * mesh_shape[0], "max_num_batched_tokens": 18 * mesh_shape[0]}
    plain = make_llm(model, mesh_shape, **options)
    monkeypatch.setattr(plain.engine.runner, "_programs", None)
    expected = answers(plain)

    first = make_llm(model, mesh_shape, **options)
    first.start()
    written = contents(folder)
    assert len(written) == first.engine.runner.n_compiled
    assert answers(first) == expected

    forbid_tracing(monkeypatch)
    second = make_llm(model, mesh_shape, **options)
    second.start()
    assert answers(second) == expected
    assert contents(folder) == written


def test_donated_pages_are_still_updated_in_place(model, folder):
    runner = make_llm(model).engine.runner
    shape = max(runner.sizes.shapes, key=lambda s: s.n_tokens)
    of_pages = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(runner._abstract_pages))
    for _ in range(2):  # as it was traced, and from the disk
        assert runner._forward(shape).memory_analysis().alias_size_in_bytes == of_pages
        runner._compiled.clear()


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: bytes(64), lambda whole: whole[: len(whole) // 2]])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    args = (jax.ShapeDtypeStruct((4,), np.float32),)
    for _ in range(2):
        lowered = programs.lower(lambda x: x + 1, args, donate=(), out=None, folder=tmp_path, identity=())
        np.testing.assert_array_equal(lowered.compile()(np.arange(4, dtype=np.float32)), np.arange(1, 5))
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        assert whole != damage(whole)
        file.write_bytes(damage(whole))


def test_what_makes_another_program(monkeypatch, tmp_path):
    def files(identity=("forward", 1), n=4, dtype=np.float32, donate=()):
        args = (jax.ShapeDtypeStruct((n,), dtype),)
        programs.lower(lambda x: x * 2, args, donate=donate, out=None, folder=tmp_path, identity=identity)
        return len(list(tmp_path.iterdir()))

    assert files() == files() == 1
    assert files(identity=("forward", 2)) == 2
    assert files(n=5) == 3
    assert files(dtype=np.int32) == 4
    assert files(donate=(0,)) == 5
    with jax.default_matmul_precision("float32"):
        assert files() == 6
    monkeypatch.setattr(programs, "SOURCE", "changed")
    assert files() == 7
    monkeypatch.setattr(jax, "__version__", "99.0")
    assert files() == 8


def test_a_folder_that_cannot_be_written_does_not_matter(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    args = (jax.ShapeDtypeStruct((4,), np.float32),)
    lowered = programs.lower(lambda x: x + 1, args, donate=(), out=None, folder=blocked / "programs", identity=())
    np.testing.assert_array_equal(lowered.compile()(np.zeros(4, np.float32)), np.ones(4))


def test_only_gpus_have_programs_on_disk():
    assert programs.programs_folder(make_mesh(1, 1)) is None
