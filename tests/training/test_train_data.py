"""Windows of a text: where they start, what they are scored on, and that a step's are always the same."""

import re

import numpy as np
import pytest
from tiny_model import IDS

from sharded_llama.errors import TrainingError
from sharded_llama.training.data import evaluation_batches, read_text, split_text, training_batch

WINDOW = {"batch": 4, "length": 16, "bos_id": 0}


def test_text_is_read_byte_for_byte(tmp_path):
    text = "Zeile\r\nnoch eine\n\n€😀"
    (tmp_path / "text").write_bytes(text.encode())
    assert read_text(tmp_path / "text") == text


def test_unreadable_texts(tmp_path):
    (tmp_path / "latin1").write_bytes("abcé".encode("latin-1"))
    with pytest.raises(TrainingError, match=r"latin1 is not UTF-8 text: .* at byte 3"):
        read_text(tmp_path / "latin1")
    with pytest.raises(TrainingError, match="missing cannot be read: No such file"):
        read_text(tmp_path / "missing")
    with pytest.raises(TrainingError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


def test_split_holds_out_the_end():
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
    train, heldout = split_text(text, 0.1)
    assert train + heldout == text
    assert len(heldout) == 100
    assert split_text(text, 1.0) == ("", text)


def test_training_windows_are_stretches_of_the_text_after_bos():
    batch = training_batch(IDS, 3, seed=0, **WINDOW)
    assert batch.tokens_BL.shape == batch.targets_BL.shape == (4, 16)
    assert batch.tokens_BL.dtype == batch.targets_BL.dtype == np.int32
    assert batch.valid_BL.all()
    assert (batch.tokens_BL[:, 0] == 0).all()
    np.testing.assert_array_equal(batch.tokens_BL[:, 1:], batch.targets_BL[:, :-1])
    text = IDS.tobytes()
    assert all(row.tobytes() in text for row in batch.targets_BL)


def test_a_batch_is_a_function_of_seed_and_step():
    def targets(seed, step):
        return training_batch(IDS, step, seed=seed, **WINDOW).targets_BL.tobytes()

    assert targets(0, 5) == targets(0, 5)
    assert len({targets(seed, step) for seed in range(3) for step in range(3)}) == 9


def test_every_part_of_the_text_is_drawn():
    ids = np.arange(20, dtype=np.int32)
    drawn = {int(row[0]) for step in range(50) for row in training_batch(ids, step, seed=0, **WINDOW).targets_BL}
    assert drawn == {0, 1, 2, 3, 4}
    assert (training_batch(ids[:16], 0, seed=0, **WINDOW).targets_BL == np.arange(16)).all()


def test_a_text_shorter_than_a_window():
    with pytest.raises(TrainingError, match=re.escape("has 15 tokens, but a window 16")):
        training_batch(IDS[:15], 0, seed=0, **WINDOW)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 65, 200])
def test_evaluation_scores_every_token_once(size):
    batches = list(evaluation_batches(IDS[:size], **WINDOW))
    assert len(batches) == -(-size // 64)
    assert all(x.shape == (4, 16) for batch in batches for x in batch)
    np.testing.assert_array_equal(np.concatenate([b.targets_BL[b.valid_BL] for b in batches]), IDS[:size])
    for batch in batches:
        assert (batch.tokens_BL[:, 0] == 0).all()
        np.testing.assert_array_equal(batch.tokens_BL[:, 1:], batch.targets_BL[:, :-1])


def test_nothing_to_evaluate():
    assert list(evaluation_batches(IDS[:0], **WINDOW)) == []
