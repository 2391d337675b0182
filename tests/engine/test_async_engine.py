"""The engine behind asyncio: many requests at once, cancellation, failures and the end; nothing ever hangs.

The time limit of `finish` only ends a test that hangs.
"""

import asyncio
import contextlib
import dataclasses
import gc
import threading

import jax
import numpy as np
import pytest
from hf_reference import make_model, save

from sharded_llama.engine.async_engine import AsyncEngine
from sharded_llama.engine.compilation import left_out_of_garbage_collection
from sharded_llama.engine.engine import Engine
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.loading import load_model
from sharded_llama.engine.options import EngineOptions
from sharded_llama.errors import EngineError, RequestError
from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import SamplingParams
from sharded_llama.tokenizer import TokenKind

VOCAB = 131
OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 40, "num_pages": 12, "decode_steps": 1}
LONG = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
PERMITS = 1000  # more steps than any test needs


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    model = make_model("grouped", num_hidden_layers=2, max_position_embeddings=96, eos_token_id=None)
    folder = save(model, tmp_path_factory.mktemp("model"))
    return load_model(folder, mesh=make_mesh(1, 1), skip_tokenizer=True, progress=False)


@pytest.fixture
def engine(loaded):
    return Engine(loaded.config, loaded.mesh, loaded.weights, EngineOptions(**OPTIONS))


@pytest.fixture
def serving(engine):
    made = AsyncEngine(engine)
    yield made
    made.shutdown()


@pytest.fixture
def permits(engine, monkeypatch):
    """Steps wait for permits, so that a test says how far the engine's thread is."""
    permits, step = threading.Semaphore(0), engine.step

    def permitted():
        permits.acquire()
        return step()

    monkeypatch.setattr(engine, "step", permitted)
    yield permits
    permits.release(PERMITS)


def finish(coroutine):
    async def limited():
        return await asyncio.wait_for(coroutine, 60)

    return asyncio.run(limited())


async def collect(serving, name, prompt, params, **kwargs):
    """Tokens of each of the n answers."""
    tokens, ended = [[] for _ in range(params.n)], set()
    async for delta in serving.generate(name, prompt, params, **kwargs):
        assert delta.request_id == name
        assert delta.index not in ended, "a delta after the last"
        tokens[delta.index] += delta.token_ids
        if delta.finish_reason:
            ended.add(delta.index)
    assert len(ended) == params.n
    return tokens


class Letters:
    """A tokenizer that has a letter for every id."""

    bos_id, adds_bos, vocab_size = None, False, VOCAB

    def encode(self, text, bos=False, special=False):
        return [ord(c) - 0x100 for c in text]

    def decode(self, ids, skip_special=True):
        return "".join(chr(0x100 + i) for i in ids)

    def kind(self, token_id):
        return TokenKind.TEXT


@pytest.fixture
def speaking(engine):
    made = AsyncEngine(engine, Letters())
    yield made
    made.shutdown()


async def collect_text(speaking, name, prompt, params):
    """(text, tokens, finish and stop reason) of each of the n answers."""
    found = [("", ())] * params.n
    async for event in speaking.stream(name, prompt, params):
        text, tokens, *ended = found[event.index]
        assert not any(ended), "an event after the last"
        ended = (event.finish_reason, event.stop_reason) if event.finish_reason else ()
        found[event.index] = (text + event.text, tokens + event.token_ids, *ended)
    return found


def summary(request):
    return [(o.text, o.token_ids, o.finish_reason, o.stop_reason) for o in request.outputs]


async def first_delta(serving, permits, name, params=LONG):
    """The iterator of a request that has had its first token, and no further step."""
    answers = serving.generate(name, [5, 6, 7], params)
    permits.release(2)  # the engine reads a step after it has queued the next one
    await anext(answers)
    return answers


async def stats_after_a_step(serving, permits):
    """Of a thread that may be waiting for a permit."""
    asked = asyncio.create_task(serving.stats())
    await asyncio.sleep(0)
    permits.release()
    return await asked


