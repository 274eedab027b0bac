"""Preference data: units stay whole, packed rows hold what unpacked ones do, and only answers are in the loss."""

import json

import pytest
import torch

from tests.data.conftest import Words, open_preferences, units_in, write_lines, write_pairs
from tunesmith.configs.data import PreferenceData
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import UserError

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


@pytest.mark.parametrize("packed", [False, True])
def test_select_gives_the_documents_of_one_kind(pairs, packed):
    data = open_preferences({"source": pairs, "packed": packed}, batch_size=4, max_seq_len=40, with_index=True)
    for batch in data.step(1):
        batch.extra |= {"states": torch.randn(*batch.input_ids.shape, 3), "others": torch.zeros(1)}
        for side in (0, 1):
            half = batch.select(side, 2)
            assert list(units_in([half], 1)) == [(unit[side],) for unit in units_in([batch])]
            assert half.counts == {
                "tokens": int((half.labels != -100).sum()),
                "answers": batch.counts["pairs"],
            }
            assert half.counts["tokens"] == abs(side * batch.counts["tokens"] - batch.counts["chosen_tokens"])
            assert half.most_documents == batch.most_documents // 2
            padding = half.documents < 0
            assert not padding.all(0).any() and (half.labels[padding] == -100).all()
            assert (half.extra["index"][padding] == -1).all() and set(half.extra) == {"values", "index", "states"}
            here = (batch.documents >= 0) & (batch.documents % 2 == side)
            for name in ("index", "states"):
                assert torch.equal(half.extra[name][~padding], batch.extra[name][here])
            assert torch.equal(half.documents[~padding], batch.documents[here] // 2)


def test_select_of_a_batch_that_is_all_padding(pairs):
    data = open_preferences({"source": pairs}, batch_size=1, rank=1, size=2)
    batch = next(batch for n in range(1, data.total_steps + 1) for batch in data.step(n))
    empty = batch.map_tokens(lambda tensor, fill: torch.full_like(tensor, fill))
    half = empty.select(0, 2)
    assert half.input_ids.shape == (1, 1) and half.counts == {"tokens": 0, "answers": 0}
    assert (batch.padded_to(99).most_documents, batch.to("cpu").most_documents) == (2, 2)


# --- answers -------------------------------------------------------------------------------------


def test_pairs_as_answers(pairs):
    units = everything(open_preferences({"source": pairs}, batch_size=4), 2)
    single = open_preferences({"source": pairs}, units="answers", batch_size=4)
    expected = [(ids, labels, 1.0 - side) for unit in units for side, (ids, labels, _) in enumerate(unit)]
    assert everything(single, 1) == sorted((answer,) for answer in expected)
    assert single.report.sources[0].rows_used == 50 and single.total_steps == 25
    assert "50 of 50 rows used as 100 answers; " in str(single.report)
    (batch,) = single.step(1)
    assert batch.most_documents == 1 and batch.counts == {
        "tokens": int((batch.labels != -100).sum()),
        "answers": 4,
    }


def write_answers(path, count, prompts=None):
    rows = [
        {"prompt": f"p{i % (prompts or count)}", "completion": f"c{i} " * (1 + i % 4), "label": i % 3 > 0}
        for i in range(count)
    ]
    return write_lines(path, rows)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_answers_and_mismatched(tmp_path, packed, streaming):
    source = write_answers(tmp_path / "a.jsonl", 20)
    data = open_preferences(
        {"source": source, "packed": packed, "streaming": streaming},
        units="answers and mismatched",
        batch_size=4,
        max_seq_len=16,
        max_steps=5,
    )
    words = {Words().encode(f"{kind}{i}")[0]: (kind, i) for kind in "pc" for i in range(20)}
    seen = set()
    for unit in everything(data):
        (prompt, row), (other_prompt, same) = (words[ids[1]] for ids, _, _ in unit)
        (answer, own), (other_answer, next_row) = (words[ids[4]] for ids, _, _ in unit)
        assert (prompt, other_prompt, answer, other_answer) == ("p", "p", "c", "c")
        assert same == row == own and next_row == (row + 1) % 20
        assert [value for _, _, value in unit] == [float(row % 3 > 0)] * 2
        seen.add(row)
    assert len(seen) == 20
    batch = data.step(1)[0]
    assert batch.counts["answers"] == int((batch.documents.max(1).values + 1).sum()) // 2


def test_mismatched_answers_are_to_another_prompt(tmp_path):
    rows = [{"prompt": p, "completion": f"c{i}", "label": True} for i, p in enumerate("aabbba")]
    data = open_preferences({"source": write_lines(tmp_path / "a.jsonl", rows)}, units="answers and mismatched")
    words = {Words().encode(f"c{i}")[0]: i for i in range(6)}
    others = {words[own[0][4]]: words[other[0][4]] for own, other in everything(data)}
    assert others == {0: 2, 1: 2, 2: 5, 3: 5, 4: 5, 5: 2}


def test_single_answers_are_no_pairs(tmp_path):
    source = write_answers(tmp_path / "a.jsonl", 3)
    for options in ({}, {"format": "unpaired"}):
        with pytest.raises(UserError) as caught:
            open_preferences({"source": source, **options})
        assert str(caught.value) == (
            f"{source}:1: an answer with a label (the format unpaired) is half of no pair: "
            "train on it with `loss.type: kto` or `bco`, which take answers one by one"
        )


# --- which rows can be used ----------------------------------------------------------------------


def test_bad_rows_are_counted_and_named(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": "p", "chosen": "a", "rejected": " "},
        {"prompt": " ", "chosen": "a", "rejected": "b"},
        {"prompt": [USER, {"role": "user", "content": ""}], "chosen": "a", "rejected": "b"},
        {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "5+5?"}, GOOD]},
        {"prompt": "p", "chosen": "a", "rejected": [BAD]},
        {"prompt": "p", "chosen": None, "rejected": "b"},
        {"prompt": "p " * 40, "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a " * 30 + "b", "rejected": "a " * 30 + "c"},
        {"prompt": "p", "chosen": "a " * 30 + "b", "rejected": "d " * 30 + "c"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "much"},
        {"prompt": "p", "chosen": [USER], "rejected": [BAD]},
        {"prompt": "p", "chosen": "a  b", "rejected": "a b"},
    ]
    source = write_lines(tmp_path / "a.jsonl", rows)
    expected = {
        "chosen equals rejected": (2, "a.jsonl:2"),
        "empty answer": (1, "a.jsonl:3: column `rejected`"),
        "empty prompt": (2, "a.jsonl:4"),
        "no common prompt": (1, "a.jsonl:6: the answers begin differently"),
        "one answer is text and the other is messages": (1, "a.jsonl:7"),
        "column `chosen` is not a list of messages": (1, "a.jsonl:8: it is None"),
        "column `margin` is not a number": (1, "a.jsonl:12: it is 'much'"),
        "no assistant message": (1, "a.jsonl:13: column `chosen`"),
        "no answer within max_seq_len": (1, "a.jsonl:9"),
        "chosen equals rejected within max_seq_len": (1, "a.jsonl:10"),
    }
    for streaming in (False, True):
        data = open_preferences({"source": source, "streaming": streaming}, max_seq_len=16, max_steps=1)
        assert len(list(units_in(data.step(1)))) == 2
        report = data.report.sources[0]
        found = {reason: (n, place.rpartition("/")[2]) for reason, (n, place) in report.skipped.items()}
        if streaming:  # places are bytes there
            assert {reason: n for reason, (n, _) in found.items()} == {reason: n for reason, (n, _) in expected.items()}
        else:
            assert found == expected
        assert (report.rows_read, report.rows_used, report.truncated, report.documents * (not streaming)) == (
            14,
            2,
            2,
            4 * (not streaming),
        )
    data = open_preferences({"source": source}, max_seq_len=16, batch_size=9)
    assert report.trained_tokens == data.step(1)[0].counts["tokens"]
    with pytest.raises(UserError) as caught:
        open_preferences({"source": source, "on_bad_row": "error"})
    assert str(caught.value) == (
        f"{source}:2: chosen equals rejected; mend the row, or leave such rows out with `on_bad_row: skip`"
    )
    alike = write_lines(tmp_path / "b.jsonl", rows[9:10])
    with pytest.raises(
        UserError, match="can be used: chosen equals rejected within `tokenizer.max_seq_len` = 16 tokens"
    ):
        open_preferences({"source": alike}, max_seq_len=16)


