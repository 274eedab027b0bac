"""Packing loses nothing, fills rows, is quick, and leaves the gradients as they were."""

import json
import time

import numpy as np
import pytest
import torch

from tests.conftest import TINY_LLAMA
from tests.data.conftest import Words, documents, open_chat, open_text, write_chats, write_lines
from tests.models.conftest import build_empty
from tunesmith.data.packing import cut_rows, packed_rows, pieces, random_keys, shuffled, single_rows


def lengths_like_alpaca(count, seed=0):
    """Log-normal, as the lengths of Alpaca's rows are: median 80 tokens, a long tail."""
    return np.clip(np.random.default_rng(seed).lognormal(4.4, 0.7, count).astype(np.int64), 8, None)


def starts_of(lengths):
    return np.cumsum(lengths) - lengths


@pytest.mark.parametrize("seed", [None, (1,), (2, 5)])
@pytest.mark.parametrize("capacity", [16, 100, 2048])
def test_every_segment_comes_once_and_rows_keep_within_capacity(seed, capacity):
    for case in range(10):
        lengths = np.minimum(np.random.default_rng(case).integers(1, 200, 1 + case * 30), capacity)
        plan = packed_rows(starts_of(lengths), lengths, capacity, seed)
        order = np.argsort(plan.starts)
        assert np.array_equal(plan.starts[order], starts_of(lengths)) and np.array_equal(plan.lengths[order], lengths)
        assert plan.row_lengths().max() <= capacity and plan.row_lengths().min() > 0
        assert plan.row_lengths().sum() == lengths.sum()


def test_first_fit_decreasing_against_the_textbook():
    for case in range(20):
        lengths = np.random.default_rng(case).integers(1, 60, 200)
        rooms = []
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = next((i for i, room in enumerate(rooms) if room >= length), None)
            if fitting is None:
                rooms.append(100 - length)
            else:
                rooms[fitting] -= length
        assert packed_rows(starts_of(lengths), lengths, 100, None).num_rows == len(rooms)


def test_the_number_of_rows_is_the_same_in_every_pass_and_the_rows_are_not():
    lengths = lengths_like_alpaca(3000)
    first, second = (packed_rows(starts_of(lengths), lengths.clip(max=512), 512, (7, n)) for n in (0, 1))
    assert first.num_rows == second.num_rows
    assert np.mean(first.starts == second.starts) < 0.01
    again = packed_rows(starts_of(lengths), lengths.clip(max=512), 512, (7, 0))
    assert np.array_equal(first.starts, again.starts) and np.array_equal(first.offsets, again.offsets)