def requests(n):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, rng.integers(1, 31)).tolist() for _ in range(n)]
    params = [
        SamplingParams(temperature=i % 2, seed=i, n=1 + (i % 5 == 0), max_tokens=int(rng.integers(1, 20)))
        for i in range(n)
    ]
    return prompts, params


def test_many_at_once_equal_generate(loaded, serving):
    prompts, params = requests(60)
    expected = LLM(loaded, **OPTIONS, progress=False).generate(prompts, params)

    async def all_of_them():
        return await asyncio.gather(
            *(collect(serving, str(i), *request) for i, request in enumerate(zip(prompts, params, strict=True)))
        )

    for ours, theirs in zip(finish(all_of_them()), expected, strict=True):
        assert ours == [list(output.token_ids) for output in theirs.outputs]


def test_an_iteration_for_each_event_loop(serving):
    """The engine outlives a loop, and serves the next one."""
    first = finish(collect(serving, "a", [5, 6], SHORT))
    assert finish(collect(serving, "a", [5, 6], SHORT)) == first


def test_requests_may_come_from_several_threads(serving):
    prompts, params = requests(4)
    alone = [finish(collect(serving, "alone", *request)) for request in zip(prompts, params, strict=True)]
    found = {}

    def ask(i):
        found[i] = finish(collect(serving, str(i), prompts[i], params[i]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == alone


def test_a_cancelled_task_aborts_its_request_alone(serving, engine, permits):
    async def scenario():
        doomed = asyncio.create_task(collect(serving, "doomed", [5, 6, 7], LONG))
        other = asyncio.create_task(collect(serving, "other", [8, 9], LONG))
        while (await stats_after_a_step(serving, permits)).scheduler.running < 2:
            pass
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        assert (await stats_after_a_step(serving, permits)).scheduler.running == 1
        assert not other.done()
        permits.release(PERMITS)
        (tokens,) = await other
        assert (await serving.stats()).scheduler.pages_used == 0
        return tokens

    tokens = finish(scenario())
    assert len(tokens) == 90
    assert [tokens] == finish(collect(serving, "again", [8, 9], LONG))
    engine._scheduler.check()


@pytest.mark.parametrize("way", ["close", "break"])
def test_leaving_the_iteration_aborts(serving, engine, permits, way):
    async def scenario():
        if way == "close":
            answers = await first_delta(serving, permits, "left")
            await answers.aclose()
        else:
            permits.release(2)
            async for _ in serving.generate("left", [5, 6, 7], LONG):
                break
            for _ in range(3):  # the loop closes what nobody refers to any more
                await asyncio.sleep(0)
        permits.release(PERMITS)
        stats = await serving.stats()
        assert (stats.scheduler.running, stats.scheduler.pages_used) == (0, 0)
        assert stats.seconds.new_tokens < 10
        return await collect(serving, "left", [5, 6], SHORT)  # the name is free again

    assert len(finish(scenario())[0]) == 5
    assert not engine.has_unfinished


def test_a_loop_that_ends_takes_its_requests_with_it(serving, engine, permits):
    async def scenario():
        answers = await first_delta(serving, permits, "orphan")
        return answers.__anext__()

    finish(scenario()).close()
    permits.release(PERMITS)
    assert len(finish(collect(serving, "next", [5, 6], SHORT))[0]) == 5
    assert not engine.has_unfinished
    assert engine.stats().scheduler.pages_used == 0


def test_a_mistake_reaches_its_own_caller_alone(serving):
    async def scenario():
        return await asyncio.gather(
            collect(serving, "good", [5, 6], SHORT),
            collect(serving, "bad", [VOCAB], SHORT),
            collect(serving, "empty", [], SHORT),
            collect(serving, "fine", [5, 6], SHORT),
            return_exceptions=True,
        )

    good, bad, empty, fine = finish(scenario())
    assert good == fine
    assert isinstance(bad, RequestError)
    assert "token id 131" in str(bad)
    assert isinstance(empty, RequestError)
    assert "no tokens" in str(empty)


def test_a_second_request_of_the_same_name_leaves_the_first_alone(serving, permits):
    async def scenario():
        first = await first_delta(serving, permits, "twice", SHORT)
        second = asyncio.create_task(collect(serving, "twice", [8], SHORT))
        third = asyncio.create_task(collect(serving, "twice", [9], SHORT))
        await asyncio.sleep(0)
        third.cancel()  # before it has heard that it was refused
        with pytest.raises(asyncio.CancelledError):
            await third
        permits.release(PERMITS)
        with pytest.raises(RequestError, match="'twice' is being served already"):
            await second
        return 1 + sum([len(delta.token_ids) async for delta in first])

    assert finish(scenario()) == 5


def fail(*_):
    raise RuntimeError("the device is on fire")


def test_a_failing_step_ends_every_request(serving, engine, permits, monkeypatch):
    async def scenario():
        started = await first_delta(serving, permits, "started")
        monkeypatch.setattr(engine.runner, "execute", fail)
        tasks = [asyncio.create_task(collect(serving, f"r{i}", [5 + i], LONG)) for i in range(20)]
        await asyncio.sleep(0)
        permits.release(PERMITS)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(EngineError, match="a step failed with RuntimeError: the device is on fire"):
            async for _ in started:
                pass
        for error in found:
            assert isinstance(error, EngineError)
            assert "the device is on fire" in str(error)
        for _ in range(2):
            with pytest.raises(EngineError, match="the engine is dead: a step failed with RuntimeError"):
                await collect(serving, "later", [5], SHORT)

    finish(scenario())


def test_an_error_of_one_answer_reaches_its_own_caller_alone(speaking, engine):
    """After a token of this model no logits are numbers."""

    async def scenario():
        expected = await speaking.answer("alone", [5, 6], SHORT)
        token = next(t for t in range(7, VOCAB) if t not in expected.outputs[0].token_ids)
        weights = engine.runner.weights
        table = np.array(weights.tok_embeddings)
        table[token] = np.nan
        table = jax.device_put(table, weights.tok_embeddings.sharding)
        engine.runner.weights = weights._replace(tok_embeddings=table)
        says_it = dataclasses.replace(SHORT, logit_bias={token: 100.0})
        good, whole, tokens, events = await asyncio.gather(
            speaking.answer("good", [5, 6], SHORT),
            speaking.answer("whole", [5, 6], says_it),
            collect(speaking, "tokens", [5, token], dataclasses.replace(SHORT, n=2)),
            collect_text(speaking, "events", [5, 6], says_it),
        )
        assert good.outputs == expected.outputs
        (cut,) = whole.outputs
        error = "the model's logits for the next token are not numbers"
        assert (cut.token_ids, cut.finish_reason, cut.error) == ((token,), "error", error)
        assert tokens == [[], []]
        assert events == [(chr(0x100 + token), (token,), "error", None)]
        deltas = [delta async for delta in speaking.generate("deltas", [token], SHORT)]
        assert [(d.token_ids, d.finish_reason, d.error) for d in deltas] == [((), "error", error)]
        last = [event async for event in speaking.stream("last", [token], SHORT)]
        assert [(e.text, e.finish_reason, e.error) for e in last] == [("", "error", error)]
        assert await speaking.answer("good", [5, 6], SHORT) == dataclasses.replace(expected, request_id="good")

    finish(scenario())
    assert not engine.is_dead
    assert engine.stats().scheduler.pages_used == 0


def test_who_is_not_named_by_a_step_that_failed_hears_of_it(serving, engine, permits, monkeypatch):
    """Nobody may wait for what the engine has forgotten."""

    async def scenario():
        started = await first_delta(serving, permits, "started")
        monkeypatch.setattr(engine, "_step", lambda new: engine._sequences.clear() or fail())
        permits.release(PERMITS)
        with pytest.raises(EngineError, match="the engine is dead"):
            async for _ in started:
                pass

    finish(scenario())


def test_an_engine_that_raises_ends_every_request(serving, engine, monkeypatch):
    """Even an error that the engine did not catch itself."""
    monkeypatch.setattr(engine, "step", fail)

    async def scenario():
        tasks = [asyncio.create_task(collect(serving, f"r{i}", [5 + i], LONG)) for i in range(5)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(error) for error in found} <= {RuntimeError, EngineError}
        with pytest.raises(EngineError, match="dead"):
            await collect(serving, "later", [5], SHORT)

    finish(scenario())


def test_what_was_there_before_is_not_searched_for_garbage_while_serving(engine):
    was_frozen = gc.get_freeze_count()
    gc.unfreeze()
    try:
        serving = AsyncEngine(engine)
        finish(collect(serving, "a", [5, 6, 7], SHORT))
        assert gc.get_freeze_count() > 0
        serving.shutdown()
        assert gc.get_freeze_count() == 0
        gc.freeze()
        with left_out_of_garbage_collection():
            pass
        assert gc.get_freeze_count() > 0  # what somebody else has done stays
    finally:
        gc.unfreeze()
        if was_frozen:
            gc.freeze()


def test_shutdown_ends_everything(serving, engine, permits):
    async def scenario():
        started = await first_delta(serving, permits, "started")
        waiting = [asyncio.create_task(collect(serving, f"r{i}", [5 + i], LONG)) for i in range(20)]
        await asyncio.sleep(0)
        permits.release(PERMITS)
        await asyncio.to_thread(serving.shutdown)
        with pytest.raises(EngineError, match="the engine is dead: it was shut down"):
            async for _ in started:
                pass
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, EngineError)
            assert "shut down" in str(error)
        with pytest.raises(EngineError, match="shut down"):
            await collect(serving, "later", [5], SHORT)
        with pytest.raises(EngineError, match="shut down"):
            await serving.stats()

    finish(scenario())
    serving.shutdown()  # a second time does nothing
    assert not serving._thread.is_alive()
    assert engine.runner.state is None, "the cache is free"


def test_calls_that_meet_the_shutdown_end(serving):
    """Requests and statistics that other threads ask for around a shutdown get an answer or an error."""
    barrier, found = threading.Barrier(9), []

    async def ask(i):
        if i % 2:
            return await serving.stats()
        return await collect(serving, str(i), [5 + i], SHORT)

    def asking(i):
        barrier.wait()
        for _ in range(50):
            try:
                finish(ask(i))
            except EngineError as error:
                found.append(str(error))
                return

    threads = [threading.Thread(target=asking, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    barrier.wait()
    serving.shutdown()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all("shut down" in message for message in found)


def test_texts_equal_those_of_generate(loaded):
    """Streamed and whole, with stop strings that end some answers, and the best of several."""
    prompts, params = requests(12)
    params = [dataclasses.replace(p, max_tokens=20, logprobs=1, prompt_logprobs=0) for p in params]
    llm = LLM(dataclasses.replace(loaded, tokenizer=Letters()), **OPTIONS, progress=False)
    texts = [request.outputs[0].text for request in llm.generate(prompts, params)]
    params = [
        dataclasses.replace(p, stop=[text[i : i + 2]]) for i, (p, text) in enumerate(zip(params, texts, strict=True))
    ]
    expected = llm.generate(prompts, params)
    best = [dataclasses.replace(p, best_of=4, n=2, logprobs=None) for p in params]
    expected_best = llm.generate(prompts, best)
    speaking = AsyncEngine(llm.engine, Letters())

    async def all_of_them():
        numbered = list(enumerate(zip(prompts, params, best, strict=True)))
        streams = [collect_text(speaking, f"s{i}", prompt, p) for i, (prompt, p, _) in numbered]
        whole = [speaking.answer(f"w{i}", prompt, p) for i, (prompt, p, _) in numbered]
        chosen = [speaking.answer(f"b{i}", prompt, p) for i, (prompt, _, p) in numbered]
        found = await asyncio.gather(*streams, *whole, *chosen)
        assert (await speaking.stats()).scheduler.pages_used == 0
        return found[:12], found[12:24], found[24:]

    streamed, whole, chosen = finish(all_of_them())
    speaking.shutdown()
    for ours, theirs in zip(streamed, expected, strict=True):
        assert ours == summary(theirs)
    for i, (ours, theirs) in enumerate(zip([*whole, *chosen], [*expected, *expected_best], strict=True)):
        assert ours.request_id == ("w" if i < 12 else "b") + str(i % 12)
        assert (summary(ours), ours.prompt_token_ids) == (summary(theirs), theirs.prompt_token_ids)
        assert [o.logprobs is None for o in ours.outputs] == [i >= 12] * len(ours.outputs)
        assert [x and list(x) for x in ours.prompt_logprobs] == [None, *([t] for t in ours.prompt_token_ids[1:])]
    assert sum(o.finish_reason == "stop" for request in whole for o in request.outputs) >= 12


def test_a_stop_string_ends_one_answer_in_the_engine(speaking):
    async def scenario():
        long = dataclasses.replace(LONG, n=2, temperature=1.0, seed=1)
        free = await speaking.answer("free", [5, 6, 7], long)
        first, second = (o.text for o in free.outputs)
        stop = next(first[i : i + 2] for i in range(60) if first[i : i + 2] not in second)
        made = (await speaking.stats()).seconds.new_tokens
        found = await collect_text(speaking, "one", [5, 6, 7], dataclasses.replace(long, stop=stop))
        made = (await speaking.stats()).seconds.new_tokens - made
        at = first.index(stop)
        assert found[0] == (first[:at], free.outputs[0].token_ids[: at + 2], "stop", stop)
        assert found[1][0] == second
        assert at + 2 + 90 <= made < 180
        again = await collect_text(speaking, "one", [5, 6, 7], dataclasses.replace(long, n=1, stop=stop))
        assert again == found[:1]  # all have ended in the engine, and so the name is free
        stats = await speaking.stats()
        assert (stats.scheduler.running, stats.scheduler.pages_used) == (0, 0)

    finish(scenario())


def test_leaving_a_stream_of_text_aborts(speaking, engine, permits):
    async def scenario():
        permits.release(2)
        async with contextlib.aclosing(speaking.stream("left", [5, 6, 7], LONG)) as events:
            async for event in events:
                assert len(event.text) == len(event.token_ids) == 1
                break
        permits.release(PERMITS)
        stats = await speaking.stats()
        assert (stats.scheduler.running, stats.scheduler.pages_used) == (0, 0)
        assert stats.seconds.new_tokens < 10
        assert len((await collect_text(speaking, "left", [5, 6], SHORT))[0][0]) == 5

    finish(scenario())


def test_what_cannot_be_streamed(serving, engine):
    async def scenario():
        with pytest.raises(RequestError, match="stop strings need a tokenizer"):
            await collect_text(serving, "a", [5], dataclasses.replace(SHORT, stop="x"))
        with pytest.raises(RequestError, match="best_of=2 with n=1 cannot be streamed"):
            await collect_text(serving, "a", [5], dataclasses.replace(SHORT, best_of=2))
        with pytest.raises(RequestError, match="token id 131"):
            await serving.answer("a", [VOCAB], SHORT)
        assert (await serving.answer("a", [5], SHORT)).outputs[0].text == ""

    finish(scenario())


def test_a_failing_step_ends_texts(speaking, engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "execute", fail)

    async def scenario():
        calls = (collect_text(speaking, "a", [5], LONG), speaking.answer("b", [6], LONG))
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, EngineError)
            assert "the device is on fire" in str(error)

    finish(scenario())
