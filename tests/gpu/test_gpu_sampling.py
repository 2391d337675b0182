"""On NVIDIA GPUs: what the filters keep, the metrics of attention, and the engine with all of it."""

import numpy as np
import pytest
from attention import test_metrics as metrics_tests
from hf_reference import make_model, save
from sampling import test_filters as filter_tests

from sharded_llama.engine.llm import LLM
from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import SamplingParams
from sharded_llama.sampling.entropy_settings import EntropySettings

SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 72, "num_pages": 512, "progress": False}
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 700,
    "vocab_size": 1031,
    "max_position_embeddings": 256,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = make_model("grouped", **MODEL, initializer_range=0.06)
    return save(model, tmp_path_factory.mktemp("model"))


def make_llm(folder, **options):
    return LLM(folder, mesh=make_mesh(), skip_tokenizer=True, dtype="float32", **SMALL | options)


@pytest.mark.gpu
class TestSampling:
    def test_filters_on_adversarial_logits(self):
        rows = filter_tests.adversarial(1031, np.random.default_rng(1))
        cases = [(row, SamplingParams(**s)) for row in rows.values() for s in filter_tests.SETTINGS]
        logits, params = np.array([c[0] for c in cases], np.float32), [c[1] for c in cases]
        filter_tests.check(logits, params, filter_tests.kept_tokens(logits, params))

    def test_the_vocabulary_of_llama_3(self):
        filter_tests.test_the_vocabulary_of_llama_3((1, 1))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_metrics_of_attention(self, dtype):
        case = metrics_tests.Case((1, 1), 2, metrics_tests.RAGGED, metrics_tests.LONG, dtype=dtype)
        bound = 1e-4 if dtype == "float32" else 5e-2
        np.testing.assert_allclose(case.ours(), case.exact(), rtol=bound, atol=bound)

    def test_speculation_changes_no_token(self, folder):
        prompts = [[1, 7, 9] * 6, list(range(3, 60)), [5]]
        params = [
            SamplingParams(temperature=t, seed=3, max_tokens=48, top_p=0.9, ignore_eos=True) for t in (0, 0.8, 1.1)
        ]
        plain = [o.outputs[0].token_ids for o in make_llm(folder).generate(prompts, params)]
        for options in ({"num_speculative_tokens": 4}, {"num_speculative_tokens": 3, "draft_model": folder}):
            llm = make_llm(folder, **options)
            assert [o.outputs[0].token_ids for o in llm.generate(prompts, params)] == plain, options
            assert llm.engine.stats().scheduler.drafted_tokens > 0
            llm.shutdown()

    def test_every_kind_of_row_in_one_batch(self, folder):
        """Each as alone."""
        llm = make_llm(folder, entropy_sampler=True)
        kinds = [
            {"temperature": 0},
            {"top_p": 0.8},
            {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
            {"allowed_token_ids": [5, 6, 7]},
            {"temperature": 0, "min_tokens": 20, "logit_bias": {9: 3.0}},
            {"entropy": EntropySettings()},
        ]
        params = [SamplingParams(seed=1, max_tokens=24, **kind) for kind in kinds]
        prompts = [list(range(3 + i, 20 + 3 * i)) for i in range(len(kinds))]
        together = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
        alone = [llm.generate([p], q)[0].outputs[0].token_ids for p, q in zip(prompts, params, strict=True)]
        assert together == alone
        assert set(together[3]) <= {5, 6, 7}
