"""What a step sees depends on seed, data and step alone; nothing is lost, doubled, or trained on by mistake."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.data.conftest import Words, documents, mesh, open_chat, open_text, write_chats, write_lines
from tunesmith.configs.data import ChatData
from tunesmith.configs.sft import SFT
from tunesmith.data.indexed import apportioned
from tunesmith.data.loader import validation_batches
from tunesmith.errors import UserError


@pytest.fixture
def chats(tmp_path):
    return write_chats(tmp_path / "chats.jsonl", 50)


def rows_of(batches):
    """The rows of some micro-batches as (ids, labels), without padding, in any order."""
    return sorted(
        (tuple(ids[ids != 0].tolist()), tuple(labels[ids != 0].tolist()))
        for batch in batches
        for ids, labels in zip(batch.input_ids, batch.labels)
        if (labels != -100).any()
    )


@pytest.mark.parametrize("packed", [False, True])
def test_every_cut_of_the_global_batch_gives_the_same_rows(chats, packed):
    data = {"source": chats, "packed": packed}
    whole = open_chat(data, batch_size=12, epochs=2)
    reference = [rows_of(whole.step(n)) for n in range(1, whole.total_steps + 1)]
    for batch_size, ranks in ((1, 1), (3, 1), (4, 1), (2, 3), (1, 4), (3, 2)):
        cuts = [
            open_chat(data, rank, ranks, batch_size=batch_size, global_batch_size=12, epochs=2) for rank in range(ranks)
        ]
        assert {cut.total_steps for cut in cuts} == {whole.total_steps}
        assert cuts[0].fingerprint == whole.fingerprint
        for n, expected in enumerate(reference, 1):
            parts = [cut.step(n) for cut in cuts]
            assert len({len(part) for part in parts}) == 1, "ranks must take part in as many forward passes"
            assert all(len(batch.input_ids) <= batch_size for part in parts for batch in part)
            assert rows_of(sum(parts, [])) == expected


def test_every_row_comes_once_an_epoch_and_epochs_differ(chats):
    data = open_chat({"source": chats}, batch_size=8, epochs=3)
    assert (data.steps_per_epoch, data.total_steps) == (7, 21)
    epochs = [[rows_of(data.step(e * 7 + n)) for n in range(1, 8)] for e in range(3)]
    assert len(epochs[0][-1]) == 2, "the last step of an epoch holds what is left"
    everything = [sorted(sum(epoch, [])) for epoch in epochs]
    assert everything[0] == everything[1] == everything[2] and len(everything[0]) == 50
    assert epochs[0] != epochs[1] != epochs[2]
    other_seed = open_chat({"source": chats}, batch_size=8, seed=5)
    assert rows_of(other_seed.step(1)) != epochs[0][0]


def test_without_shuffling_rows_keep_their_order(chats):
    data = open_chat({"source": chats}, batch_size=5, shuffle=False)
    first = rows_of(data.step(1))
    lines = [json.loads(line) for line in Path(chats).read_text().splitlines()[:5]]
    assert {len(labels) for _, labels in first} == {
        len((row["prompt"] + row["completion"]).split()) + 3 for row in lines
    }


def test_steps_can_be_had_in_any_order(chats):
    data = open_chat({"source": chats, "packed": True}, batch_size=2, epochs=4)
    forward = [rows_of(data.step(n)) for n in range(1, data.total_steps + 1)]
    for n in (3, 1, data.total_steps, 2, 2):
        assert rows_of(data.step(n)) == forward[n - 1]
    data.close()
    assert rows_of(data.step(4)) == forward[3]


def test_lengths_of_a_run(chats):
    def steps(**options):
        return open_chat({"source": chats}, batch_size=5, **options).total_steps

    assert steps() == 10
    assert steps(epochs=3) == 30
    assert steps(epochs=3, max_steps=12) == 12
    assert steps(epochs=3, max_steps_per_epoch=4) == 12
    assert steps(gradient_accumulation_steps=4) == 3
    data = open_chat({"source": chats}, batch_size=5, epochs=2, max_steps_per_epoch=4)
    assert rows_of(data.step(1)) != rows_of(data.step(5))
    with pytest.raises(UserError, match="`global_batch_size` = 12 is no multiple of `batch_size` = 5; take 10"):
        steps(global_batch_size=12)


def test_validation_is_one_pass_in_order(chats):
    data = open_chat(
        {"source": chats},
        validation=True,
        batch_size=4,
        batch_size_val=7,
        gradient_accumulation_steps=3,
        max_val_steps=None,
    )
    assert len(data) == 8 and [len(step) for step in data] == [1] * 8
    assert [rows_of(step) for step in data] == [rows_of(step) for step in data]
    assert sum(len(rows_of(step)) for step in data) == 50
    assert len(open_chat({"source": chats}, validation=True, max_val_steps=3)) == 3
    assert validation_batches(SFT(model="m", dataset=ChatData(source=chats)), Words(), mesh()) is None


def test_padding(chats):
    for batch in open_chat({"source": chats}, batch_size=4).step(1):
        assert batch.input_ids.shape[1] % 8 == 0 and batch.documents is None
        assert torch.equal(batch.positions, torch.arange(batch.input_ids.shape[1]).expand_as(batch.positions))
        assert (batch.labels[batch.input_ids == 0] == -100).all()
        assert batch.counts == {"tokens": int((batch.labels != -100).sum())}
    widths = {
        batch.input_ids.shape for step in open_chat({"source": chats, "packed": True}, batch_size=1) for batch in step
    }
    assert widths == {(1, 64)}
    odd = open_chat({"source": chats}, batch_size=50, max_seq_len=21)
    assert max(batch.input_ids.shape[1] for step in odd for batch in step) <= 21


def test_truncated_and_masked_rows_are_reported(tmp_path):
    rows = [{"prompt": "p " * 3, "completion": "c " * n} for n in (2, 30, 5)]
    rows += [
        {"prompt": "p " * 40, "completion": "c"},
        {"prompt": "p", "completion": " "},
        {"prompt": "p", "completion": None},
    ]
    data = open_chat({"source": write_lines(tmp_path / "a.jsonl", rows)}, max_seq_len=16, batch_size=9)
    report = data.report.sources[0]
    assert (report.rows_read, report.rows_used, report.truncated) == (6, 3, 1)
    assert report.truncated_example.endswith("a.jsonl:2")
    assert {reason: (count, place.rpartition("/")[2]) for reason, (count, place) in report.skipped.items()} == {
        "empty answer": (1, "a.jsonl:5: column `completion`"),
        "column `completion` is not a list of messages": (1, "a.jsonl:6: it is None"),
        "no answer within max_seq_len": (1, "a.jsonl:4"),
    }
    assert report.trained_tokens == sum(batch.counts["tokens"] for step in data for batch in step)
    assert report.tokens == sum(len(row[1]) for step in data for row in rows_of(step))
    text = str(data.report)
    assert "3 of 6 rows used" in text and "1 truncated to 16 tokens" in text and "\n" not in text
    assert json.loads(json.dumps(data.report.to_dict()))["skipped"] == 3


def test_bad_rows_can_end_the_run(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": ""}])
    with pytest.raises(UserError) as caught:
        open_chat({"source": source, "on_bad_row": "error"})
    assert (
        str(caught.value)
        == f"{source}:2: empty answer: column `completion`; mend the row, or leave such rows out with `on_bad_row: skip`"
    )
    with pytest.raises(UserError, match="none has an answer within `tokenizer.max_seq_len` = 2 tokens"):
        open_chat({"source": source}, max_seq_len=2)


def test_sources_without_weights_are_joined(tmp_path):
    sources = [ChatData(source=write_chats(tmp_path / f"{n}.jsonl", n)) for n in (30, 10)]
    data = open_chat(sources, batch_size=4, epochs=2)
    assert data.total_steps == 20
    for epoch in range(2):
        assert (
            len({row for n in range(1, 11) for row in rows_of(data.step(epoch * 10 + n))}) == 30
        )  # the ten are among the thirty


def test_weights_are_shares_of_the_rows(tmp_path):
    sources = []
    for name, count, weight in (("a", 30, 1.0), ("b", 10, 3.0)):
        rows = [{"prompt": name, "completion": f"{name}{i}"} for i in range(count)]
        sources.append(ChatData(source=write_lines(tmp_path / f"{name}.jsonl", rows), weight=weight))
    first = {Words().encode(name)[0]: name for name in "ab"}
    for shuffle in (True, False):
        data = open_chat(sources, batch_size=4, epochs=3, shuffle=shuffle)
        drawn = [
            Counter(first[row[0][1]] for step in range(1, 11) for row in rows_of(data.step(e * 10 + step)))
            for e in range(3)
        ]
        assert drawn == [{"a": 10, "b": 30}] * 3
        seen = Counter(row for step in data for row in rows_of(step))
        assert sorted(Counter(seen.values()).items()) == [(1, 30), (9, 10)], (
            "three epochs of a third, and of three passes"
        )
    assert "25.0% of rows" in str(data.report) and "75.0% of rows" in str(data.report)
    sources[0].weight = None
    with pytest.raises(UserError, match="for all of them, or for none"):
        open_chat(sources)


def test_apportioned():
    assert (
        apportioned(10, [0.5, 0.5]) == [5, 5]
        and apportioned(10, [1 / 3] * 3) == [4, 3, 3]
        and apportioned(1000, [0.0001, 0.9999]) == [0, 1000]
    )


def test_state_is_the_last_step_taken(chats):
    data = open_chat({"source": chats}, batch_size=4, epochs=2)
    for n in range(1, 6):
        data.step(n)
    state = json.loads(json.dumps(data.state()))
    assert state["step"] == 5
    again = open_chat({"source": chats}, batch_size=4, epochs=2)
    again.load_state(state)
    assert again.state() == state and rows_of(again.step(6)) == rows_of(data.step(6))


def test_fingerprint_follows_what_decides_the_rows(chats, tmp_path):
    def of(max_seq_len=64, **options):
        data = {"source": options.pop("source", chats), "packed": options.pop("packed", False)}
        return open_chat(data, max_seq_len=max_seq_len, **options).fingerprint

    base = of(batch_size=4)
    assert (
        of(batch_size=2, gradient_accumulation_steps=2)
        == of(batch_size=1, global_batch_size=4)
        == of(batch_size=4, epochs=3)
        == base
    )
    others = [of(batch_size=2), of(batch_size=4, packed=True), of(batch_size=4, shuffle=False), of(32, batch_size=4)]
    others.append(of(batch_size=4, source=write_chats(tmp_path / "other.jsonl", 49)))
    assert len({base, *others}) == 6


def test_errors_in_the_background_surface_and_threads_end(chats):
    before = threading.active_count()
    data = open_chat({"source": chats}, batch_size=4)
    data.step(1)

    def fail(*args):
        raise ZeroDivisionError("bug")

    data.order.rows = fail
    with pytest.raises(ZeroDivisionError):
        for n in range(2, 9):
            data.step(n)
    data.close()
    assert threading.active_count() == before


def digest_of(source):
    digest = hashlib.sha256()
    for step in open_chat({"source": source, "packed": True}, batch_size=2, epochs=2):
        for batch in step:
            for tensor in (batch.input_ids, batch.labels, batch.positions, batch.documents):
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def test_processes_agree(chats):
    program = "import sys; from tests.data.test_loader import digest_of; print(digest_of(sys.argv[1]))"
    environment = os.environ | {
        "PYTHONHASHSEED": "3",
        "PYTHONPATH": os.getcwd(),
        "TUNESMITH_CACHE": os.environ["TUNESMITH_CACHE"] + "2",
    }
    ran = subprocess.run(
        [sys.executable, "-c", program, chats], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == digest_of(chats)


def test_the_real_tokenizer(assets):
    from tunesmith.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(assets / "models/stories260K", chat_template="chatml")
    for source in ("instruct-rasbt/instruction-data.json", "glaive_toolcall_300.json"):
        data = open_chat(
            {"source": str(assets / "data" / source), "split": "[:100]", "packed": True},
            tokenizer=tokenizer,
            max_seq_len=4096,
            batch_size=2,
        )
        assert data.report.sources[0].rows_used > 95 and not data.report.sources[0].skipped
        for ids, labels in list(documents(data.step(1)))[:5]:
            trained = tokenizer.decode([label for label in labels if label != -100], skip_special_tokens=False)
            assert trained.endswith("<|im_end|>") and "<|im_start|>user" not in trained and len(trained) > 12
            assert "user" in tokenizer.decode(ids)
    text = open_text(
        {"source": str(assets / "data/tinyshakespeare/input.txt"), "split": None},
        tokenizer=tokenizer,
        max_seq_len=256,
        batch_size=8,
    )
    assert text.report.sources[0].fill > 0.998
    with pytest.raises(UserError, match="no chat template"):
        open_chat({"source": str(assets / "data" / source)}, tokenizer=load_tokenizer(assets / "tokenizers/gpt2"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("batch_size_val, most", [(7, 3), (2, 3), (1, 5), (7, 1), (20, 3)])
@pytest.mark.parametrize("size", [2, 4])
def test_a_limited_validation_reads_the_same_rows_on_any_number_of_ranks(chats, streaming, batch_size_val, most, size):
    def rows(rank, size):
        options = {"batch_size_val": batch_size_val, "max_val_steps": most}
        data = open_chat({"source": chats, "streaming": streaming}, rank, size, validation=True, **options)
        steps = list(data)
        assert all(len(batch.labels) <= batch_size_val for step in steps for batch in step)
        data.close()
        return steps

    def trained(steps):
        found = [row[row != -100].tolist() for step in steps for batch in step for row in batch.labels]
        return [row for row in found if row]

    one = rows(0, 1)
    ranks = [rows(rank, size) for rank in range(size)]
    shapes = [[len(batch.labels) for step in steps for batch in step] for steps in ranks]
    assert shapes == [shapes[0]] * size, "as many micro-batches and rows on every rank"
    assert sorted(sum(map(trained, ranks), [])) == sorted(trained(one))
    expected = batch_size_val * most
    assert len(trained(one)) == (expected if streaming else min(expected, 50))


@pytest.mark.parametrize(
    "options", [{}, {"packed": True}, {"packed": True, "text": True}, {"packed": True, "text": True, "join": True}]
)
def test_the_index_says_which_token_of_the_data_an_input_is(tmp_path, options):
    """So what a teacher says of a token in one epoch can be found again in the next."""
    if options.get("text"):
        rows = [{"text": f"t{i} " * (5 + i)} for i in range(20)]
        source = write_lines(tmp_path / "a.jsonl", rows)
        data = {"source": source, "mask_documents": not options.get("join")}
        opened = [open_text(data, epochs=2, **asked) for asked in ({}, {"with_index": True})]
    else:
        sources = [ChatData(source=write_chats(tmp_path / f"{n}.jsonl", n), **options) for n in (9, 20)]
        opened = [open_chat(sources, epochs=2, batch_size=4, **asked) for asked in ({}, {"with_index": True})]
    plain, data = opened
    known, first = {}, []
    for n in range(1, data.total_steps + 1):
        for batch, expected in zip(data.step(n), plain.step(n), strict=True):
            assert torch.equal(batch.input_ids, expected.input_ids) and torch.equal(batch.labels, expected.labels)
            assert "index" not in expected.extra
            index = batch.extra["index"]
            real = batch.input_ids != 0
            assert (index[~real] == -1).all()
            first += index[real].tolist() if n <= data.steps_per_epoch else []
            for place, token in zip(index[real].tolist(), batch.input_ids[real].tolist()):
                assert known.setdefault(place, token) == token
            documents = 1 if batch.documents is None else int(batch.documents.max()) + 1
            assert batch.most_documents == documents
    assert len(first) == len(set(first)) == len(known) and max(known) < data.num_indexed
    assert plain.num_indexed == 0
