"""The built-in chat templates: text and mask span by span as each family documents them, with marks and without."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tunesmith.data.chat import ChatTemplate, built_in_names, built_in_template
from tunesmith.data.chat_sentinels import BadConversation

SYSTEM = {"role": "system", "content": "Be kind."}
ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
MORE, END = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Good\n\nbye."}
WEATHER = {"name": "weather", "description": "Tells the weather.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {
    "role": "assistant",
    "tool_calls": [
        {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"in": "Köln"}}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call12345", "content": '{"sun": true}'}
SINGLE, MULTI = [ASK, ANSWER], [SYSTEM, ASK, ANSWER, MORE, END]
WITH_TOOLS = [ASK, CALL, RESULT, ANSWER]
THOUGHT = {**ANSWER, "reasoning_content": "They greet."}

HERMES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures "
    'within <tools></tools> XML tags:\n<tools>\n{"type": "function", "function": {"name": "weather", "description": "Tells the '
    'weather.", "parameters": {"type": "object", "properties": {}}}}\n</tools>\n\nFor each function call, return a json object '
    "with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"in": "Köln"}}\n</tool_call>'
HERMES_RESULT = '<tool_response>\n{"sun": true}\n</tool_response>'

TOKENS = {
    "llama": ("<s>", "</s>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<eos>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "olmo2": ("<|endoftext|>", "<|endoftext|>"),
    "chatml": (None, "<|im_end|>"),
}
TOKENS |= {name: TOKENS["llama"] for name in ("llama2", "mistral", "mistral_v1")} | {"llama3_1": TOKENS["llama3"]}
TOKENS |= {name: TOKENS["chatml"] for name in ("qwen2", "qwen2_5", "qwen3", "smollm2", "phi4")}
ADDED = {
    "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "<think>",
}  # fmt: skip


def _chatml(default=None):
    head = "" if default is None else f"<|im_start|>system\n{default}<|im_end|>\n"
    first = "" if default is None else f"{default}\n\n"
    ask = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    return {
        "single": head + ask + "⟦Hello!<|im_end|>⟧\n",
        "multi": "<|im_start|>system\nBe kind.<|im_end|>\n" + ask + "⟦Hello!<|im_end|>⟧\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦Good\n\nbye.<|im_end|>⟧\n",
        "tools": f"<|im_start|>system\n{first}{HERMES}<|im_end|>\n{ask}⟦{HERMES_CALL}<|im_end|>⟧\n"
        f"<|im_start|>user\n{HERMES_RESULT}<|im_end|>\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n",
    }


def _llama3(dates):
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}".format
    day = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    asked = turn("user", "Hi<|eot_id|>") + turn("assistant", "⟦Hello!<|eot_id|>⟧")
    listed = json.dumps(TOOLS[0], indent=4)
    return {
        "single": "<|begin_of_text|>" + (turn("system", day + "<|eot_id|>") if dates else "") + asked,
        "multi": "<|begin_of_text|>" + turn("system", (day if dates else "") + "Be kind.<|eot_id|>") + asked
        + turn("user", "Bye<|eot_id|>") + turn("assistant", "⟦Good\n\nbye.<|eot_id|>⟧"),
        "tools": "<|begin_of_text|>" + turn("system", f"Environment: ipython\n{day}<|eot_id|>")
        + turn("user", "Given the following functions, please respond with a JSON for a function call with its proper arguments "
        "that best answers the given prompt.\n\nRespond in the format {\"name\": function name, \"parameters\": dictionary of "
        f"argument name and its value}}.Do not use variables.\n\n{listed}\n\nHi<|eot_id|>")
        + turn("assistant", '⟦{"name": "weather", "parameters": {"in": "Köln"}}<|eot_id|>⟧')
        + turn("ipython", '"{\\"sun\\": true}"<|eot_id|>') + turn("assistant", "⟦Hello!<|eot_id|>⟧"),
    }  # fmt: skip


EXPECTED = {
    "chatml": _chatml(),
    "qwen2": _chatml("You are a helpful assistant."),
    "qwen2_5": _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "smollm2": _chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "qwen3": {
        kind: re.sub(r"⟦(Hello!|Good\n\nbye.)(<\|im_end\|>⟧\n)$", r"⟦<think>\n\n</think>\n\n\1\2", text)
        for kind, text in _chatml().items()
    },
    "llama3": _llama3(dates=False),
    "llama3_1": _llama3(dates=True),
    "llama2": {
        "single": "<s>[INST] Hi [/INST] ⟦Hello! </s>⟧",
        "multi": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] ⟦Hello! </s>⟧<s>[INST] Bye [/INST] ⟦Good\n\nbye. </s>⟧",
        "tools": f"<s>[INST] <<SYS>>\n{HERMES}\n<</SYS>>\n\nHi [/INST] ⟦{HERMES_CALL} </s>⟧"
        f"<s>[INST] {HERMES_RESULT} [/INST] ⟦Hello! </s>⟧",
    },
    "mistral": {
        "single": "<s>[INST] Hi[/INST] ⟦Hello!</s>⟧",
        "multi": "<s>[INST] Hi[/INST] ⟦Hello!</s>⟧[INST] Be kind.\n\nBye[/INST] ⟦Good\n\nbye.</s>⟧",
        "tools": f"<s>[AVAILABLE_TOOLS] {json.dumps(TOOLS)}[/AVAILABLE_TOOLS][INST] Hi[/INST]"
        '⟦[TOOL_CALLS] [{"name": "weather", "arguments": {"in": "Köln"}, "id": "call12345"}]</s>⟧'
        '[TOOL_RESULTS] {"content": {"sun": true}, "call_id": "call12345"}[/TOOL_RESULTS] ⟦Hello!</s>⟧',
    },
    "mistral_v1": {
        "single": "<s>[INST] Hi [/INST] ⟦Hello!</s>⟧",
        "multi": "<s>[INST] Be kind.\n\nHi [/INST] ⟦Hello!</s>⟧[INST] Bye [/INST] ⟦Good\n\nbye.</s>⟧",
        "tools": f"<s>[INST] {HERMES}\n\nHi [/INST] ⟦{HERMES_CALL}</s>⟧[INST] {HERMES_RESULT} [/INST] ⟦Hello!</s>⟧",
    },
    "gemma": {
        "single": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello!<end_of_turn>⟧\n",
        "multi": "<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello!<end_of_turn>⟧\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦Good\n\nbye.<end_of_turn>⟧\n",
        "tools": f"<bos><start_of_turn>user\n{HERMES}\n\nHi<end_of_turn>\n<start_of_turn>model\n⟦{HERMES_CALL}<end_of_turn>⟧\n"
        f"<start_of_turn>user\n{HERMES_RESULT}<end_of_turn>\n<start_of_turn>model\n⟦Hello!<end_of_turn>⟧\n",
    },
    "phi3": {
        "single": "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello!<|end|>⟧\n<|endoftext|>",
        "multi": "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello!<|end|>⟧\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n⟦Good\n\nbye.<|end|>⟧\n<|endoftext|>",
        "tools": f"<|system|>\n{HERMES}<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n⟦{HERMES_CALL}<|end|>⟧\n"
        f"<|user|>\n{HERMES_RESULT}<|end|>\n<|assistant|>\n⟦Hello!<|end|>⟧\n<|endoftext|>",
    },
    "phi4": {
        "single": "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>⟦Hello!<|im_end|>⟧",
        "multi": "<|im_start|>system<|im_sep|>Be kind.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦Hello!<|im_end|>⟧<|im_start|>user<|im_sep|>Bye<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦Good\n\nbye.<|im_end|>⟧",
        "tools": f"<|im_start|>system<|im_sep|>{HERMES}<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        f"<|im_start|>assistant<|im_sep|>⟦{HERMES_CALL}<|im_end|>⟧<|im_start|>user<|im_sep|>{HERMES_RESULT}<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦Hello!<|im_end|>⟧",
    },
    "olmo2": {
        "single": "<|endoftext|><|user|>\nHi\n<|assistant|>\n⟦Hello!<|endoftext|>⟧",
        "multi": "<|endoftext|><|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\n⟦Hello!<|endoftext|>⟧\n"
        "<|user|>\nBye\n<|assistant|>\n⟦Good\n\nbye.<|endoftext|>⟧",
        "tools": f"<|endoftext|><|system|>\n{HERMES}\n<|user|>\nHi\n<|assistant|>\n⟦{HERMES_CALL}<|endoftext|>⟧\n"
        f"<|user|>\n{HERMES_RESULT}\n<|assistant|>\n⟦Hello!<|endoftext|>⟧",
    },
}
CONVERSATIONS = {"single": (SINGLE, None), "multi": (MULTI, None), "tools": (WITH_TOOLS, TOOLS)}


def _template(name, marks=True, added=ADDED):
    source = built_in_template(name)
    if not marks:
        source = re.sub(r"\{%-? *(end)?generation *-?%\}", "{{- '' -}}", source)
    bos, eos = TOKENS[name]
    tokens = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    template = ChatTemplate(source, name, tokens, {*added, *tokens.values()} if added else ())
    assert template.has_marks == marks
    return template


def _shown(template, messages, tools=None, **options):
    text, spans = template.spans(messages, tools, **options)
    shown, at = "", 0
    for start, end in spans:
        shown, at = shown + text[at:start] + "⟦" + text[start:end] + "⟧", end
    return shown + text[at:]


def test_every_template_has_its_expectation():
    assert set(EXPECTED) == set(built_in_names()) and len(EXPECTED) >= 10


@pytest.mark.parametrize("marks", ["marks", "no marks", "no marks, no tokens"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", EXPECTED)
def test_text_and_mask(name, kind, marks):
    """Without marks, and even where the vocabulary has none of the template's tokens, the same spans are found."""
    template = _template(name, marks == "marks", () if marks.endswith("tokens") else ADDED)
    messages, tools = CONVERSATIONS[kind]
    assert _shown(template, messages, tools) == EXPECTED[name][kind]


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("name", EXPECTED)
def test_train_on_input_and_flags(name, marks):
    template = _template(name, marks)
    text = template.render(MULTI)
    assert template.spans(MULTI, train_on_input=True) == (text, [(0, len(text))])
    plain = EXPECTED[name]["multi"]
    both, last = re.findall("⟦.*?⟧", plain, re.DOTALL), plain.rindex("⟦")
    only_last = plain[:last].replace("⟦", "").replace("⟧", "") + plain[last:]
    for flag in ({"weight": 0}, {"train": False}, {"weight": 0.0}):
        assert _shown(template, [SYSTEM, ASK, {**ANSWER, **flag}, MORE, END]) == only_last
    assert _shown(template, [SYSTEM, {**ASK, "weight": 0}, {**ANSWER, "weight": 1}, MORE, END]) == plain
    # the rest is trained but for an answer taken out; or a question is trained, too
    without = _shown(template, [SYSTEM, ASK, {**ANSWER, "train": False}, MORE, END], train_on_input=True)
    assert without.replace("⟦", "").replace("⟧", "") == text and re.findall("⟧(.*?)⟦", without, re.DOTALL) == [
        both[0][1:-1]
    ]
    asked = _shown(template, [SYSTEM, ASK, ANSWER, {**MORE, "train": True}, {**END, "train": False}])
    assert len(re.findall("⟦", asked)) == 2 and re.findall("⟦(Bye)", asked)


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("name", EXPECTED)
def test_generation_prompt_is_where_the_answer_begins(name, marks):
    template = _template(name, marks)
    for messages, tools in CONVERSATIONS.values():
        text, spans = template.spans(messages, tools)
        prompt = template.render(messages[:-1], tools, add_generation_prompt=True)
        assert text.startswith(prompt) and text[len(prompt) : spans[-1][0]].strip(" ") == ""
        with_prompt, same = template.spans(messages, tools, add_generation_prompt=True)
        assert [with_prompt[start:end] for start, end in same] == [text[start:end] for start, end in spans]


