"""What can be proven of the compiled steps without a clock."""

import functools
import math
import re
import threading

import jax
import numpy as np
import pytest

from sharded_llama.config import LlamaConfig
from sharded_llama.engine import runner as runner_module
from sharded_llama.engine.options import EngineOptions, modes_of, sizes_of
from sharded_llama.engine.runner import Runner
from sharded_llama.engine.steps import Column, DeviceState, StepShape, forward
from sharded_llama.kv_cache import KVPages, page_bytes
from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import Mode
from sharded_llama.sampling.entropy_settings import N_SETTINGS
from sharded_llama.sampling.filters import K
from sharded_llama.sampling.params import MAX_BIAS, MAX_LOGPROBS
from sharded_llama.sampling.slots import n_words
from sharded_llama.sharding import padded, put
from sharded_llama.weights import abstract_weights, init_weights

CONFIG = LlamaConfig(
    dim=64,
    n_layers=2,
    n_heads=8,
    n_kv_heads=4,
    head_dim=8,
    ffn_dim=50,
    vocab_size=131,
    norm_eps=1e-5,
    rope_theta=1e4,
    dtype="float32",
)
MESHES = [(1, 1), (2, 1), (1, 8), (2, 4)]  # each kind: nothing, rows, all heads, both spread; (1, 8) repeats kv heads
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
SLOTS, N_PAGES, TABLE_WIDTH = 8, 100, 40  # of each data shard; tables of more than one block of the attention
DECODE, MIXED = StepShape(SLOTS, 0, 1), StepShape(SLOTS, 2, 16, SLOTS)


@functools.cache  # what one test compiled need not be compiled for another
def make_runner(mesh_shape, n_pages=N_PAGES, table_width=TABLE_WIDTH, kv_dtype="auto", decode_steps=4, entropy=False):
    mesh, data = make_mesh(*mesh_shape), mesh_shape[0]
    options = EngineOptions(
        max_num_seqs=data * DECODE.n_tokens,
        max_num_batched_tokens=data * MIXED.n_tokens,
        decode_steps=decode_steps,
        entropy_sampler=entropy,
    )
    return Runner(
        CONFIG,
        mesh,
        abstract_weights(CONFIG, mesh),
        backend="blockwise",
        sizes=sizes_of(options, mesh),
        n_pages=n_pages,
        table_width=table_width,
        kv_dtype=kv_dtype,
        modes=modes_of(options),
    )


def collectives(executable):
    """Shapes of what every collective of the compiled program gives, by kind."""
    found = {name: [] for name in COLLECTIVES}
    for shapes, name in re.findall(rf"= (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", executable.as_text()):
        found[name] += [[int(n) for n in shape.split(",") if n] for shape in re.findall(r"\[([\d,]*)\]", shapes)]
    return found


@pytest.mark.parametrize(
    ("mesh_shape", "kv_dtype"),
    [*((shape, "auto") for shape in MESHES), ((2, 4), "int8"), ((2, 4), "float8_e4m3fn")],
    ids=str,
)
def test_pages_are_updated_in_place(mesh_shape, kv_dtype):
    runner = make_runner(mesh_shape, kv_dtype=kv_dtype)
    expected = N_PAGES * page_bytes(CONFIG, runner.mesh, kv_dtype)
    for executable in (runner._forward(DECODE), runner._forward(MIXED), runner._copy_pages()):
        assert executable.memory_analysis().alias_size_in_bytes == expected


def slot_bytes(model):
    """Of one device, by what is changed: the counts of its part of the vocabulary; masks, biases, settings."""
    counts = 4 * SLOTS * padded(CONFIG.vocab_size, model) // model
    others = 4 * SLOTS * (n_words(CONFIG.vocab_size) + 2 * MAX_BIAS + N_SETTINGS)
    return counts, others


