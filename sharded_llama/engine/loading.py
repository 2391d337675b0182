"""From the name of a checkpoint to a model in its mesh, while the caller waits or meanwhile."""

import concurrent.futures
import dataclasses
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..attention import choose_backend
from ..checkpoint import CheckpointSource, TensorInfo, hub, load_weights, open_checkpoint
from ..checkpoint.reader import check_tensors
from ..config import LlamaConfig
from ..errors import CheckpointError, ConfigError, EngineError, MeshError, RequestError, TokenizerError
from ..hf_config import read_generation_config
from ..mesh import check_mesh, default_mesh
from ..tokenizer import Tokenizer, load_tokenizer
from ..tokenizer.chat import ChatTemplate, load_chat_template
from ..weights import XfmrWeights
from .compilation import tell

LOADING_THREAD = "weights"  # how its name begins
DEMO_CHECKPOINT = Path(__file__).parent.parent / "demo_checkpoint"
# Tokenizers that give this the same ids are taken to be the same: words, code, numbers, spaces, several scripts.
MIXED_TEXT = "Hello there, world's 12345.67\n\tdef f(x):\n    return x**2  # naïve Straße Привет 你好 かな 🙂"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in its mesh, with what its checkpoint says of how to use it."""

    config: LlamaConfig
    mesh: Mesh
    weights: XfmrWeights
    tokenizer: Tokenizer | None = None
    sampling_defaults: dict[str, Any] | None = None  # SamplingParams fields; None: greedy
    chat_template: ChatTemplate | None = None


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A checkpoint that fits its mesh, of which the weights are yet to be read."""

    source: CheckpointSource
    config: LlamaConfig
    mesh: Mesh
    tokenizer: Tokenizer | None
    sampling_defaults: dict[str, Any]
    chat_template: ChatTemplate | None

    def load(self, progress: bool = True) -> LoadedModel:
        """Reads the weights straight into their shards. Raises CheckpointError naming what is wrong."""
        start = time.perf_counter()
        weights = jax.block_until_ready(load_weights(self.source, self.config, mesh=self.mesh, progress=progress))
        tell("weights: %.1f s", time.perf_counter() - start)
        tell("mesh data:%d,model:%d, %s", *self.mesh.shape.values(), self.config.dtype)
        return LoadedModel(self.config, self.mesh, weights, self.tokenizer, self.sampling_defaults, self.chat_template)


@dataclasses.dataclass(frozen=True)
class _Stoppable:
    """A `CheckpointSource` whose reads fail as soon as `stopping` is set."""

    source: CheckpointSource
    stopping: threading.Event

    @property
    def format(self) -> str:
        return self.source.format

    @property
    def location(self) -> str:
        return self.source.location

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    def read_config(self) -> LlamaConfig:
        return self.source.read_config()

    def stored_name(self, name: str) -> str:
        return self.source.stored_name(name)

    def read(self, name: str, slices: tuple[slice, ...], out: np.ndarray) -> int:
        if self.stopping.is_set():
            raise EngineError(f"{self.location}: reading the weights was stopped.")
        return self.source.read(name, slices, out)


