"""What a request puts on the vocabulary, on the host: grammars, allowed tokens, bad words, a least length.

compiler = GrammarCompiler(tokenizer, config.vocab_size, eos_ids)
grammar = compiler.compile(params.structured_outputs)
row = row_mask(params, vocab_size=..., stop_ids=..., tokenizer=tokenizer, grammar=grammar)
words_W = row.mask(generated)  # for the token that comes next

A mask is one bit per token: bit t % 32 of word t // 32 is set where token t may come next.
"""

from .grammar import Grammar, GrammarCompiler, Matcher
from .row_mask import RowMask, row_mask

__all__ = ["Grammar", "GrammarCompiler", "Matcher", "RowMask", "row_mask"]
