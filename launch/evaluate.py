r"""Measures how well a checkpoint predicts a text.

    python -m launch.evaluate --checkpoint=FOLDER --text=FILE
    python -m launch.evaluate --checkpoint=FOLDER --text=FILE --holdout=0.1    # the part that training held out

Every token is scored once, in windows that each start from BOS, as training scores its held-out text.
"""

from pathlib import Path

from absl import flags

from sharded_llama.errors import TrainingError
from sharded_llama.sharding import DATA
from sharded_llama.training.data import read_text, split_text, tokenize
from sharded_llama.training.evaluation import score_text

from . import common

flags.adopt_module_key_flags(common)

TEXT = flags.DEFINE_string("text", None, "UTF-8 text file.")
HOLDOUT = flags.DEFINE_float("holdout", 1.0, "Score only this last fraction of the text.", 0.0, 1.0)
LENGTH = flags.DEFINE_integer("length", None, "Tokens of a window. Default: the model's context, at most 2048.", 1)
BATCH = flags.DEFINE_integer("batch", 8, "Windows that run together on each data shard.", 1)

MAX_LENGTH = 2048


def main() -> None:
    if not TEXT.value:
        raise TrainingError("give --text=FILE, the text to score.")
    _, text = split_text(read_text(Path(TEXT.value)), HOLDOUT.value)
    if not text:
        raise TrainingError(f"--text={TEXT.value}: nothing to score in its last {HOLDOUT.value:.0%}.")
    llm = common.load_model()
    bos_id = llm.tokenizer.bos_id if llm.tokenizer.bos_id is not None else llm.config.bos_id
    if bos_id is None:
        raise TrainingError("neither the tokenizer nor the config has a BOS token for the windows to start from.")
    length = LENGTH.value or min(llm.config.max_seq_len, MAX_LENGTH)
    if length > llm.config.max_seq_len:
        raise TrainingError(f"--length={length} is longer than the model's context of {llm.config.max_seq_len} tokens.")
    score = score_text(
        llm.weights,
        llm.config,
        tokenize(llm.tokenizer, text),
        mesh=llm.mesh,
        batch=BATCH.value * llm.mesh.shape[DATA],
        length=length,
        bos_id=bos_id,
        backend=llm.backend,
    )
    if common.is_main_process():
        print(
            f"{score.loss:.4f} nats per token, perplexity {score.perplexity:.2f}, {score.bits_per_byte:.4f} bits per "
            f"byte ({score.n_tokens} tokens, {score.n_bytes} bytes, windows of {length} tokens)"
        )


def cli() -> None:
    common.run(main)


if __name__ == "__main__":
    cli()