class Loading:
    """Models whose weights a thread of its own reads, one after the other, while the caller does something else.

    The thread ends with the last of them, with the first error, by `stop`, or with the program.
    """

    def __init__(self, models: Sequence[OpenedModel | LoadedModel], progress: bool = True):
        """Begins with those that are not loaded yet."""
        self.seconds = 0.0  # of reading, so far
        self._models, self._progress = tuple(models), progress
        self._begin()

    @property
    def is_done(self) -> bool:
        """Whether nothing is being read any more."""
        return self._loaded.done()

    def check(self) -> None:
        """Raises the error that has ended the reading, if there was one; does not wait."""
        if self.is_done:
            self.result()

    def result(self) -> list[LoadedModel]:
        """All of the models with their weights, when they are there. What was stopped is begun again.

        Raises CheckpointError naming what is wrong with them. Reading stops when the wait is interrupted.
        """
        if self._stopping.is_set():
            self._begin()
        try:
            return self._loaded.result()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends reading and its thread, if they have not ended already."""
        if not self.is_done:
            self._stopping.set()
            concurrent.futures.wait([self._loaded])

    def _begin(self) -> None:
        self._stopping = threading.Event()
        if all(isinstance(model, LoadedModel) for model in self._models):
            self._loaded: Future[list[LoadedModel]] = Future()
            self._loaded.set_result(list(self._models))
            return
        # A program that ends waits for the threads of pools, which would read on. Nothing public is called before that.
        threading._register_atexit(self._stopping.set)
        thread = ThreadPoolExecutor(1, thread_name_prefix=LOADING_THREAD)
        # JAX's settings are each thread's own; this is the one that matters.
        self._loaded = thread.submit(self._load, self._stopping, jax.config.jax_enable_x64)
        thread.shutdown(wait=False)

    def _load(self, stopping: threading.Event, x64: bool) -> list[LoadedModel]:
        loaded = []
        with jax.enable_x64(x64):
            for model in self._models:
                start = time.perf_counter()
                if isinstance(model, OpenedModel):
                    source = _Stoppable(model.source, stopping)
                    model = dataclasses.replace(model, source=source).load(self._progress)
                loaded.append(model)
                self.seconds += time.perf_counter() - start
        return loaded


def load_model(checkpoint: str | Path | CheckpointSource, *, progress: bool = True, **how: Any) -> LoadedModel:
    """Reads a checkpoint straight into its shards: `open_model` with what it takes, and its weights.

    `progress` shows a progress bar on a terminal. Raises CheckpointError, ConfigError, MeshError or TokenizerError
    naming what is wrong.
    """
    return open_model(checkpoint, **how).load(progress)


def open_model(
    checkpoint: str | Path | CheckpointSource,
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    rope_factor: float | None = None,
    skip_tokenizer: bool = False,
) -> OpenedModel:
    """Reads all of a checkpoint but its weights, so that mistakes show before these are read.

    Args:
      checkpoint: folder in any format that `open_checkpoint` knows, name of a repository of the Hugging Face hub such
        as "meta-llama/Llama-3.2-1B", "demo" for the small model that comes with the package, or what
        `open_checkpoint` gave.
      mesh: from `make_mesh`; default: all devices (`default_mesh`).
      dtype: of weights, activations and cache, such as "float32"; default: the checkpoint's.
      attention: backend that will be used.
      rope_factor: of a Meta checkpoint with scaled rotary embeddings; default: see `meta_config.read_config`.
      skip_tokenizer: prompts will be token ids; the folder needs no tokenizer.

    Raises CheckpointError, ConfigError, MeshError or TokenizerError naming what is wrong.
    """
    source = checkpoint
    if not isinstance(checkpoint, str | Path) and rope_factor is not None:
        raise ConfigError("rope_factor belongs to opening the checkpoint: open_checkpoint(folder, rope_factor=...).")
    if isinstance(checkpoint, str | Path):
        source = open_checkpoint(checkpoint_folder(checkpoint), rope_factor=rope_factor)
    folder = Path(source.location)
    config = source.read_config()
    if dtype is not None:
        config = config.replace(dtype=dtype)
    mesh = default_mesh(config) if mesh is None else mesh
    check_mesh(config, mesh)
    check_dtype(config)
    choose_backend(config, mesh.devices.flat[0], attention)
    tokenizer = None if skip_tokenizer else open_tokenizer(folder, config)
    template = None if skip_tokenizer else load_chat_template(folder)
    defaults = read_generation_config(folder)
    if not defaults.pop("do_sample"):
        defaults = {"temperature": 0.0, **defaults}
    check_tensors(source, config)
    return OpenedModel(source, config, mesh, tokenizer, defaults, template)


def open_draft(
    draft: str | Path | CheckpointSource | LoadedModel, model: OpenedModel | LoadedModel, dtype: str | None = None
) -> OpenedModel | LoadedModel:
    """The smaller model that guesses tokens for `model`, on the same mesh.

    Raises ConfigError for one of other tokens, MeshError for one that is or has to be on another mesh, and what
    `open_model` raises.
    """
    try:
        if not isinstance(draft, LoadedModel):
            draft = open_model(draft, mesh=model.mesh, dtype=dtype, skip_tokenizer=model.tokenizer is None)
        elif draft.mesh != model.mesh:
            raise MeshError(f"it is on {draft.mesh}, the model on {model.mesh}: load both with the same mesh.")
        _check_same_tokens(draft, model)
    except (CheckpointError, ConfigError, MeshError, TokenizerError) as error:
        raise type(error)(f"the draft model: {error}") from error
    return draft


def _check_same_tokens(draft: OpenedModel | LoadedModel, model: OpenedModel | LoadedModel) -> None:
    """Raises ConfigError where both tokenizers are known to differ: by their sizes, or by the ids of a text."""
    sizes = draft.config.vocab_size, model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigError(f"it has {sizes[0]} tokens, the model {sizes[1]}; both need the same tokenizer.")
    if draft.tokenizer is None or model.tokenizer is None:
        return
    same_size = draft.tokenizer.vocab_size == model.tokenizer.vocab_size
    if not same_size or draft.tokenizer.encode(MIXED_TEXT) != model.tokenizer.encode(MIXED_TEXT):
        raise ConfigError("its tokenizer gives a text other ids than the model's; both need the same tokenizer.")


def open_tokenizer(folder: Path, config: LlamaConfig) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises TokenizerError when there is none, or it is of another model."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary only "
            f"{config.vocab_size}: they do not belong together."
        )
    return tokenizer


def encode_text(tokenizer: Tokenizer, config: LlamaConfig, text: str) -> list[int]:
    """Token ids of a text: BOS as the tokenizer adds it; of an empty one BOS alone. Raises RequestError without BOS."""
    if text:
        return tokenizer.encode(text, bos=tokenizer.adds_bos)
    bos_id = config.bos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if bos_id is None:
        raise RequestError("the prompt is empty and the model has no BOS token to start from; give a prompt.")
    return [bos_id]


def check_dtype(config: LlamaConfig) -> None:
    if config.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ConfigError("float64 needs jax.config.update('jax_enable_x64', True) before the model is loaded.")


def checkpoint_folder(name: str | Path) -> Path:
    """The folder of a checkpoint: "demo" is the small model that comes with the package; a hub name is downloaded."""
    return DEMO_CHECKPOINT if str(name) == "demo" else hub.resolve(_expanded(name))


def _expanded(name: str | Path) -> str | Path:
    """A name with ~ replaced by the home folder, which shells do not do after --checkpoint=."""
    return os.path.expanduser(name) if isinstance(name, str) else name.expanduser()
