"""Data of reward models: all tokens are inputs, and labels stand where a score is read."""

import pytest

from tests.data.conftest import Words, open_scored, units_in, write_lines, write_pairs
from tunesmith.configs.data import RewardData
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import UserError


def everything(data, size):
    return sorted(unit for step in data for unit in units_in(step, size))


def test_pairs_are_scored_at_the_end_of_each_document(tmp_path):
    source = write_pairs(tmp_path / "pairs.jsonl", 30)
    plain = open_scored({"source": source}, "preference", batch_size=4)
    packed = open_scored({"source": source, "packed": True}, "preference", batch_size=4, max_seq_len=40)
    streamed = open_scored({"source": source, "streaming": True}, "preference", batch_size=30, max_steps=1)
    assert everything(plain, 2) == everything(packed, 2) == everything(streamed, 2) and len(everything(plain, 2)) == 30
    for batch in plain.step(1):
        assert batch.counts == {"tokens": 8, "pairs": 4} and batch.most_documents == 2
    ordered = open_scored({"source": source}, "preference", batch_size=1, shuffle=False)
    ((chosen, rejected),) = units_in(ordered.step(3))  # p2 three times, c2 three times, r2 eleven times
    for (ids, labels, value), text in ((chosen, "c2 " * 3), (rejected, "r2 " * 11)):
        assert list(ids) == Words().encode(f"<user> {'p2 ' * 3} </> <assistant> {text} </>")
        assert labels == (-100,) * (len(ids) - 1) + (0,) and value == 0.5


def test_pairs_that_are_too_long_are_left_out(tmp_path):
    rows = [{"prompt": "p", "chosen": "a " * n, "rejected": "b"} for n in (3, 8, 9)]
    data = open_scored({"source": write_lines(tmp_path / "a.jsonl", rows)}, "preference", max_seq_len=13)
    report = data.report.sources[0]
    assert (report.rows_used, report.truncated, report.skipped) == (
        2,
        0,
        {"longer than max_seq_len": (1, f"{tmp_path}/a.jsonl:3")},
    )
    with pytest.raises(UserError, match="all are longer than `tokenizer.max_seq_len` = 7 tokens"):
        open_scored({"source": f"{tmp_path}/a.jsonl"}, "preference", max_seq_len=7)


@pytest.mark.parametrize("packed", [False, True])
def test_classes(tmp_path, packed):
    rows = [{"text": "w " * (1 + i), "label": i % 3} for i in range(6)] + [{"text": "w", "label": -1}]
    data = {"source": write_lines(tmp_path / "a.jsonl", rows), "packed": packed}
    opened = open_scored(data, "classification", batch_size=9)
    word = Words().encode("w")
    assert everything(opened, 1) == sorted(
        ((tuple(word * (1 + i)), (-100,) * i + (i % 3,), float(i % 3)),) for i in range(6)
    )
    (batch,) = opened.step(1)
    assert batch.counts == {"tokens": 6, "answers": 6}
    assert opened.report.sources[0].skipped == {
        "a label that is no class": (1, f"{tmp_path}/a.jsonl:7: it is -1; classes count from 0")
    }


