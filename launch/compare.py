r"""Compares a checkpoint in this engine with PyTorch, component by component.

    python -m launch.compare --checkpoint=FOLDER --mesh=data:1,model:2 --dtype=float32
    python -m launch.compare --checkpoint=FOLDER --save_reference=FILE        # where torch is
    python -m launch.compare --checkpoint=FOLDER --reference=FILE             # where it is not
    python -m launch.compare --checkpoint=FOLDER --against_mesh=data:1,model:8

Exits with 1 when the numerics contract (docs/parity.md) is broken, and names the component that leaves it first.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from sharded_llama.checkpoint import CheckpointSource, open_checkpoint
from sharded_llama.checkpoint.export import stored_dtype
from sharded_llama.config import DTYPES, LlamaConfig
from sharded_llama.engine.llm import LLM, checkpoint_folder, load
from sharded_llama.errors import ParityError, TokenizerError
from sharded_llama.mesh import broadcast_from_main, make_mesh, parse_mesh
from sharded_llama.parity.compare import DEFAULT_CHUNK, DEFAULT_NEW_TOKENS, check_tokens, compare
from sharded_llama.parity.components import Reference
from sharded_llama.parity.contract import CONTRACT, EXACT, NO_BOUND
from sharded_llama.parity.engine_reference import EngineReference
from sharded_llama.parity.fingerprint import fingerprint
from sharded_llama.parity.plot import plot
from sharded_llama.parity.reference_file import ReferenceFile, check_model, open_reference, save_reference
from sharded_llama.parity.references import torch_reference
from sharded_llama.parity.report import to_text, write_json_report
from sharded_llama.parity.results import MODES
from sharded_llama.tokenizer import load_tokenizer

from . import common, prompts as prompt_flags

flags.adopt_module_key_flags(common)
flags.adopt_module_key_flags(prompt_flags)

TOKEN_IDS = flags.DEFINE_list("token_ids", None, "Token ids of a prompt, such as 1,306,4658, instead of --prompt.")
MODE = flags.DEFINE_enum(
    "mode",
    "both",
    ("both", *MODES),
    "isolated: each component is fed the reference's own inputs. cumulative: what the engine computed before it.",
)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", DEFAULT_NEW_TOKENS, "Tokens of the greedy continuation.", 0)
CHUNK = flags.DEFINE_integer("chunk", DEFAULT_CHUNK, "Tokens of a chunk, for prompts that go through the cache.", 1)
SAVE_REFERENCE = flags.DEFINE_string(
    "save_reference", None, "Run PyTorch alone and write what it computes to this file."
)
REFERENCE = flags.DEFINE_string("reference", None, "Compare with what --save_reference wrote; needs no torch.")
REFERENCE_DEVICE = flags.DEFINE_string("reference_device", "cpu", "Where PyTorch computes: cpu, cuda, cuda:1, ...")
AGAINST_MESH = flags.DEFINE_string("against_mesh", None, "Compare with this engine on another mesh: data:1,model:8.")
AGAINST_DTYPE = flags.DEFINE_enum("against_dtype", None, DTYPES, "Compare with this engine in another type.")
AGAINST_CHECKPOINT = flags.DEFINE_string(
    "against_checkpoint", None, "Compare with this engine on another form of the checkpoint, such as a converted one."
)
JSON = flags.DEFINE_string("json", None, "Write the whole report to this file.")
PLOT = flags.DEFINE_string("plot", None, "Draw the errors by layer and component to this .png, .svg or .pdf file.")
EVERY_LAYER = flags.DEFINE_bool("every_layer", False, "Print a line for every layer instead of the worst one.")

DEFAULT_PROMPTS = (
    "The quick brown fox jumps over the lazy dog, 3.14159 times a day.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1)",
)
RANDOM_TOKENS = (2, 24)  # where the checkpoint has no tokenizer


def choose_tokens(folder: Path, config: LlamaConfig) -> np.ndarray:
    """The token ids (B, L) of the flags' prompts; a prompt that is shorter than the longest goes on from its start."""
    prompts = prompt_flags.given_prompts()
    if TOKEN_IDS.value is not None:
        if prompts:
            raise ParityError("give --token_ids or prompts, not both.")
        if not all(text.strip().isdecimal() for text in TOKEN_IDS.value) or not TOKEN_IDS.value:
            raise ParityError(f"--token_ids={','.join(TOKEN_IDS.value)}: expected whole numbers such as 1,306,4658.")
        return np.array([[int(text) for text in TOKEN_IDS.value]])
    try:
        tokenizer = load_tokenizer(folder)
    except TokenizerError as error:
        if prompts:
            raise
        logging.info("no tokenizer (%s): comparing on random tokens.", error)
        return np.random.default_rng(0).integers(0, config.vocab_size, RANDOM_TOKENS)
    rows = [tokenizer.encode(text, bos=tokenizer.adds_bos) or [config.bos_id] for text in prompts or DEFAULT_PROMPTS]
    if rows == [[None]]:
        raise ParityError("the prompt is empty and the model has no BOS token to start from.")
    length = max(map(len, rows))
    if not prompts:
        length = max(1, min(length, config.max_seq_len - NEW_TOKENS.value))
    return np.stack([np.resize(row, length) for row in rows])