@pytest.mark.parametrize("marks", [True, False])
def test_qwen3_thinking(marks):
    template = _template("qwen3", marks)
    ask = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    thoughts = "<think>\nThey greet.\n</think>\n\n"
    assert _shown(template, [ASK, THOUGHT]) == ask + f"⟦{thoughts}Hello!<|im_end|>⟧\n"
    assert (
        _shown(template, [ASK, {**ANSWER, "content": f"{thoughts}Hello!"}]) == ask + f"⟦{thoughts}Hello!<|im_end|>⟧\n"
    )
    # thoughts of earlier turns go; those between a call and its result stay
    later = "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nGood\n\nbye.<|im_end|>⟧\n"
    assert _shown(template, [ASK, THOUGHT, MORE, END]) == ask + "⟦Hello!<|im_end|>⟧\n" + later
    result = f"<|im_start|>user\n{HERMES_RESULT}<|im_end|>\n<|im_start|>assistant\n"
    shown = _shown(template, [ASK, {**CALL, "reasoning_content": "They greet."}, RESULT, ANSWER])
    assert shown == f"{ask}⟦{thoughts}{HERMES_CALL}<|im_end|>⟧\n{result}⟦<think>\n\n</think>\n\nHello!<|im_end|>⟧\n"
    # without thinking the empty thoughts are the prompt's
    off = {"enable_thinking": False}
    assert _shown(template, [ASK, ANSWER], args=off) == ask + "<think>\n\n</think>\n\n⟦Hello!<|im_end|>⟧\n"
    assert _shown(template, [ASK, THOUGHT, MORE, END], args=off).startswith(ask + "⟦Hello!<|im_end|>⟧\n")
    assert template.render([ASK], None, True, off) == ask + "<think>\n\n</think>\n\n"