def test_what_else_stays_on_the_device_is_updated_in_place():
    runner = make_runner((2, 4))
    pages, newest = N_PAGES * page_bytes(CONFIG, runner.mesh, "auto"), 4 * SLOTS
    counts, others = slot_bytes(4)
    for executable, expected in (
        (runner._decode_several(DECODE, 4, Mode.GREEDY), pages + newest),
        (runner._choose(DECODE.n_rows, Mode.GREEDY), newest),
        (runner._choose(DECODE.n_rows, Mode.SAMPLE), newest + counts + others),
        (runner._change_slots(SLOTS), counts + others),
        (runner._count_known(), counts),
        (runner._set_tables(), 4 * SLOTS * TABLE_WIDTH),
    ):
        assert executable.memory_analysis().alias_size_in_bytes == expected


def test_greedy_steps_do_without_the_slots():
    """They are neither given nor touched: a step's arguments are logits, their normalizers, newest tokens and rows."""
    runner = make_runner((2, 4))
    rows, vocab = 2 * SLOTS, padded(CONFIG.vocab_size, 4)
    greedy, sampled = (runner._choose(DECODE.n_rows, mode) for mode in (Mode.GREEDY, Mode.SAMPLE))
    shapes = [sorted(x.shape for x in jax.tree.leaves(of.args_info)) for of in (greedy, sampled)]
    assert shapes[0] == sorted([(rows, vocab), (rows,), (rows,), (rows, Column.COUNT)])
    kept = [(rows, vocab), (rows, n_words(CONFIG.vocab_size)), (rows, MAX_BIAS), (rows, MAX_BIAS), (rows, N_SETTINGS)]
    assert shapes[1] == sorted(shapes[0] + kept)
    several = runner._decode_several(DECODE, 4, Mode.GREEDY)
    assert not {(rows, MAX_BIAS), (rows, N_SETTINGS)} & {x.shape for x in jax.tree.leaves(several.args_info)}


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_temporary_memory_does_not_grow_with_the_pool(kv_dtype):
    """Eight times the pages, the same temporaries: nothing copies or scores them all at once.

    float8 is left out: XLA for CPUs casts the whole operand of a scatter of that type.
    """
    few, many = (make_runner((2, 4), n_pages=n, kv_dtype=kv_dtype) for n in (N_PAGES, 8 * N_PAGES))
    pairs = [(few._forward(DECODE), many._forward(DECODE)), (few._copy_pages(), many._copy_pages())]
    if kv_dtype == "auto":
        pairs.append((few._forward(MIXED), many._forward(MIXED)))
        pairs.append((few._decode_several(DECODE, 4, Mode.GREEDY), many._decode_several(DECODE, 4, Mode.GREEDY)))
    for of_few, of_many in pairs:
        short, long = of_few.memory_analysis(), of_many.memory_analysis()
        assert long.alias_size_in_bytes > 7.9 * short.alias_size_in_bytes
        assert long.temp_size_in_bytes <= short.temp_size_in_bytes + 1024


@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
def test_temporary_memory_hardly_grows_with_the_context(shape):
    """Sequences of eight times the length need longer tables, four bytes for each page, and nothing else."""
    short, long = (make_runner((2, 4), table_width=w)._forward(shape) for w in (TABLE_WIDTH, 8 * TABLE_WIDTH))
    grown = long.memory_analysis().temp_size_in_bytes - short.memory_analysis().temp_size_in_bytes
    assert grown <= 3 * 4 * shape.n_rows * 7 * TABLE_WIDTH + 1024
    # One page of keys and values of the same rows is more than that of all tables.
    assert grown < shape.n_rows * page_bytes(CONFIG.replace(n_layers=1), make_mesh(2, 4), "auto") * 7


def test_no_array_is_empty():
    """XLA's compiler for several GPUs crashes on programs that are given empty arrays."""
    runner = make_runner((2, 4))
    prompts = DECODE._replace(n_single=0, n_blocks=2, block=16)
    forwards = [runner._forward(shape) for shape in (DECODE, MIXED, prompts)]
    for executable in (*forwards, runner._decode_several(DECODE, 4, Mode.GREEDY)):
        assert all(math.prod(x.shape) for x in jax.tree.leaves(executable.args_info))
        assert not re.search(r"\b(pred|[suf]\d+)\[(\d+,)*0(,\d+)*\]", executable.as_text())


