"""The demo tokenizer: byte-level, 1,024 tokens, of which 0 starts and 1 ends a sequence."""

from pathlib import Path

import pytest

import sharded_llama
from sharded_llama.constraints import GrammarCompiler
from sharded_llama.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("llguidance")

VOCAB_SIZE, BOS, EOS = 1024, 0, 1


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(Path(sharded_llama.__file__).parent / "demo_checkpoint")


@pytest.fixture(scope="session")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB_SIZE, (EOS,))
