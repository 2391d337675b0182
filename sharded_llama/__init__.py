"""sharded_llama: a JAX inference engine for Llama-family models on a `(data, model)` device mesh.

Arrays carry their shape in their name, one capital per axis, as in `x_BLD`, `q_BLHK`, `k_BSGK`:

    B  batch (sequences)          H  query heads
    L  tokens of this step        G  key/value heads
    S  cached positions           R  query heads per kv head, H/G; rows of a step
    D  model width                K  head width
    F  feed-forward width         V  vocabulary
    N  pages                      P  positions in a page
    T  tokens of a flat step      W  pages in a block table

Inside `shard_map` the letters mean the part that one device holds.
"""

from .config import LlamaConfig
from .engine.async_engine import AsyncEngine
from .engine.engine import Engine
from .engine.llm import LLM, Stream
from .engine.outputs import CompletionOutput, Logprob, RequestOutput, StreamEvent
from .errors import ShardedLlamaError
from .mesh import default_mesh, make_mesh, simulate_cpu_devices
from .sampling import SamplingParams
from .sampling.entropy_settings import EntropySettings
from .sampling.structured import StructuredOutputs

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EntropySettings",
    "LlamaConfig",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "ShardedLlamaError",
    "Stream",
    "StreamEvent",
    "StructuredOutputs",
    "default_mesh",
    "make_mesh",
    "simulate_cpu_devices",
]

__version__ = "0.1.0"
