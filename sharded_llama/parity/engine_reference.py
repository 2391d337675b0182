"""The engine as its own reference: on another mesh, in another type, from a converted checkpoint."""

from collections.abc import Iterator

import jax
import numpy as np

from ..engine.llm import LLM
from .capture import Arrays, Capture, repeat_rows
from .components import EMBEDDING, HEAD, LAYER_AXES, Greedy, Stage, keeps_attention_weights, layer_stage
from .decoding import greedy_tokens, logits_through_cache
from .pieces import whole_prompts


class EngineReference:
    """A `Reference` made of a second model in its own mesh."""

    def __init__(self, llm: LLM):
        self.llm = llm

    @property
    def made_by(self) -> str:
        """See `Reference.made_by`."""
        data, model = self.llm.mesh.shape.values()
        device = self.llm.mesh.devices.flat[0]
        where = f"mesh data:{data},model:{model} ({device.device_kind})"
        return f"sharded_llama, jax {jax.__version__}, {where}, attention: {self.llm.backend}"

    @property
    def dtype(self) -> str:
        """See `Reference.dtype`."""
        return self.llm.config.dtype

    def stages(self, tokens_BL: np.ndarray) -> Iterator[Stage]:
        """See `Reference.stages`. Knows no noise and nothing exact."""
        capture = Capture(self.llm)
        config = self.llm.config
        weights = keeps_attention_weights(tokens_BL.shape, config.n_heads, config.jnp_dtype)
        batch = len(tokens_BL)
        h_BLD = capture.embedding(tokens_BL)[:batch]
        yield Stage(EMBEDDING, {EMBEDDING: h_BLD}, {}, {})
        for i in range(self.llm.config.n_layers):
            values = self._unrepeated(capture.layer(i, h_BLD, weights=weights), batch)
            h_BLD = values["ffn_residual"]
            yield Stage(layer_stage(i), values, {}, {})
            del values  # not to be held while the next stage is computed
        yield Stage(HEAD, {name: x[:batch] for name, x in capture.head(h_BLD).items()}, {}, {})

    def greedy(self, tokens_BL: np.ndarray, new_tokens: int) -> Greedy:
        """See `Reference.greedy`."""
        tokens_BN = greedy_tokens(self.llm, tokens_BL, new_tokens)
        whole = repeat_rows(np.concatenate([tokens_BL, tokens_BN[:, :-1]], axis=1), self.llm)
        batch, length = whole.shape
        logits = logits_through_cache(self.llm, whole, whole_prompts(batch, length), length=length)
        logits = logits[: len(tokens_BL), tokens_BL.shape[1] - 1 :]
        second, first = np.moveaxis(np.partition(logits.astype(np.float64), -2, axis=-1)[..., -2:], -1, 0)
        return Greedy(tokens_BN, first - second)

    def _unrepeated(self, values: Arrays, batch: int) -> Arrays:
        """Repeated rows and kv heads are copies: the first of each is kept."""
        n_kv_heads = self.llm.config.n_kv_heads
        values = {name: x[:batch] for name, x in values.items()}
        return {n: x[:, :, :: x.shape[2] // n_kv_heads] if "G" in LAYER_AXES[n] else x for n, x in values.items()}