def test_classes_by_name(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    rows = [
        {"messages": turns, "label": "kind"},
        {"messages": turns, "label": "rude"},
        {"messages": turns, "label": "odd"},
    ]
    source = write_lines(tmp_path / "a.jsonl", rows)
    data = open_scored({"source": source, "label_names": ["rude", "kind"]}, "classification")
    assert sorted(labels[-1] for ((_, labels, _),) in everything(data, 1)) == [0, 1]
    assert data.report.sources[0].skipped == {
        "a label that is no class": (1, f"{source}:3: it is 'odd'; `label_names` has rude, kind")
    }
    with pytest.raises(UserError) as caught:
        open_scored({"source": source}, "classification")
    assert (
        str(caught.value)
        == "labels are names, such as 'kind': list them all in `label_names`, in the order of the classes"
    )


STEPS = {"prompt": "sum", "completions": ["one two", "three", "four"], "labels": [True, False, True]}


def test_steps_are_scored_at_their_separators(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [STEPS])
    data = {"source": source, "step_separator": " | "}
    ((document,),) = everything(open_scored(data, "process"), 1)
    assert document[0] == tuple(Words().encode("sum one two | three | four |"))
    assert document[1] == (-100, -100, -100, 1, -100, 0, -100, 1)
    opened = open_scored(data, "process", max_seq_len=7)
    (batch,) = opened.step(1)
    assert batch.counts == {"tokens": 2, "steps": 2} and batch.labels[0].max() == 1
    assert opened.report.sources[0].truncated == 1 and "1 of 1 rows used as 2 steps; " in str(opened.report)
    ((document,),) = everything(opened, 1)
    assert document[1] == (-100, -100, -100, 1, -100, 0), "nothing behind the last score is needed"
    ((document,),) = everything(open_scored({**data, "system_prompt": "s"}, "process"), 1)
    assert document[0][:7] == tuple(Words().encode("<system> s </> <user> sum </> <assistant>"))
    with pytest.raises(UserError, match="none has an answer within `tokenizer.max_seq_len` = 3 tokens"):
        open_scored(data, "process", max_seq_len=3)
    with pytest.raises(UserError, match="is no token of this tokenizer"):
        open_scored({"source": source}, "process")


def test_steps_as_trl_has_them(tmp_path, assets):
    """Prompt, then each step and the separator, tokenized apart, as trl.experimental.prm had it (TRL 1.0)."""
    tokenizer = load_tokenizer(assets / "tokenizers/qwen2.5")
    opened = open_scored({"source": write_lines(tmp_path / "a.jsonl", [STEPS])}, "process", tokenizer=tokenizer)
    ((document,),) = everything(opened, 1)
    ids, labels = tokenizer.encode("sum", add_special_tokens=False), [-100]
    for step, label in zip(STEPS["completions"], STEPS["labels"]):
        added = tokenizer.encode(step, add_special_tokens=False) + tokenizer.encode("\n", add_special_tokens=False)
        ids += added
        labels += [-100] * (len(added) - 1) + [int(label)]
    assert document[:2] == (tuple(ids), tuple(labels))


@pytest.mark.parametrize(
    "row, reason",
    [
        ({**STEPS, "labels": [True]}, "as many completions as labels are needed"),
        ({**STEPS, "labels": [True, 2, False]}, "a label that is neither true nor false"),
        ({**STEPS, "completions": "one"}, "column `completions` is not JSON"),
        ({**STEPS, "completions": ["one", 2, "x"]}, "column `completions` is not a list of texts"),
        ({**STEPS, "completions": ["one", " ", "x"]}, "empty answer"),
        ({**STEPS, "prompt": " "}, "empty prompt"),
    ],
)
def test_bad_steps(tmp_path, row, reason):
    data = {"source": write_lines(tmp_path / "a.jsonl", [STEPS, row]), "step_separator": "|"}
    assert list(open_scored(data, "process").report.sources[0].skipped) == [reason]


def test_the_task_says_which_rows_it_takes(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [STEPS])
    for options in ({}, {"format": "stepwise"}):
        with pytest.raises(UserError) as caught:
            open_scored({"source": source, **options}, "preference")
        assert str(caught.value) == (
            f"{source}:1: the format stepwise is for the task `process`, and this run's task is `preference`"
        )
    with pytest.raises(UserError, match="no known format fits the columns `a`"):
        open_scored({"source": write_lines(tmp_path / "b.jsonl", [{"a": 1}])}, "classification")


def test_options():
    with pytest.raises(ValueError) as caught:
        RewardData(source="a", step_separator="", label_names=["b", "b"])
    assert str(caught.value) == (
        "`step_separator` is empty; name the text that ends a step, such as a line break\n"
        "`label_names` names a class twice"
    )