def save(source: CheckpointSource, config: LlamaConfig, tokens_BL: np.ndarray) -> None:
    with torch_reference(source, config, REFERENCE_DEVICE.value) as reference:
        nbytes = save_reference(
            SAVE_REFERENCE.value,
            reference,
            tokens_BL,
            config=config,
            fingerprint=fingerprint(source, config),
            new_tokens=NEW_TOKENS.value,
            settings={"checkpoint": source.location, "format": source.format},
        )
        made_by = reference.made_by
    rows, length = tokens_BL.shape
    print(f"Wrote {SAVE_REFERENCE.value}: {nbytes:,} bytes, {rows} x {length} tokens in {config.dtype}, by {made_by}.")


@contextmanager
def open_other(
    source: CheckpointSource, config: LlamaConfig, llm: LLM, file: ReferenceFile | None
) -> Iterator[tuple[Reference, str]]:
    """What to compare with, and what is expected of it."""
    if file is not None:
        yield file, CONTRACT
    elif any(flag.value is not None for flag in (AGAINST_MESH, AGAINST_DTYPE, AGAINST_CHECKPOINT)):
        yield against_engine(source, config, llm)
    else:
        with torch_reference(source, config, REFERENCE_DEVICE.value) as reference:
            yield reference, CONTRACT


def against_engine(source: CheckpointSource, config: LlamaConfig, llm: LLM) -> tuple[Reference, str]:
    """A second model of this engine. Equal values are expected when only the form of the checkpoint differs."""
    other = source
    if AGAINST_CHECKPOINT.value is not None:
        other = open_checkpoint(checkpoint_folder(AGAINST_CHECKPOINT.value), rope_factor=None)
    mesh = llm.mesh if AGAINST_MESH.value is None else make_mesh(**parse_mesh(AGAINST_MESH.value))
    dtype = AGAINST_DTYPE.value or config.dtype
    second = load(other, mesh=mesh, dtype=dtype, attention=common.ATTENTION.value, skip_tokenizer=True)
    if dtype != config.dtype or stored_dtype(other) != stored_dtype(source):
        return EngineReference(second), NO_BOUND
    return EngineReference(second), EXACT if mesh == llm.mesh else CONTRACT


def check_flags() -> None:
    """Raises ParityError for flags that contradict one another, before anything is loaded."""
    engine = [flag.name for flag in (AGAINST_MESH, AGAINST_DTYPE, AGAINST_CHECKPOINT) if flag.value is not None]
    files = [flag.name for flag in (SAVE_REFERENCE, REFERENCE) if flag.value is not None]
    if len(files) > 1 or (files and engine):
        raise ParityError(f"--{files[0]} and --{(files[1:] + engine)[0]} cannot be given together.")
    if jax.process_count() > 1 and not REFERENCE.value and not engine:
        raise ParityError("with several processes, give --reference=FILE: PyTorch runs in one, with --save_reference.")
    if AGAINST_DTYPE.value == "float64":
        jax.config.update("jax_enable_x64", True)
    for flag in (JSON, PLOT, SAVE_REFERENCE):
        if flag.value and not Path(flag.value).absolute().parent.is_dir():
            raise ParityError(f"--{flag.name}={flag.value}: its folder does not exist.")


def describe(source: CheckpointSource, llm: LLM, reference: Reference, tokens_BL: np.ndarray) -> dict[str, Any]:
    """What the report says it is about."""
    data, model = llm.mesh.shape.values()
    device = llm.mesh.devices.flat[0]
    rows, length = tokens_BL.shape
    return {
        "checkpoint": f"{source.location} ({source.format})",
        "ours": f"{llm.config.dtype}, mesh data:{data},model:{model} on {device.platform} ({device.device_kind}), "
        f"attention: {llm.steps.backend}, jax {jax.__version__}",
        "reference": f"{reference.dtype}, {reference.made_by}",
        "tokens": f"{rows} x {length}",
    }


def main() -> None:
    check_flags()
    source = common.open_source()
    config = source.read_config()
    config = config.replace(dtype=common.DTYPE.value or config.dtype)
    file = None
    if REFERENCE.value is not None:
        file = open_reference(REFERENCE.value)
        check_model(file, config, fingerprint(source, config))
    given = TOKEN_IDS.value is not None or prompt_flags.given_prompts()
    tokens = broadcast_from_main(
        lambda: (file.tokens_BL if file and not given else choose_tokens(Path(source.location), config)).tolist()
    )
    tokens_BL = np.array(tokens, np.int32)
    new_tokens = NEW_TOKENS.value if file is None else min(NEW_TOKENS.value, file.new_tokens)
    check_tokens(config, tokens_BL, new_tokens)
    if SAVE_REFERENCE.value is not None:
        save(source, config, tokens_BL)
        return
    llm = common.load_model(source, skip_tokenizer=True)
    with open_other(source, config, llm, file) as (reference, expect):
        report = compare(
            llm,
            reference,
            tokens_BL,
            modes=MODES if MODE.value == "both" else (MODE.value,),
            chunk=CHUNK.value,
            new_tokens=new_tokens,
            expect=expect,
            settings=describe(source, llm, reference, tokens_BL),
        )
    if common.is_main_process():
        print(to_text(report, every_layer=EVERY_LAYER.value), flush=True)
        if JSON.value is not None:
            write_json_report(report, JSON.value)
        if PLOT.value is not None:
            plot(report, PLOT.value)
    if not report.passed:
        sys.exit(1)


def cli() -> None:
    common.run(main)


if __name__ == "__main__":
    cli()
