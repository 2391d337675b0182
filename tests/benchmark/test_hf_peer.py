"""transformers as a peer runs the very same model, and its cache is where it should be when it is timed again."""

import pytest
import torch

from sharded_llama.benchmark.peers import complete, hf
from sharded_llama.checkpoint import save_weights
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.llm import LLM
from sharded_llama.mesh import make_mesh

PROMPTS = [[1, 5, 9, 2, 60, 33, 7], [3, 3, 12, 50, 4, 8, 20]]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(our model, the peer with its weights)."""
    config = LlamaConfig(
        **{"n_layers": 2, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 48, "vocab_size": 64},
        norm_eps=1e-5,
        rope_theta=1e4,
        max_seq_len=64,
        dtype="float32",
    )
    folder = tmp_path_factory.mktemp("peer") / "weights"
    llm = LLM.random(config, make_mesh(1, 1), progress=False, max_num_seqs=2, decode_steps=1)
    save_weights(llm.weights, config, folder)
    return llm, hf.HfPeer(folder, "float32")


def test_the_answers_are_ours(both):
    llm, peer = both
    ours = llm.generate(PROMPTS, temperature=0.0, max_tokens=8, ignore_eos=True)
    theirs = peer.answers(torch.tensor(PROMPTS), 8)
    assert [list(output.outputs[0].token_ids) for output in ours] == theirs
    assert len({tuple(answer) for answer in theirs}) == 2


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_goes_back_to_where_it_was(kind, both):
    _, peer = both
    expected = peer.answers(torch.tensor(PROMPTS), 5)
    cache = peer._static(7 + 4) if kind == "static" else hf.DynamicCache(config=peer._model.config)
    first = peer._next(torch.tensor(PROMPTS), cache)
    for _ in range(2):
        token, answers = first, [first]
        for _ in range(4):
            token = peer._next(token, cache)
            answers.append(token)
        assert torch.cat(answers, dim=1).tolist() == expected
        hf._rewind(cache, 7, 4)


def test_rows_get_their_times(both):
    _, peer = both
    rows = [
        {"what": "decode", "batch": 2, "context": 10.3, "ms": 2.0},
        {"what": "prefill", "rows": 2, "tokens": 9, "ms": 4.0},
        {"what": "throughput", "requests": 3, "input_len": 5, "output_len": 4, "at_once": 2, "seconds": 0.5},
    ]
    decode, prefill, run = complete(rows, "hf", peer, steps=4, rounds=2, rest_ms=0)
    for row, unit in ((decode, "ms"), (prefill, "ms"), (run, "seconds")):
        assert row[f"hf_{unit}"] > 0
        assert row["speed_ours_over_peer"] == pytest.approx(row[f"hf_{unit}"] / row[unit])
    assert len(decode["hf_samples"]) == len(prefill["hf_samples"]) == 2
