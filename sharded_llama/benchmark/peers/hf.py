"""transformers' LlamaForCausalLM as a peer: greedy, with a KV cache, in torch.inference_mode."""

import os
import time
from collections.abc import Callable

import torch
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache

from ...parity.torch_reference import torch_device, torch_dtype


class HfPeer:
    """A `Peer`. Attention is torch's scaled_dot_product_attention, transformers' default."""

    def __init__(self, folder: str | os.PathLike[str], dtype: str, device: str = "cpu"):
        """Loads a Hugging Face folder, in `dtype`, onto `device`."""
        self._device = torch_device(device)
        model = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch_dtype(dtype), attn_implementation="sdpa", local_files_only=True, use_safetensors=True
        )
        self._model = model.eval().to(self._device)
        self._random = torch.Generator().manual_seed(0)

    def decode_sampler(self, batch: int, context: int, steps: int) -> Callable[[], float]:
        """See `Peer`. Whichever of DynamicCache and StaticCache is the faster one the first time."""
        start = max(1, context - steps // 2)
        prompts = self._prompts(batch, start)
        samplers = []
        for cache in (DynamicCache(config=self._model.config), self._static(start + steps)):
            first = self._next(prompts, cache)

            def sample(cache: Cache = cache, first: torch.Tensor = first) -> float:
                ms = self._decode_ms(cache, first, steps)
                _rewind(cache, start, steps)
                return ms

            sample()  # warms up
            samplers.append(sample)
        return min(samplers, key=lambda sample: sample())

    def prefill_ms(self, rows: int, tokens: int) -> float:
        """See `Peer`."""
        prompts = self._prompts(rows, tokens)
        self._wait()
        start = time.perf_counter()
        self._next(prompts.to(self._device), DynamicCache(config=self._model.config)).tolist()
        return 1e3 * (time.perf_counter() - start)

    def generate_s(self, n: int, n_in: int, n_out: int, concurrency: int) -> float:
        """See `Peer`. In batches of `concurrency`, one after the other, as transformers has no other way."""
        self.prefill_ms(1, n_in)
        prompts = self._prompts(n, n_in)
        start = time.perf_counter()
        for batch in prompts.split(concurrency):
            self.answers(batch, n_out)
        return time.perf_counter() - start

    def answers(self, prompts: torch.Tensor, n_out: int) -> list[list[int]]:
        """The greedy answers of `n_out` tokens to prompts (B, L)."""
        cache = DynamicCache(config=self._model.config)
        tokens = [self._next(prompts.to(self._device), cache)]
        for _ in range(n_out - 1):
            tokens.append(self._next(tokens[-1], cache))
        return torch.cat(tokens, dim=1).tolist()

    def _decode_ms(self, cache: Cache, token: torch.Tensor, steps: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            token = self._next(token, cache)
        token.tolist()
        return 1e3 * (time.perf_counter() - start) / steps

    @torch.inference_mode()
    def _next(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """The most likely next tokens (B, 1) after tokens (B, L) and what is cached before them."""
        output = self._model(tokens.to(self._device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def _static(self, length: int) -> StaticCache:
        return StaticCache(config=self._model.config, max_cache_len=length)

    def _prompts(self, rows: int, tokens: int) -> torch.Tensor:
        return torch.randint(self._model.config.vocab_size, (rows, tokens), generator=self._random)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _rewind(cache: Cache, length: int, steps: int) -> None:
    """Takes the last `steps` tokens out of a cache, down to `length`."""
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)  # what is behind it is written over
    else:
        cache.crop(-steps)


def torch_matmul_rate(size: int, rounds: int = 5, repeats: int = 2) -> float:
    """FLOPs per second of float32 products of two square matrices of `size` on CPU, the median over rounds."""
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        seconds.append((time.perf_counter() - start) / repeats)
    return 2 * size**3 / sorted(seconds[1:])[rounds // 2]