@pytest.mark.parametrize("mesh_shape", [(1, 8), (2, 4)], ids=str)
def test_two_all_reduces_per_layer(mesh_shape):
    """One after attention and one after the MLP, one for the embedding; no weight moves and nothing is gathered.

    Beside the hidden states only the peak and the sum of each row's logits are reduced.
    """
    runner = make_runner(mesh_shape)
    for shape in (DECODE, MIXED):
        found = collectives(runner._forward(shape))
        hidden, others = [], []
        for of in found.pop("all-reduce"):
            (hidden if CONFIG.dim in of else others).append(of)
        assert sorted(map(math.prod, hidden)) == [shape.n_tokens * CONFIG.dim] * (2 * CONFIG.n_layers + 1)
        assert [math.prod(of) for of in others] == [shape.n_logits] * 2
        assert not any(found.values())


@pytest.mark.parametrize("mesh_shape", [(1, 8), (2, 4)], ids=str)
def test_the_greedy_sampler_exchanges_little(mesh_shape):
    """Over the vocabulary two candidates per row, the token's logit and rank; over the data what was sampled."""
    runner, (data, model) = make_runner(mesh_shape), mesh_shape
    found = collectives(runner._choose(DECODE.n_rows, Mode.GREEDY))
    sums, gathers = ([math.prod(of) for of in found.pop(kind)] for kind in ("all-reduce", "all-gather"))
    assert not any(found.values())
    assert sums == [SLOTS] * 2
    # Peaks and their tokens; then the tokens, their log-probabilities and ranks.
    assert sorted(gathers) == sorted([model * SLOTS] * 2 + [data * SLOTS] * 3)


@pytest.mark.parametrize(("mesh_shape", "mode"), [((2, 4), Mode.SAMPLE), ((1, 8), Mode.LOGPROBS)], ids=str)
def test_the_sampler_gathers_candidates_alone(mesh_shape, mode):
    """Of each device at most K most likely tokens of a row, never the row; sums of a number or so per row."""
    runner, (data, model) = make_runner(mesh_shape), mesh_shape
    found = collectives(runner._choose(DECODE.n_rows, mode))
    sums, gathers = ([math.prod(of) for of in found.pop(kind)] for kind in ("all-reduce", "all-gather"))
    assert not any(found.values())
    n_local = padded(CONFIG.vocab_size, model) // model
    candidates = [model * SLOTS * min(K, n_local)] * 2
    winners, sampled = [model * SLOTS] * 2, [data * SLOTS] * 3
    if mode == Mode.LOGPROBS:
        of_shards = [model * SLOTS * min(MAX_LOGPROBS, n_local)] * 2
        sampled = sampled + of_shards + [data * SLOTS * MAX_LOGPROBS] * 2
    assert sorted(gathers) == sorted(candidates + winners + sampled)
    assert max(sums) <= SLOTS
    assert len(sums) <= 16, "a fixed number, some of them in the loop of the search"


def test_candidates_do_not_grow_with_the_vocabulary():
    """With 40 times the vocabulary a shard gives K tokens of a row, and no collective has more numbers."""
    config = CONFIG.replace(vocab_size=40 * 131)
    mesh = make_mesh(1, 8)
    options = EngineOptions(max_num_seqs=2, max_num_batched_tokens=40, decode_steps=1)
    runner = Runner(
        config,
        mesh,
        abstract_weights(config, mesh),
        backend="blockwise",
        sizes=sizes_of(options, mesh),
        n_pages=N_PAGES,
        table_width=TABLE_WIDTH,
        kv_dtype="auto",
    )
    found = collectives(runner._choose(2, Mode.SAMPLE))
    most = max(math.prod(of) for by_kind in found.values() for of in by_kind)
    assert most == 8 * 2 * K < config.vocab_size * 2


def test_the_entropy_sampler_off_costs_nothing():
    """Plain steps are the same programs with it on, and with it off there are no others; steps with metrics differ."""
    off, on = make_runner((1, 2)), make_runner((1, 2), entropy=True)
    assert off.sizes == on.sizes
    pairs = [(r._forward(DECODE), r._choose(DECODE.n_rows, Mode.GREEDY)) for r in (off, on)]
    for plain, beside in zip(*pairs, strict=True):
        assert program(plain) == program(beside)
    with_metrics = on._forward(DECODE, True)
    assert program(with_metrics) != program(pairs[1][0])
    rows = 1 * SLOTS
    extra = [(rows, 4), (rows,)]  # of the attention; the token that each row ends with
    shapes = [sorted(x.shape for x in jax.tree.leaves(of.out_info)) for of in (pairs[1][0], with_metrics)]
    assert shapes[1] == sorted(shapes[0] + extra)


