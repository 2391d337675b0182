r"""Compares a checkpoint in this engine with PyTorch, component by component.

    python -m launch.compare --checkpoint=FOLDER --mesh=data:1,model:2 --dtype=float32
    python -m launch.compare --checkpoint=FOLDER --save_reference=FILE        # where torch is
    python -m launch.compare --checkpoint=FOLDER --reference=FILE             # where it is not
    python -m launch.compare --checkpoint=FOLDER --against_mesh=data:1,model:8
    python -m launch.compare --checkpoint=FOLDER --against_checkpoint=CONVERTED

Exits with 1 when the numerics contract (docs/parity.md) is broken, and names the component that leaves it first.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from jax.sharding import Mesh

from sharded_llama.attention import choose_backend
from sharded_llama.checkpoint import CheckpointSource, open_checkpoint
from sharded_llama.checkpoint.export import stored_dtype
from sharded_llama.checkpoint.meta.source import is_meta
from sharded_llama.checkpoint.reader import check_tensors
from sharded_llama.config import DTYPES, LlamaConfig
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.loading import checkpoint_folder, open_tokenizer
from sharded_llama.errors import ParityError, TokenizerError
from sharded_llama.mesh import broadcast_from_main, check_mesh, make_mesh, parse_mesh
from sharded_llama.parity.compare import DEFAULT_CHUNK, DEFAULT_NEW_TOKENS, compare
from sharded_llama.parity.components import Reference
from sharded_llama.parity.contract import CONTRACT, EXACT, NO_BOUND
from sharded_llama.parity.engine_reference import EngineReference
from sharded_llama.parity.fingerprint import fingerprint
from sharded_llama.parity.output_file import check_writable
from sharded_llama.parity.plot import check_plot, plot
from sharded_llama.parity.reference_file import ReferenceFile, check_model, check_same_model, open_reference
from sharded_llama.parity.reference_writer import save_reference
from sharded_llama.parity.references import check_torch, torch_reference
from sharded_llama.parity.report import to_text, write_json_report
from sharded_llama.parity.results import ISOLATED, MODES, Report
from sharded_llama.parity.tokens import DEFAULT_PROMPTS, check_tokens, encode_rows, random_tokens

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
NEW_TOKENS = flags.DEFINE_integer(
    "new_tokens",
    None,
    f"Tokens of the greedy continuation; 0: none. Default: {DEFAULT_NEW_TOKENS}, or as many as --reference holds.",
    0,
)
CHUNK = flags.DEFINE_integer("chunk", DEFAULT_CHUNK, "Tokens of a chunk, for prompts that go through the cache.", 1)
SAVE_REFERENCE = flags.DEFINE_string(
    "save_reference", None, "Run PyTorch alone and write what it computes to this file."
)
REFERENCE = flags.DEFINE_string("reference", None, "Compare with what --save_reference wrote; needs no torch.")
REFERENCE_DEVICE = flags.DEFINE_string("reference_device", "cpu", "Where PyTorch computes: cpu, cuda, cuda:1, ...")
AGAINST_MESH = flags.DEFINE_string("against_mesh", None, "Compare with this engine on another mesh: data:1,model:8.")
AGAINST_DTYPE = flags.DEFINE_enum("against_dtype", None, DTYPES, "Compare with this engine in another type.")
AGAINST_CHECKPOINT = flags.DEFINE_string(
    "against_checkpoint",
    None,
    "Compare with this engine on another form of the checkpoint, such as a converted one. --rope_factor is that of "
    "both where both are Meta's.",
)
JSON = flags.DEFINE_string("json", None, "Write the whole report to this file.")
PLOT = flags.DEFINE_string("plot", None, "Draw the errors by layer and component to this .png, .svg or .pdf file.")
EVERY_LAYER = flags.DEFINE_bool("every_layer", False, "Print a line for every layer instead of the worst one.")

AGAINST = (AGAINST_MESH, AGAINST_DTYPE, AGAINST_CHECKPOINT)
WRITTEN = (JSON, PLOT, SAVE_REFERENCE)

# What the report says is expected.
EXPECTED = {
    CONTRACT: "the numerics contract",
    EXACT: "equal values, cumulatively, of the same programs",
    NO_BOUND: "nothing: the types differ",
}


# Flags


def check_flags() -> None:
    """Raises ParityError for flags that are wrong together or by themselves, before anything is loaded."""
    for flag in (REFERENCE, AGAINST_CHECKPOINT, AGAINST_MESH, *WRITTEN):
        if flag.value is not None and not flag.value.strip():
            raise ParityError(f"--{flag.name} is empty.")
    engine = [flag.name for flag in AGAINST if flag.value is not None]
    files = [flag.name for flag in (SAVE_REFERENCE, REFERENCE) if flag.value is not None]
    if len(files) > 1 or (files and engine):
        raise ParityError(f"--{files[0]} and --{(files[1:] + engine)[0]} cannot be given together.")
    if jax.process_count() > 1 and REFERENCE.value is None and not engine:
        raise ParityError("with several processes, give --reference=FILE: PyTorch runs in one, with --save_reference.")
    if REFERENCE_DEVICE.present and (REFERENCE.value is not None or engine):
        name = REFERENCE.name if REFERENCE.value is not None else engine[0]
        raise ParityError(f"--reference_device is where PyTorch computes, which does not run with --{name}.")
    for flag in (JSON, PLOT):
        if SAVE_REFERENCE.value is not None and flag.value is not None:
            raise ParityError(f"--save_reference compares nothing: give --{flag.name} with --reference=FILE later.")
    if TOKEN_IDS.value is not None and (prompt_flags.PROMPT.value or prompt_flags.PROMPT_FILE.value is not None):
        raise ParityError("give --token_ids or prompts, not both.")
    broadcast_from_main(check_files)  # the one process that writes


def check_files() -> None:
    """Raises ParityError when a file of the flags could not be written in the end."""
    places: dict[Path, str] = {}
    for flag in (REFERENCE, *WRITTEN):
        if flag.value is not None:
            place = named_file(flag.value).resolve()
            if place in places:
                raise ParityError(f"--{places[place]} and --{flag.name} name the same file.")
            places[place] = flag.name
    for flag in WRITTEN:
        if flag.value is not None:
            try:
                check_writable(named_file(flag.value))
                if flag is PLOT:
                    check_plot(named_file(flag.value))
            except ParityError as error:
                raise ParityError(f"--{flag.name}={error}") from error


def named_file(name: str) -> Path:
    """~ is the home folder, which shells do not replace after --json=."""
    return Path(name).expanduser()


# Tokens


def choose_tokens(folder: Path, config: LlamaConfig, file: ReferenceFile | None) -> tuple[list[list[int]], str]:
    """The token ids (B, L) that the flags ask for, and what they are of.

    A prompt that is shorter than the longest goes on from its start. Raises ParityError for tokens that are not of the
    model's vocabulary, TokenizerError when there are prompts but no tokenizer that can be used.
    """
    if TOKEN_IDS.value is not None:
        return [parse_token_ids(TOKEN_IDS.value, config)], "of --token_ids"
    prompts = prompt_flags.given_prompts()
    if prompts:
        return encode_rows(prompts, open_tokenizer(folder, config), config).tolist(), "of the prompts given"
    if file is not None:
        return file.tokens_BL.tolist(), "of the reference"
    half = min(DEFAULT_NEW_TOKENS, config.max_seq_len // 2)
    room = max(1, config.max_seq_len - (half if NEW_TOKENS.value is None else NEW_TOKENS.value))
    try:
        tokenizer = open_tokenizer(folder, config)
    except TokenizerError as error:
        logging.info("%s Comparing on random tokens.", error)
        return random_tokens(config)[:, :room].tolist(), "random"
    return encode_rows(DEFAULT_PROMPTS, tokenizer, config)[:, :room].tolist(), "of the default prompts"


def parse_token_ids(texts: list[str], config: LlamaConfig) -> list[int]:
    try:
        ids = [int(text) for text in texts]
    except ValueError:
        ids = []
    if not ids:
        raise ParityError(f"--token_ids={','.join(texts)}: expected whole numbers such as 1,306,4658.")
    wrong = [i for i in ids if not 0 <= i < config.vocab_size]
    if wrong:
        raise ParityError(
            f"--token_ids: {wrong[0]} is no token id of the model; they are 0 to {config.vocab_size - 1}."
        )
    return ids


def choose_new_tokens(config: LlamaConfig, length: int, file: ReferenceFile | None) -> int:
    """How many tokens a prompt of `length` tokens is continued by. Raises ParityError for more than the file holds."""
    if NEW_TOKENS.value is None:
        return max(0, min(DEFAULT_NEW_TOKENS, config.max_seq_len - length)) if file is None else file.new_tokens
    if file is not None and NEW_TOKENS.value > file.new_tokens:
        raise ParityError(
            f"--new_tokens={NEW_TOKENS.value}: {file.file} holds a continuation of {file.new_tokens} tokens: give no "
            "more, or make a reference with more."
        )
    return NEW_TOKENS.value


# References


def open_torch(source: CheckpointSource, config: LlamaConfig) -> AbstractContextManager[Reference]:
    return torch_reference(source, config, REFERENCE_DEVICE.value, rope_factor=common.ROPE_FACTOR.value)


def save(source: CheckpointSource, config: LlamaConfig, tokens_BL: np.ndarray, new_tokens: int) -> None:
    file, weights = named_file(SAVE_REFERENCE.value), fingerprint(source, config)
    with open_torch(source, config) as reference:
        nbytes = save_reference(
            file,
            reference,
            tokens_BL,
            config=config,
            fingerprint=weights,
            new_tokens=new_tokens,
            settings={"checkpoint": source.location, "format": source.format},
        )
        made_by = reference.made_by
    rows, length = tokens_BL.shape
    print(f"Wrote {file}: {nbytes:,} bytes, {rows} x {length} tokens in {config.dtype}, by {made_by}.")


class Second(NamedTuple):
    """A second model of this engine, to be compared with."""

    source: CheckpointSource
    config: LlamaConfig  # that of the first, but for the type: the same compiled programs serve both
    mesh: Mesh


def choose_second(source: CheckpointSource, config: LlamaConfig, mesh: Mesh) -> Second:
    """What the flags ask for; `config` and `mesh` are those of the first model.

    Raises ParityError for a checkpoint of another model, MeshError for a mesh that does not fit.
    """
    other = source
    if AGAINST_CHECKPOINT.value is not None:
        folder = Path(checkpoint_folder(AGAINST_CHECKPOINT.value))
        other = open_checkpoint(folder, rope_factor=common.ROPE_FACTOR.value if is_meta(folder) else None)
        check_same_model(f"--against_checkpoint={folder}", other.read_config(), config)
        check_tensors(other, config)
    if AGAINST_MESH.value is not None:
        mesh = make_mesh(**parse_mesh(AGAINST_MESH.value))
    check_mesh(config, mesh)
    second = Second(other, config.replace(dtype=AGAINST_DTYPE.value or config.dtype), mesh)
    choose_backend(second.config, mesh.devices.flat[0], common.ATTENTION.value)
    return second


def load_second(second: Second, source: CheckpointSource, llm: LLM) -> tuple[Reference, str]:
    """The second model in its mesh, and what is expected of a comparison of `llm` with it."""
    loaded = LLM(
        second.source,
        mesh=second.mesh,
        dtype=second.config.dtype,
        attention=common.ATTENTION.value,
        skip_tokenizer=True,
    )
    reference = EngineReference(loaded)
    if second.config.dtype != llm.config.dtype or stored_dtype(second.source) != stored_dtype(source):
        return reference, NO_BOUND
    return reference, EXACT if second.mesh == llm.mesh and MODE.value != ISOLATED else CONTRACT


@contextmanager
def open_other(
    source: CheckpointSource, llm: LLM, file: ReferenceFile | None, second: Second | None
) -> Iterator[tuple[Reference, str]]:
    """What to compare with, and what is expected of it."""
    if file is not None:
        yield file, CONTRACT
    elif second is not None:
        yield load_second(second, source, llm)
    else:
        with open_torch(source, llm.config) as reference:
            yield reference, CONTRACT


# Reports


def describe(
    source: CheckpointSource, llm: LLM, reference: Reference, second: Second | None, expect: str, tokens: str
) -> dict[str, Any]:
    """What the report says it is about."""
    data, model = llm.mesh.shape.values()
    device = llm.mesh.devices.flat[0]
    other = "" if second is None or second.source is source else f", {located(second.source)}"
    return {
        "checkpoint": located(source),
        "ours": f"{llm.config.dtype}, mesh data:{data},model:{model} on {device.platform} ({device.device_kind}), "
        f"attention: {llm.backend}, jax {jax.__version__}",
        "reference": f"{reference.dtype}, {reference.made_by}{other}",
        "expected": EXPECTED[expect],
        "tokens": tokens,
    }


def located(source: CheckpointSource) -> str:
    return f"{source.location} ({source.format})"


def publish(report: Report) -> None:
    """Writes the files that the flags ask for, and prints the report whatever becomes of them."""
    try:
        if JSON.value is not None:
            write_json_report(report, named_file(JSON.value))
        if PLOT.value is not None:
            plot(report, named_file(PLOT.value))
    finally:
        print(to_text(report, every_layer=EVERY_LAYER.value), flush=True)


def main() -> None:
    if SAVE_REFERENCE.value is not None:
        jax.config.update("jax_platforms", "cpu")  # JAX computes nothing: the accelerator's memory is PyTorch's
    if AGAINST_DTYPE.value == "float64":
        jax.config.update("jax_enable_x64", True)
    check_flags()
    source = common.open_source()
    config = source.read_config()
    config = config.replace(dtype=common.DTYPE.value or config.dtype)
    check_tensors(source, config)
    file = None if REFERENCE.value is None else open_reference(named_file(REFERENCE.value))
    if file is not None:
        check_model(file, config, fingerprint(source, config))
    # Only the first process needs to have the prompts.
    rows, what = broadcast_from_main(lambda: choose_tokens(Path(source.location), config, file))
    tokens_BL = np.array(rows, np.int32)
    new_tokens = choose_new_tokens(config, tokens_BL.shape[1], file)
    check_tokens(config, tokens_BL, new_tokens)
    # What is wrong with the other side shows before weights are read.
    second = None
    if file is not None:
        file.stages(tokens_BL)  # raises for tokens that are not the file's
    elif any(flag.value is not None for flag in AGAINST):
        second = choose_second(source, config, common.choose_mesh(config))
    else:
        check_torch(source, REFERENCE_DEVICE.value)
    if SAVE_REFERENCE.value is not None:
        save(source, config, tokens_BL, new_tokens)
        return
    llm = common.load_model(source, skip_tokenizer=True)
    with open_other(source, llm, file, second) as (reference, expect):
        report = compare(
            llm,
            reference,
            tokens_BL,
            modes=MODES if MODE.value == "both" else (MODE.value,),
            chunk=min(CHUNK.value, tokens_BL.shape[1]),
            new_tokens=new_tokens,
            expect=expect,
            settings=describe(source, llm, reference, second, expect, "{} x {}, {}".format(*tokens_BL.shape, what)),
        )
    if common.is_main_process():
        publish(report)
    if not report.passed:
        sys.exit(1)


def cli() -> None:
    common.run(main)


if __name__ == "__main__":
    cli()