def test_labels_that_say_nothing(tmp_path):
    rows = [{"prompt": "p", "completion": "c", "label": label} for label in (True, 0, 1.0, "false", 2, None, "maybe")]
    data = open_preferences({"source": write_lines(tmp_path / "a.jsonl", rows)}, units="answers", batch_size=9)
    assert [value for ((_, _, value),) in everything(data, 1)] == [0.0, 0.0, 1.0, 1.0]
    assert data.report.sources[0].skipped == {
        "a label that is neither true nor false": (3, f"{tmp_path}/a.jsonl:5: it is 2")
    }


# --- streams, stops and places -------------------------------------------------------------------


def test_streams_hold_the_same_pairs_on_any_number_of_ranks_and_go_on_after_a_stop(pairs):
    options = {"batch_size": 2, "global_batch_size": 4, "max_steps": 30}
    data = {"source": pairs, "streaming": True, "shuffle_buffer": 20, "packed": True}
    indexed = open_preferences({"source": pairs}, batch_size=4)
    whole = open_preferences(data, max_seq_len=40, **options)
    steps = [sorted(units_in(whole.step(n))) for n in range(1, 31)]
    assert set(sum(steps, [])) == set(everything(indexed))
    ranks = [open_preferences(data, rank=rank, size=2, max_seq_len=40, **options) for rank in range(2)]
    assert [sorted(units_in([b for one in ranks for b in one.step(n)])) for n in range(1, 31)] == steps
    stopped = open_preferences(data, max_seq_len=40, **options)
    for n in range(1, 8):
        stopped.step(n)
    state = json.loads(json.dumps(stopped.state()))
    again = open_preferences(data, max_seq_len=40, **options)
    again.load_state(state)
    assert [sorted(units_in(again.step(n))) for n in range(8, 31)] == steps[7:]