def program(executable):
    """The text of an executable without where in the source an operation comes from."""
    text = re.sub(r", metadata=\{[^}]*\}", "", executable.as_text())
    return re.sub(r"stack_frame_id=\d+", "", text.split("\nFileNames")[0])


def test_several_decode_steps_are_one_loop_around_the_same_collectives():
    """Its body is there once, however many steps it runs."""
    runner = make_runner((2, 4))
    found = [collectives(runner._decode_several(DECODE, n, Mode.GREEDY)) for n in (2, 4)]
    for by_kind in found:
        hidden = [of for of in by_kind["all-reduce"] if CONFIG.dim in of]
        assert len(hidden) == 2 * CONFIG.n_layers + 1
        assert not by_kind["all-to-all"] + by_kind["collective-permute"] + by_kind["reduce-scatter"]
        assert all(math.prod(of) <= 8 * SLOTS for of in by_kind["all-gather"]), "more than the rows' candidates"
    assert {kind: len(of) for kind, of in found[0].items()} == {kind: len(of) for kind, of in found[1].items()}


def test_changes_of_tables_and_pages_stay_on_their_devices():
    runner = make_runner((2, 4))
    changes = (runner._set_tables(), runner._copy_pages(), runner._change_slots(SLOTS), runner._count_known())
    for executable in changes:
        assert not any(collectives(executable).values())


def test_one_compilation_per_shape():
    runner = make_runner.__wrapped__((1, 2))
    first = runner._forward(DECODE)
    assert runner._forward(DECODE) is first
    assert runner.n_compiled == 1
    runner._forward(MIXED)
    for _ in range(2):
        runner._choose(DECODE.n_rows, Mode.GREEDY)
        runner._choose(DECODE.n_rows, Mode.SAMPLE)
        runner._change_slots(SLOTS)
    assert runner.n_compiled == 5


def test_on_gpus_products_of_few_rows_are_measured_before_others_are_compiled(monkeypatch):
    """The GPU has nothing else to do then. Meanwhile Python goes on with the others."""
    runner = make_runner.__wrapped__((1, 2), decode_steps=2)
    few, compiled, all_traced = MIXED.n_tokens, [], threading.Event()
    monkeypatch.setattr(runner_module, "MANY_TOKENS", few)
    monkeypatch.setattr(Runner, "_on_gpu", True)
    traced = []

    class Lowered:
        def __init__(self, key):
            self.tuned = key[0] in ("forward", "decode_several") and key[1].n_tokens < few

        def compile(self, compiler_options):
            assert not self.tuned or all_traced.wait(60)
            compiled.append(self)
            return compiler_options

    def lower(*_, identity, **__):
        traced.append(Lowered(identity[0]))
        if len(traced) == n_jobs:
            all_traced.set()
        return traced[-1]

    monkeypatch.setattr(runner_module, "lower", lower)
    n_jobs = len(runner._all_jobs())
    runner.compile_all(progress=False)
    n_tuned = sum(lowered.tuned for lowered in traced)
    assert 0 < n_tuned < n_jobs == len(compiled)
    assert all(lowered.tuned for lowered in compiled[:n_tuned])
    of_many = [x for key, x in runner._compiled.items() if key[0] == "forward" and key[1].n_tokens >= few]
    of_few = [x for key, x in runner._compiled.items() if key[0] == "forward" and key[1].n_tokens < few]
    assert of_many
    assert all(options["xla_gpu_autotune_level"] == 0 for options in of_many)
    assert of_few
    assert not any("xla_gpu_autotune_level" in (options or {}) for options in of_few)


