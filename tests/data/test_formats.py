"""Every format becomes the same conversation, and every bad row says what is wrong with it."""

import json

import pytest

from tunesmith.data.formats import FORMATS, BadRow, Reading, choose_format, read_row
from tunesmith.errors import UserError

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CONVERSATION = {"messages": [USER, ANSWER], "tools": None}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def read(row, reading=None, **options):
    reading = reading or Reading(**options)
    return read_row(row, reading, FORMATS[choose_format(row, reading, "data.jsonl:1", FORMATS)])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"messages": json.dumps([USER, ANSWER])},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, ANSWER], "id": 3},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"conversations": [USER, ANSWER]},
        {"instruction": "2+2?", "input": "", "output": "4", "text": "the whole of it"},
        {"instruction": "2+2?", "output": "4"},
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": [USER], "completion": [ANSWER]},
    ],
)
def test_formats_are_found_by_their_columns(row):
    assert read(row) == CONVERSATION


def test_alpaca_joins_instruction_and_input_and_keeps_system_and_history():
    row = {"instruction": "Add", "input": "2+2", "output": "4", "system": "Be short", "history": [["Hi", "Hello"]]}
    assert [(m["role"], m["content"]) for m in read(row)["messages"]] == [
        ("system", "Be short"),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add\n\n2+2"),
        ("assistant", "4"),
    ]


def test_tools_and_calls_come_in_one_form():
    openai = {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}],
            },
            {"role": "tool", "content": "4", "tool_call_id": "x"},
            ANSWER,
        ],
        "tools": json.dumps([TOOL]),
    }
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4"},
        ],
        "tools": json.dumps([TOOL["function"]]),
    }
    for row, identity in ((openai, {"id": "x"}), (sharegpt, {})):
        example = read(row)
        assert example["tools"] == [TOOL]
        assert example["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [identity | CALL]}
        assert [m["role"] for m in example["messages"]] == ["user", "assistant", "tool", "assistant"]


def test_weight_and_train_flags_stay():
    row = {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "train": False}, USER, ANSWER]}
    assert [{k: v for k, v in m.items() if k in ("weight", "train")} for m in read(row)["messages"]][1::2] == [
        {"weight": 0},
        {"train": False},
        {},
    ]
    prompt = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert [m.get("weight") for m in read(prompt)["messages"]] == [None, 0, None, None]


def test_options():
    assert read({"text": "abc"}) == {"text": "abc"}
    mapped = read({"question": "2+2?", "answer": "4"}, column_map={"prompt": "question", "completion": "answer"})
    assert mapped == CONVERSATION
    assert read({"prompt": "2+2?", "completion": "4"}, system_prompt="S")["messages"][0] == {
        "role": "system",
        "content": "S",
    }
    own = {"messages": [{"role": "system", "content": "own"}, USER, ANSWER]}
    assert read(own, system_prompt="S")["messages"][0]["content"] == "own"
    framed = read({"prompt": "{x}", "completion": "4"}, prompt_template="Say: {prompt}!")
    assert framed["messages"][0]["content"] == "Say: {x}!"


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": []}, "no assistant message"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "empty answer"),
        ({"messages": [USER, {"role": "assistant", "content": ""}, USER, ANSWER]}, "empty answer"),
        ({"messages": [{"role": "wizard", "content": "x"}, ANSWER]}, "a role that is not known"),
        ({"messages": [{"content": "x"}, ANSWER]}, "a message without `role`"),
        ({"messages": [{"role": "user", "content": 5}, ANSWER]}, "content that is not text"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "content that is not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "content that is not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, ANSWER]},
            "content that is not text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}, ANSWER]},
            "content that is not text",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "half \ud83d"}]}, "text that is not Unicode"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "\ud83d"}]}, "text that is not Unicode"),
        ({"messages": "not json"}, "column `messages` is not JSON"),
        ({"messages": {"role": "user"}}, "column `messages` is not a list of messages"),
        ({"messages": [USER, ANSWER], "tools": 5}, "column `tools` is not a list of tools"),
        ({"conversations": [{"from": "function_call", "value": "add(2)"}]}, "a function call that is not JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "a function call without a name"),
        ({"instruction": "", "output": "4"}, "empty prompt"),
        ({"instruction": "2+2?", "output": "4", "history": 5}, "column `history` is not a list of pairs"),
        ({"instruction": "2+2?", "output": "4", "history": [["Hi", None]]}, "column `history` is not text"),
        ({"instruction": "2+2?", "output": None}, "column `output` is not text"),
        ({"prompt": " ", "completion": "4"}, "empty prompt"),
        ({"prompt": "2+2?", "completion": ""}, "empty answer"),
        ({"text": "\n "}, "empty text"),
        ({"text": 3}, "column `text` is not text"),
        ({"text": "é \ud83d"}, "text that is not Unicode"),
    ],
)
def test_bad_rows_name_their_fault(row, reason):
    with pytest.raises(BadRow) as caught:
        read(row)
    assert caught.value.reason == reason


def test_an_empty_answer_that_is_not_trained_does_no_harm():
    row = {"messages": [USER, {"role": "assistant", "content": "", "weight": 0}, USER, ANSWER]}
    assert len(read(row)["messages"]) == 4


def test_unknown_columns_are_listed_with_a_way_out():
    with pytest.raises(UserError) as caught:
        read({"question": "2+2?", "answer": "4"})
    assert str(caught.value) == (
        "data.jsonl:1: no known format fits the columns `question`, `answer`; perhaps `column_map: {prompt: question, completion: answer}`; "
        "the formats and their columns: messages (messages [tools]), sharegpt (conversations [system] [tools]), "
        "alpaca (instruction output [input] [system] [history]), prompt_completion (prompt completion [system] [tools]), text (text)"
    )
    with pytest.raises(UserError) as caught:
        read({"instruction": "2+2?", "response": "4"}, format="alpaca")
    assert str(caught.value) == (
        "data.jsonl:1: no column `output`, which the format alpaca (instruction output [input] [system] [history]) needs; "
        "the columns are `instruction`, `response`: name yours with `column_map: {output: your column}`, or choose another `format`"
    )
    with pytest.raises(UserError) as caught:
        read({"question": "2+2?", "answer": "4"}, column_map={"prompt": "questoin"})
    assert "`questoin`, which is not there; the columns are `question`, `answer`; did you mean `question`?" in str(
        caught.value
    )


def test_real_files(assets):
    for name, format in (("glaive_toolcall_300.json", "sharegpt"), ("preference/kto_300.json", "messages")):
        rows = json.loads((assets / "data" / name).read_text())
        assert choose_format(rows[0], Reading(), name, FORMATS) == format
        examples = [read_row(row, Reading(), FORMATS[format]) for row in rows]
        assert all(example["messages"] for example in examples)
    assert set(FORMATS) == {"messages", "sharegpt", "alpaca", "prompt_completion", "text"}
