"""vLLM as a peer: its offline LLM class with dummy weights of the same shapes."""

import os
import random
import time
from collections.abc import Callable
from typing import Any


class VllmPeer:
    """A `Peer`. vLLM generates whole answers alone, so a decode step is the difference of two of them."""

    def __init__(self, folder: str | os.PathLike[str], dtype: str, max_model_len: int, max_num_seqs: int):
        """Makes vLLM's engine of the config.json in `folder`; no weights are read."""
        import vllm

        self._vllm = vllm
        self._llm = vllm.LLM(
            model=str(folder),
            dtype=dtype,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=False,
        )
        self._vocab_size = self._llm.llm_engine.model_config.get_vocab_size()
        self._random = random.Random(0)

    def decode_sampler(self, batch: int, context: int, steps: int) -> Callable[[], float]:
        """See `Peer`."""
        prompts = self._prompts(batch, max(1, context - steps // 2))

        def sample() -> float:
            short, long = self._seconds(prompts, 1), self._seconds(prompts, 1 + steps)
            return 1e3 * (long - short) / steps

        return sample

    def prefill_ms(self, rows: int, tokens: int) -> float:
        """See `Peer`."""
        return 1e3 * self._seconds(self._prompts(rows, tokens), 1)

    def generate_s(self, n: int, n_in: int, n_out: int, concurrency: int) -> float:
        """See `Peer`. max_num_seqs is what bounds the requests under way."""
        del concurrency
        self._seconds(self._prompts(1, n_in), 2)
        return self._seconds(self._prompts(n, n_in), n_out)

    def _prompts(self, rows: int, tokens: int) -> list[dict[str, Any]]:
        draw = self._random
        return [{"prompt_token_ids": [draw.randrange(self._vocab_size) for _ in range(tokens)]} for _ in range(rows)]

    def _seconds(self, prompts: list[dict[str, Any]], n_out: int) -> float:
        params = self._vllm.SamplingParams(temperature=0.0, max_tokens=n_out, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        self._llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start