def test_parallel_calls_and_results():
    calls = {"role": "assistant", "content": "Let me see.", "tool_calls": CALL["tool_calls"] * 2}
    for name in built_in_names():
        if name in ("llama3", "llama3_1"):
            with pytest.raises(
                BadConversation, match=r"at message 1 \(assistant\): Llama 3 makes only one tool call at once"
            ):
                _template(name).render([ASK, calls, RESULT, RESULT, ANSWER], TOOLS)
            continue
        marked, plain = (
            _shown(_template(name, marks), [ASK, calls, RESULT, RESULT, ANSWER], TOOLS) for marks in (True, False)
        )
        assert marked == plain
        if name != "mistral":
            assert (
                f"⟦Let me see.\n{HERMES_CALL}\n{HERMES_CALL}" in marked
                and f"{HERMES_RESULT}\n{HERMES_RESULT}" in marked
            )


def test_llama3_1_options():
    template = _template("llama3_1")
    text = template.render([SYSTEM, ASK], TOOLS, args={"tools_in_user_message": False, "date_string": "1 May 2025"})
    assert "Today Date: 1 May 2025\n\nYou have access to the following functions." in text
    assert text.endswith("Be kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>")


# The families' own templates, where another package brings them ------------------------------------------------------

OFFICIAL = {
    "gemma": "gemma3",
    "llama3": "llama3",
    "llama3_1": "llama3_1",
    "phi3": "phi3",
    "qwen2_5": "qwen2_5",
    "qwen3": "qwen3",
}


