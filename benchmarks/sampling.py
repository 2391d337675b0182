"""Times what sampling adds to decoding, on random weights.

    python -m benchmarks.sampling --config=configs/llama3_1_8b.py --mesh=data:1,model:1 --max_model_len=4096

Flags are those of `benchmarks.engine`, with `--measure` to choose among:

- sampler: milliseconds of a decode step at each of `--batches` for every kind of sampling, and over greedy's.
- constrained: milliseconds of the engine's steps at each of `--batches` while some sequences must match a regular
  expression, over the same without; needs `--tokenizer`, a folder with one of the model's vocabulary.
- speculation: tokens per second of one greedy answer that repeats its prompt, with prompt lookup and without. The
  layers' outputs are scaled to almost nothing, so that each token decides the next one and the text runs in a circle.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import engine as base
from launch import common
from sharded_llama.benchmark import steady
from sharded_llama.engine.llm import LLM
from sharded_llama.errors import ConfigError
from sharded_llama.sampling import SamplingParams
from sharded_llama.sampling.entropy_settings import EntropySettings
from sharded_llama.sampling.structured import StructuredOutputs
from sharded_llama.tokenizer import load_tokenizer

ALL = ("sampler", "constrained", "speculation")
MEASURE = flags.DEFINE_list("measure", list(ALL), f"What to measure, among {', '.join(ALL)}.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "constrained: folder of a tokenizer with the model's vocabulary.")
CONSTRAINED = flags.DEFINE_integer("constrained", 8, "constrained: sequences that have to match.", 1)
DRAFTS = flags.DEFINE_list("drafts", ["3", "7"], "speculation: guesses at a time.")

PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "logit_bias": {5: 1.0}}
FILTERS = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "all filters": FILTERS,
    "all filters and penalties": FILTERS | PENALTIES,
    "with 5 logprobs": FILTERS | PENALTIES | {"logprobs": 5},
    "top_p alone": {"temperature": 0.8, "top_p": 0.9},
    "entropy": {"entropy": EntropySettings()},
}
PATTERN = r"[a-z ]*"


def sampler(model: LLM, results: list[base.Row], rng: np.random.Generator) -> None:
    """Every kind at every batch, the same rows queued again and again."""
    with base.serving(model, results, "sampler", entropy_sampler=True) as llm:
        for batch in map(int, base.BATCHES.value):
            greedy_ms = 0.0
            for kind, settings in KINDS.items():
                params = SamplingParams(max_tokens=llm.engine.max_model_len, ignore_eos=True, seed=1, **settings)
                with base.decoding(llm.engine, batch, rng, [params] * batch) as last:
                    ms = 1e3 * base.bare_seconds(llm.engine.runner, last[0]) / last[0].n_steps
                greedy_ms = greedy_ms or ms
                row = {"what": "sampler", "batch": batch, "kind": kind, "step_ms": ms, "over_greedy": ms / greedy_ms}
                base.report(results, row)


def constrained(model: LLM, results: list[base.Row], rng: np.random.Generator) -> None:
    """The engine's steps with and without constrained sequences among as many others."""
    if TOKENIZER.value is None:
        raise ConfigError("constrained sequences need --tokenizer, a folder with one of the model's vocabulary.")
    model.tokenizer = load_tokenizer(TOKENIZER.value)
    with base.serving(model, results, "constrained") as llm:
        for batch in map(int, base.BATCHES.value):
            n, steps, ms = min(CONSTRAINED.value, batch), 2 * base.STEPS.value, {}
            plain = SamplingParams(max_tokens=llm.engine.max_model_len, ignore_eos=True, seed=1)
            unending = {token: -100.0 for token in llm.config.eos_ids}
            bound = dataclasses.replace(plain, structured_outputs=StructuredOutputs(regex=PATTERN), logit_bias=unending)
            for name, params in {"none": [plain] * batch, "some": [bound] * n + [plain] * (batch - n)}.items():
                with base.decoding(llm.engine, batch, rng, params) as last:
                    n_steps = last[0].n_steps
                    seconds, _ = steady.timed_steps(llm.engine, steps, steps * batch * n_steps)
                ms[name] = 1e3 * seconds / (steps * n_steps)
            row = {"what": "constrained", "batch": batch, "constrained": n, "plain_ms": ms["none"], "ms": ms["some"]}
            base.report(results, row | {"speed_kept": ms["none"] / ms["some"]})


def speculation(model: LLM, results: list[base.Row], rng: np.random.Generator) -> None:
    """One answer of 400 tokens to a prompt that it repeats."""
    layers = tuple(layer._replace(wo=layer.wo * 1e-8, w2=layer.w2 * 1e-8) for layer in model.weights.layers)
    circular = model.resized()
    circular.weights = model.weights._replace(layers=jax.block_until_ready(layers))
    greedy = {"temperature": 0.0, "ignore_eos": True}
    prompt: list[int] = []
    plain = 0.0
    for n in (0, *map(int, DRAFTS.value)):
        options = {"num_speculative_tokens": n} if n else {}
        with base.serving(circular, results, "speculation", max_num_seqs=32, **options) as llm:
            if not prompt:
                start = base.random_prompt(llm.config, 1, rng)
                prompt = start + list(llm.generate([start], max_tokens=1200, **greedy)[0].outputs[0].token_ids)
            rates, before = [], llm.engine.stats().scheduler
            for _ in range(3):
                seconds = time.perf_counter()
                (output,) = llm.generate([prompt], max_tokens=400, **greedy)
                rates.append(len(output.outputs[0].token_ids) / (time.perf_counter() - seconds))
            after = llm.engine.stats().scheduler
            rate = float(np.median(rates))
            plain = plain or rate
            row = {"what": "speculation", "drafts": n, "tokens_per_s": rate, "over_plain": rate / plain}
            row["drafted"] = after.drafted_tokens - before.drafted_tokens
            row["accepted"] = after.accepted_tokens - before.accepted_tokens
            base.report(results, row)


def main() -> None:
    base.check_flags()
    parts: dict[str, Callable[..., None]] = {"sampler": sampler, "constrained": constrained, "speculation": speculation}
    unknown = sorted(set(MEASURE.value) - set(parts))
    if unknown or not MEASURE.value:
        raise ConfigError(f"--measure={','.join(unknown)}: choose among {', '.join(ALL)}.")
    model = base.random_model()
    results: list[base.Row] = []
    for name in MEASURE.value:
        parts[name](model, results, np.random.default_rng(0))
    base.save(model, results)


if __name__ == "__main__":
    common.run(main)
