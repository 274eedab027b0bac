"""Preference data: units stay whole, packed rows hold what unpacked ones do, and only answers are in the loss."""

import pytest

from tests.data.conftest import Words, open_preferences, units_in, write_pairs
from tunesmith.data.tokenizer import load_tokenizer

USER = {"role": "user", "content": "2+2?"}
GOOD, BAD = {"role": "assistant", "content": "It is 4."}, {"role": "assistant", "content": "Five!"}


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", 50)


@pytest.fixture(scope="module")
def qwen(assets):
    return load_tokenizer(assets / "tokenizers/qwen2.5")


def everything(data, size=2):
    return sorted(unit for step in data for unit in units_in(step, size))


def test_packed_rows_hold_the_pairs_of_unpacked_ones(pairs):
    plain = open_preferences({"source": pairs}, batch_size=4)
    packed = open_preferences({"source": pairs, "packed": True}, batch_size=2, max_seq_len=32)
    assert everything(plain) == everything(packed) and len(everything(plain)) == 50
    for batch in plain.step(1):
        assert batch.most_documents == 2 and batch.documents is not None
        assert batch.counts["pairs"] == 4
    widths = {batch.input_ids.shape[1] for step in packed for batch in step}
    assert len(widths) == 1 and max(widths) <= 64
    assert packed.total_steps < 13 and max(batch.most_documents for step in packed for batch in step) > 2


def test_a_pair_token_by_token(pairs):
    data = open_preferences({"source": pairs}, batch_size=1, shuffle=False)
    (batch,) = data.step(7)  # p6 twice, c6 seven times, r6 seven times
    prompt, answers = Words().encode("p6"), [Words().encode("c6"), Words().encode("r6")]
    inputs, labels = [], []
    for (answer,) in answers:
        ids = [2, *prompt * 2, 3, 2, *[answer] * 7, 3]
        inputs += ids[:-1]
        labels += [-100] * 4 + ids[5:]
    assert batch.input_ids[0, : len(inputs)].tolist() == inputs
    assert batch.labels[0, : len(inputs)].tolist() == labels
    assert batch.counts == {"tokens": 16, "pairs": 1, "chosen_tokens": 8}
    assert batch.documents[0].tolist() == [0] * 12 + [1] * 12 and batch.extra["values"].unique().tolist() == [1.5]


@pytest.mark.parametrize("packed", [False, True])
def test_every_cut_of_the_global_batch_gives_the_same_pairs(pairs, packed):
    data = {"source": pairs, "packed": packed}
    whole = open_preferences(data, batch_size=6, epochs=2)
    reference = [sorted(units_in(whole.step(n))) for n in range(1, whole.total_steps + 1)]
    for batch_size, ranks in ((1, 1), (3, 1), (1, 3), (3, 2)):
        cuts = [
            open_preferences(data, rank=rank, size=ranks, batch_size=batch_size, global_batch_size=6, epochs=2)
            for rank in range(ranks)
        ]
        assert {cut.fingerprint for cut in cuts} == {whole.fingerprint}
        for n, expected in enumerate(reference, 1):
            parts = [batch for cut in cuts for batch in cut.step(n)]
            assert sorted(units_in(parts)) == expected
            assert sum(batch.counts["pairs"] for batch in parts) == len(expected)