@pytest.mark.parametrize("capacity", [512, 2048])
def test_fill_on_real_lengths(assets, capacity):
    rows = json.loads((assets / "data/alpaca/alpaca_2000.json").read_text())
    lengths = np.array([len(" ".join(row.values())) // 4 + 12 for row in rows]).clip(max=capacity)
    plan = packed_rows(starts_of(lengths), lengths, capacity, (1, 0))
    assert lengths.sum() / (plan.num_rows * capacity) >= 0.98


def test_two_hundred_thousand_rows_a_second():
    """Twenty times slower than measured would still pass: this is about the order of growth, not the machine."""
    lengths = lengths_like_alpaca(200_000).clip(max=2048)
    started = time.process_time()
    plan = packed_rows(starts_of(lengths), lengths, 2048, (1, 0))
    assert time.process_time() - started < 1
    assert lengths.sum() / (plan.num_rows * 2048) > 0.995


def test_cut_rows_are_full_and_keep_the_order_within_documents():
    lengths = lengths_like_alpaca(500)
    plan = cut_rows(starts_of(lengths), lengths, 64, (3, 0))
    sizes = plan.row_lengths()
    assert (np.sort(sizes)[1:] == 64).all() and sizes.sum() == lengths.sum()
    tokens = np.concatenate([np.arange(s, s + n) for s, n in zip(plan.starts, plan.lengths)])
    assert np.array_equal(np.sort(tokens), np.arange(lengths.sum()))
    in_order = cut_rows(starts_of(lengths), lengths, 64, None)
    tokens = np.concatenate([np.arange(s, s + n) for s, n in zip(in_order.starts, in_order.lengths)])
    assert np.array_equal(tokens, np.arange(lengths.sum()))


def test_pieces_and_single_rows():
    starts, lengths = pieces(np.array([0, 10, 15]), np.array([10, 5, 8]), 4)
    assert starts.tolist() == [0, 4, 8, 10, 14, 15, 19] and lengths.tolist() == [4, 4, 2, 4, 1, 4, 4]
    assert single_rows(starts, lengths, None).row(2)[0].tolist() == [8]
    assert sorted(single_rows(starts, lengths, (1,)).starts.tolist()) == starts.tolist()


def test_random_keys_are_splitmix64():
    """Published outputs of the generator from state 0; the first is spent on mixing the seed."""
    assert [hex(key) for key in random_keys(2).tolist()] == ["0x6e789e6aa1b965f4", "0x6c45d188009454f"]
    assert not np.array_equal(shuffled(100, 1, 2), shuffled(100, 2, 1))
    assert sorted(shuffled(100, 1).tolist()) == list(range(100))


def test_labels_are_the_next_token_of_the_same_document(tmp_path):
    path = write_chats(tmp_path / "a.jsonl", 60)
    packed, plain = (open_chat({"source": path, "packed": p}, batch_size=4) for p in (True, False))
    found = [sorted(d for step in data for d in documents(step)) for data in (packed, plain)]
    assert found[0] == found[1] and len(found[0]) == 60
    for ids, labels in found[0]:
        for t, label in enumerate(labels[:-1]):
            assert label in (-100, ids[t + 1])
        assert labels[-1] == 3  # the end of the answer, which nothing needs as an input


def test_positions_restart_with_every_document(tmp_path):
    data = open_chat({"source": write_chats(tmp_path / "a.jsonl", 60), "packed": True}, batch_size=2)
    for batch in data.step(1):
        for marks, positions in zip(batch.documents, batch.positions):
            for number in marks.unique().tolist():
                mine = positions[marks == number]
                assert torch.equal(mine, torch.arange(len(mine)))
            assert (marks.diff()[: int((marks >= 0).sum()) - 1] >= 0).all()


def test_text_is_cut_without_losing_a_token(tmp_path):
    rows = [{"text": " ".join(f"w{i}x{k}" for k in range(1 + i * 5 % 37))} for i in range(50)]
    source = write_lines(tmp_path / "a.jsonl", rows)
    tokens = sum(len(row["text"].split()) for row in rows)
    for options in ({}, {"split_across_pack": False}, {"packed": False}):
        data = open_text({"source": source, **options}, max_seq_len=16, batch_size=4, shuffle=True)
        trained = sum(batch.counts["tokens"] for step in data for batch in step)
        assert trained == tokens == data.report.to_dict()["trained_tokens"]
        assert max(batch.input_ids.shape[1] for step in data for batch in step) <= 16
    joined = open_text({"source": source, "mask_documents": False}, max_seq_len=16, batch_size=4)
    batches = [batch for step in joined for batch in step]
    assert all(batch.documents is None for batch in batches)
    assert sum(batch.counts["tokens"] for batch in batches) > tokens
    inputs = torch.cat([batch.input_ids.flatten() for batch in batches])
    assert int((inputs > 0).sum()) == tokens + 50
    for batch in batches:  # the end of a text predicts the first word of the next
        assert torch.equal(
            batch.labels[:, :-1][batch.input_ids[:, 1:] > 0], batch.input_ids[:, 1:][batch.input_ids[:, 1:] > 0]
        )


def test_packed_gradients_equal_those_of_single_rows(tmp_path):
    """The real model, in float32: what a step changes doesn't depend on packing."""
    model = build_empty({**TINY_LLAMA, "vocab_size": 101, "hidden_size": 64})
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, 1.0 if parameter.dim() == 1 else 0.0, 0.1, generator)
    model.init_buffers("cpu", max_seq_len=64)
    source = write_chats(tmp_path / "a.jsonl", 40, longest=25)
    gradients = {}
    for packed in (False, True):
        data = open_chat(
            {"source": source, "packed": packed}, tokenizer=Words(101), batch_size=7, gradient_accumulation_steps=6
        )
        total = 0
        for batch in data.step(1):
            hidden = model(batch.input_ids, batch.positions, batch.documents)
            model.lm_head.cross_entropy(hidden, batch.labels).backward()
            total += batch.counts["tokens"]
        gradients[packed] = {name: p.grad / total for name, p in model.named_parameters()}
        model.zero_grad()
    for name, alone in gradients[False].items():
        assert (gradients[True][name] - alone).norm() <= 1e-5 * alone.norm(), name
