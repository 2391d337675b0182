"""Trains a byte-level BPE tokenizer and writes it as Hugging Face and this package read it."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ..errors import TrainingError

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BOS_ID, EOS_ID = 0, 1
MIN_VOCAB = 256 + 2  # every byte, and the two special tokens


def train_tokenizer(text: str, folder: Path, vocab_size: int) -> None:
    """Trains a tokenizer on `text` and writes tokenizer.json and tokenizer_config.json into the new `folder`.

    Byte-level BPE (Radford et al., 2019): any text encodes, and decodes to itself. Ids 0 and 1 are
    `<|begin_of_text|>`, put before a text by default, and `<|end_of_text|>`; they count in `vocab_size`. A short text
    may not have enough pairs for all of it. The same text gives the same tokenizer. Raises TrainingError when
    `vocab_size` does not hold the bytes.
    """
    if vocab_size < MIN_VOCAB:
        raise TrainingError(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer: it needs {MIN_VOCAB} for the 256 bytes "
            f"and the special tokens {BOS} and {EOS}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    # Under its own name only when it is complete: a run that is cut short trains it again.
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(partial / "tokenizer.json"))
    (partial / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    partial.rename(folder)