def test_indexed_data_goes_on_after_a_stop_and_validates(pairs):
    data = open_preferences({"source": pairs, "packed": True}, batch_size=2, epochs=2)
    steps = [sorted(units_in(data.step(n))) for n in range(1, data.total_steps + 1)]
    again = open_preferences({"source": pairs, "packed": True}, batch_size=2, epochs=2)
    again.load_state({"step": 4})
    assert sorted(units_in(again.step(5))) == steps[4]
    held_out = open_preferences({"source": pairs}, validation=True, batch_size=4, max_val_steps=None)
    assert everything(held_out) == everything(open_preferences({"source": pairs}, batch_size=4))


def test_sources_are_mixed_by_weight(tmp_path):
    sources = [
        PreferenceData(source=write_pairs(tmp_path / f"{n}.jsonl", n), weight=weight, packed=n == 12)
        for n, weight in ((12, 1.0), (30, 3.0))
    ]
    data = open_preferences(sources, batch_size=4)
    assert "24.2% of rows" in str(data.report), "8 of 33: 12 pairs are packed into 3 rows"
    assert all(list(units_in(step)) for step in data)


@pytest.mark.parametrize("packed", [False, True])
def test_the_index_is_the_place_of_a_token(tmp_path, packed):
    sources = [PreferenceData(source=write_pairs(tmp_path / f"{n}.jsonl", n), packed=packed) for n in (12, 30)]
    data = open_preferences(sources, batch_size=4, epochs=2, with_index=True)
    known, places = {}, []
    for n in range(1, data.total_steps + 1):
        for batch in data.step(n):
            index, real = batch.extra["index"], batch.documents >= 0
            assert (index[~real] == -1).all()
            places += index[real].tolist() if n <= data.steps_per_epoch else []
            for place, token in zip(index[real].tolist(), batch.input_ids[real].tolist()):
                assert known.setdefault(place, token) == token
    assert len(places) == len(set(places)) and max(places) < data.num_indexed
    assert data.num_indexed == len(places) + 2 * 42, "of each document all tokens but the last are inputs"
    without = open_preferences(sources, batch_size=4)
    assert "index" not in without.step(1)[0].extra and without.num_indexed == 0
    for source in sources:
        source.streaming = True
    stream = open_preferences(sources, batch_size=4, max_steps=2, with_index=True)
    assert "index" not in stream.step(1)[0].extra and stream.num_indexed == 0


# --- real templates and real files ----------------------------------------------------------------


def shown(tokenizer, unit):
    """Each document as text, with what is in the loss between ⟦ and ⟧."""
    texts = []
    for ids, labels, _ in unit:
        text, inside = tokenizer.decode(ids[:1], skip_special_tokens=False), False
        for token, label in zip([*ids[1:], labels[-1]], labels):
            text += "⟦" * (label != -100 and not inside) + "⟧" * (label == -100 and inside)
            inside = label != -100
            text += tokenizer.decode([token], skip_special_tokens=False)
        texts.append(text + "⟧" * inside)
    return texts


SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"