@pytest.mark.parametrize("entropy", [False, True])
def test_every_shape_can_be_compiled_ahead(monkeypatch, entropy):
    """Each once; what a step may ask for afterwards is there."""
    runner = make_runner.__wrapped__((1, 2), decode_steps=2, entropy=entropy)
    asked = []
    monkeypatch.setattr(runner, "_compile", lambda key, *args, **kwargs: asked.append(key))
    runner.compile_all(progress=False)
    ahead, shapes = set(asked), runner.sizes.shapes
    assert len(ahead) == len(asked)
    asked.clear()
    for shape in shapes:
        for mode in Mode if entropy else list(Mode)[:-1]:
            runner._forward(shape, mode == Mode.ENTROPY)
            runner._choose(shape.n_logits, mode)
            if not shape.n_blocks:
                runner._decode_several(shape, 2, mode)
    for n_changes in runner.slot_changes:
        runner._change_slots(n_changes)
    runner._count_known()
    runner._set_tables()
    runner._copy_pages()
    assert set(asked) == ahead


def test_steps_leave_nothing_on_the_host():
    """No callback, infeed or outfeed: tokens stay on the device until they are read."""
    runner = make_runner((2, 4))
    steps = [runner._forward(DECODE), runner._choose(DECODE.n_rows, Mode.SAMPLE)]
    steps.append(runner._decode_several(DECODE, 4, Mode.GREEDY))
    for executable in steps:
        assert not re.search(r"infeed|outfeed|callback|SendToHost|host_transfer", executable.as_text(), re.IGNORECASE)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 2)], ids=str)
def test_logits_of_chosen_rows_are_those_of_all(mesh_shape):
    """In the order in which they are named, with what the rows say of sampling; what names no row is not used."""
    mesh, data = make_mesh(*mesh_shape), mesh_shape[0]
    weights = init_weights(jax.random.key(0), CONFIG, mesh=mesh)
    n_rows, rng = MIXED.n_rows, np.random.default_rng(0)
    rows = np.zeros((data, n_rows, Column.COUNT), np.int32)
    rows[..., Column.TOKEN] = rng.integers(0, CONFIG.vocab_size, (data, n_rows))
    rows[..., Column.SLOT] = np.arange(n_rows)
    rows[..., Column.TOP_K :] = rng.integers(0, 99, (data, n_rows, Column.COUNT - Column.TOP_K))
    rows[:, :, Column.LENGTH] = rng.integers(1, 17, (data, n_rows))
    rows[:, : MIXED.n_single, Column.LENGTH] = 1
    tables = np.arange(data * n_rows * 4, dtype=np.int32).reshape(data, n_rows, 4) % (4 * n_rows)
    tokens_CQ = rng.integers(0, CONFIG.vocab_size, (data * MIXED.n_blocks, MIXED.block)).astype(np.int32)

    def run(n_chosen, chosen):
        rows[:, :, Column.CHOSEN] = chosen
        state = DeviceState(
            KVPages.new(CONFIG, mesh, 4 * n_rows, "auto"),
            put(mesh, "tokens", tables.reshape(data * n_rows, 4)),
            put(mesh, "tokens", np.zeros(data * n_rows, np.int32)),
        )
        static = {"config": CONFIG, "mesh": mesh, "backend": "blockwise", "n_chosen": n_chosen}
        args = [put(mesh, "tokens", x) for x in (rows.reshape(-1, Column.COUNT), tokens_CQ)]
        forwarded, pages, of_rows = jax.jit(functools.partial(forward, **static))(weights, state, *args)
        logits = np.asarray(forwarded.logits_RV).reshape(data, n_chosen or n_rows, -1)
        return logits, np.asarray(of_rows).reshape(*logits.shape[:2], -1), [np.asarray(p.kv_NPGK) for p in pages]

    every, _, pages = run(0, 0)
    for chosen in ([9, 0, 3, 8, 7], [8], list(range(n_rows))):
        named = np.pad(chosen, (0, n_rows - len(chosen)), constant_values=n_rows)
        n_chosen = n_rows + 2  # more than there are rows at all
        logits, of_rows, same_pages = run(n_chosen, named)
        np.testing.assert_allclose(logits[:, : len(chosen)], every[:, chosen], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(of_rows[:, : len(chosen)], rows[:, chosen])
        assert not of_rows[:, len(chosen) :].any()
        for a, b in zip(pages, same_pages, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