def _trl_templates():
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("trl, which brings the families' templates, is not installed")
    return Path(found.submodule_search_locations[0]) / "chat_templates"


@pytest.mark.parametrize("name, official", OFFICIAL.items())
def test_built_in_text_is_the_familys_own(name, official):
    source = (_trl_templates() / f"{official}.jinja").read_text()
    bos, eos = TOKENS[name]
    own = ChatTemplate(source, official, {"bos_token": bos or "", "eos_token": eos}, ADDED)
    ours = _template(name)
    takes_tools = name in ("llama3_1", "qwen2_5", "qwen3")
    cases = [(SINGLE, None), (MULTI, None), ([ASK], None), ([SYSTEM, ASK], None), ([ASK, THOUGHT, MORE, END], None)]
    cases += [(WITH_TOOLS, TOOLS), ([SYSTEM, *WITH_TOOLS, MORE], TOOLS), (WITH_TOOLS, None)] if takes_tools else []
    for messages, tools in cases:
        for prompt in (False, True):
            assert ours.render(messages, tools, prompt) == own.render(messages, tools, prompt)
        assert _shown(ours, messages, tools) == _shown(own, messages, tools)


def test_masks_of_templates_without_marks_are_those_of_their_marked_variants():
    """Dozens of templates that were marked by others: what they mark is found without marks, up to where they also mark a
    header or the line end after the end-of-turn token."""
    folder, compared = _trl_templates(), 0
    for path in sorted(folder.glob("*_training.jinja")):
        original = path.with_name(path.name.replace("_training", ""))
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        added = {
            *re.findall(r"<[|｜][^<>\s]{1,40}[|｜]>|<end_of_turn>|<start_of_turn>", original.read_text()),
            *tokens.values(),
        }
        with_marks = ChatTemplate(path.read_text(), path.stem, tokens, added)
        without = ChatTemplate(original.read_text(), original.stem, tokens, added, {"</s>"})
        for messages in (SINGLE, [ASK, ANSWER, MORE, END], [ASK, THOUGHT, MORE, END]):
            try:
                marked, plain = with_marks.spans(messages), without.spans(messages)
            except BadConversation:
                continue  # templates for images want other contents
            if marked[0] != plain[0] or "Hello!" not in marked[0] or "deepseek" in path.name:
                continue  # some variants write other text than the original
            assert len(marked[1]) == len(plain[1])
            for (start, end), (first, last) in zip(marked[1], plain[1]):
                assert start <= first and last <= end and plain[0][last:end].strip() in ("", "</s>"), original.stem
                header = plain[0][start:first].strip()
                is_header = re.fullmatch(r"(<\S*(start|turn)\S*>)?(assistant|model)?(<[^>]*>)?", header)
                assert is_header or "think" in header, original.stem
            compared += 1
    assert compared > 20