def asked(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "It is 4.", "rejected": "Five!"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "2+2?", "chosen": GOOD, "rejected": BAD},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"instruction": "2+2?", "input": "", "output": "x", "chosen": "It is 4.", "rejected": "Five!"},
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: It is 4.", "rejected": "\n\nHuman: 2+2?\n\nAssistant: Five!"},
        {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": "It is 4.", "rejected": "Five!"},
        {"chosen": "2+2? It is 4.", "rejected": "2+2? Five!"},
    ],
)
def test_every_form_of_a_pair(tmp_path, qwen, row):
    source = write_lines(tmp_path / "a.jsonl", [{**row, "system": "Be kind."}])
    (unit,) = everything(open_preferences({"source": source}, tokenizer=qwen, max_seq_len=200))
    head = SYSTEM + asked("2+2?")
    assert shown(qwen, unit) == [f"{head}⟦It is 4.<|im_end|>⟧", f"{head}⟦Five!<|im_end|>⟧"]


def test_only_what_differs_is_in_the_loss(tmp_path, qwen):
    more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    row = {"chosen": [USER, GOOD, *more[:1], BAD, *more], "rejected": [{**USER, "weight": 1}, GOOD, *more]}
    row["rejected"][0].pop("weight")
    source = write_lines(tmp_path / "a.jsonl", [row])
    data = {"source": source, "system_prompt": "Be kind."}
    (unit,) = everything(open_preferences(data, tokenizer=qwen, max_seq_len=200))
    begin = SYSTEM + asked("2+2?") + "It is 4.<|im_end|>\n" + asked("Sure?")
    assert shown(qwen, unit) == [
        f"{begin}⟦Five!<|im_end|>⟧\n{asked('Sure?')}⟦Yes.<|im_end|>⟧",
        f"{begin}⟦Yes.<|im_end|>⟧",
    ]


def test_whole_conversations_with_a_label_train_their_last_answer(tmp_path, qwen):
    row = {"messages": [{**USER, "weight": 1}, GOOD, USER, BAD], "label": False}
    source = write_lines(tmp_path / "a.jsonl", [row])
    data = open_preferences({"source": source, "system_prompt": "Be kind."}, "answers", tokenizer=qwen, max_seq_len=200)
    (unit,) = everything(data, 1)
    assert shown(qwen, unit) == [SYSTEM + asked("2+2?") + "It is 4.<|im_end|>\n" + asked("2+2?") + "⟦Five!<|im_end|>⟧"]


def test_tools_go_to_both_answers(tmp_path, qwen):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    row = {"prompt": [USER], "chosen": [call], "rejected": [BAD], "tools": [{"name": "add", "parameters": {}}]}
    data = open_preferences({"source": write_lines(tmp_path / "a.jsonl", [row])}, tokenizer=qwen, max_seq_len=400)
    chosen, rejected = shown(qwen, everything(data)[0])
    assert chosen.partition("⟦")[0] == rejected.partition("⟦")[0] and "<tools>" in chosen
    assert chosen.partition("⟦")[2].startswith("<tool_call>") and rejected.endswith("⟦Five!<|im_end|>⟧")


@pytest.mark.parametrize(
    "name, units, used, read",
    [
        ("instruct-rasbt/instruction-data-with-preference.json", "pairs", 1094, 1100),
        ("hh-rlhf/harmless_test_500.jsonl", "pairs", 499, 500),
        ("hh-rlhf/harmless_test_500.jsonl", "answers", 499, 500),
        ("preference/kto_300.json", "answers", 300, 300),
        ("preference/kto_300.json", "answers and mismatched", 300, 300),
    ],
)
def test_real_files(assets, qwen, name, units, used, read):
    data = open_preferences({"source": str(assets / "data" / name)}, units, tokenizer=qwen, max_seq_len=4096)
    report = data.report.sources[0]
    assert (report.rows_used, report.rows_read) == (used, read), str(report)
    (batch, *_) = data.step(1)
    assert batch.counts["tokens"] > 0


def test_suggestions_for_other_columns(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"question": "q", "response_j": "a", "response_k": "b"}])
    with pytest.raises(UserError) as caught:
        open_preferences({"source": source})
    assert str(caught.value) == (
        f"{source}:1: no known format fits the columns `question`, `response_j`, `response_k`; "
        "perhaps `column_map: {chosen: response_j, rejected: response_k}`; the formats and their columns: "
        "preference (chosen rejected [prompt] [instruction] [input] [margin] [score_chosen] [score_rejected] [system] [tools]), "
        "unpaired (prompt completion label, or messages label [system] [tools])"
    )
    mapped = {"source": source, "column_map": {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}}
    assert len(everything(open_preferences(mapped))) == 1