# Real conversations with tools ---------------------------------------------------------------------------------------


def _glaive(assets):
    roles = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
    for row in json.loads((assets / "data/glaive_toolcall_300.json").read_text()):
        messages = []
        for turn in row["conversations"]:
            content = turn["value"]
            if turn["from"] == "function_call":
                messages.append(
                    {"role": "assistant", "tool_calls": [{"type": "function", "function": json.loads(content)}]}
                )
            else:
                messages.append({"role": roles[turn["from"]], "content": content})
        yield messages, json.loads(row["tools"]) or None


@pytest.mark.parametrize("name", built_in_names())
def test_glaive_masks_are_the_assistants_contents(assets, name):
    marked, plain = _template(name), _template(name, marks=False)
    end = plain.end_of_turn
    for number, (messages, tools) in enumerate(_glaive(assets)):
        text, spans = marked.spans(messages, tools)
        if number % 5 == 0:
            assert plain.spans(messages, tools) == (text, spans)
        answers = [message for message in messages if message["role"] == "assistant"]
        assert len(spans) == len(answers)
        for (start, stop), message in zip(spans, answers):
            assert text[start:stop].endswith(end)
            said = text[start : stop - len(end)].removeprefix("<think>\n\n</think>\n\n")
            if "tool_calls" in message:
                function = message["tool_calls"][0]["function"]
                assert function["name"] in said and json.dumps(function["arguments"], ensure_ascii=False) in said
            else:
                assert said.strip() == message["content"].strip()
