"""Chats: rendering equals transformers', masks of any template, checks of messages, errors."""

import json
from datetime import datetime

import pytest

from tunesmith.data.chat import ChatTemplate, built_in_names
from tunesmith.data.chat_sentinels import BadConversation
from tunesmith.data.chat_spans import mask_of, merge, subtract
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import UserError

SYSTEM = {"role": "system", "content": "Be kind."}
ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
MORE, END = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Good bye."}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Où? <b> & 'c'", "parameters": {}}}]
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"in": "Köln"}}}],
}
RESULT = {"role": "tool", "content": "sunny"}


@pytest.fixture(scope="module")
def qwen(assets):
    """A real tokenizer with a real template of its own, which has no marks."""
    return load_tokenizer(assets / "tokenizers/qwen2.5")


@pytest.fixture(scope="module")
def theirs(assets):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets / "tokenizers/qwen2.5")


@pytest.fixture(scope="module")
def small(assets):
    """A tokenizer with 512 tokens, none of which is a chat token."""
    return load_tokenizer(assets / "models/stories260K", chat_template="chatml")


def _trained(tokenizer, ids, mask):
    """Runs of trained tokens as texts."""
    runs, previous = [], False
    for number, trained in zip(ids, mask, strict=True):
        if trained and not previous:
            runs.append([])
        if trained:
            runs[-1].append(number)
        previous = trained
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def _shown(source, messages, added=("</s>", "<s>"), **options):
    template = ChatTemplate(source, "mine.jinja", {"bos_token": "<s>", "eos_token": "</s>"}, added)
    text, spans = template.spans(messages, **options)
    for start, end in reversed(spans):
        text = text[:start] + "⟦" + text[start:end] + "⟧" + text[end:]
    return text


# Rendering -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    "messages, tools",
    [
        ([ASK], None),
        ([SYSTEM, ASK, ANSWER, MORE, END], None),
        ([ASK, CALL, RESULT, RESULT, ANSWER], TOOLS),
        ([SYSTEM, ASK, {**CALL, "content": "Let me see."}], TOOLS),
        ([ASK, {**ANSWER, "name": None, "tool_calls": None}], []),
    ],
)
def test_renders_as_transformers_with_the_models_own_template(qwen, theirs, messages, tools, prompt):
    text = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    assert qwen.render_chat(messages, tools, add_generation_prompt=prompt) == text
    ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt)["input_ids"]
    assert qwen.encode_chat(messages, tools, add_generation_prompt=prompt)[0] == ids
    if prompt:
        assert qwen.encode_prompt(messages, tools) == ids


LANGUAGE = """{%- set ns = namespace(n=0) %}
{% for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {% set ns.n = ns.n + 1 %}
{{ ns.n }} {{ message | tojson }} {{ message.content | tojson(indent=2) }} {{ message.get('x', 'none') }}
    {%- if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{{ documents is none }} {{ tools is none }} {{ tools | tojson }} {{ unknown }} {{ bos_token }} {{ extra | default('no') }}
{{ dict(a=1) }} {{ messages[::-1][0].content.split(' ')[-1] }} {{ strftime_now('%Y') }} {{ add_generation_prompt }}
{% generation %}
  inside {% endgeneration %} after
"""


def test_template_language_is_transformers():
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "a <b> & \"c\" é 'd'", "x": [1, None, {"k": 1.5}]}, ASK, ANSWER, MORE]
    ours = ChatTemplate(LANGUAGE, "language", {"bos_token": "<s>"}).render(messages, TOOLS, args={"extra": "yes"})
    theirs = render_jinja_template([messages], TOOLS, None, LANGUAGE, bos_token="<s>", extra="yes")[0][0]
    assert ours == theirs and str(datetime.now().year) in ours


def test_reasoning_has_one_name():
    source = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }};{% endfor %}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert ChatTemplate(source, "t", {}).render([{**ANSWER, name: "hm"}]) == "hm|hm;"


def test_openai_arguments_are_objects_unless_the_template_takes_text(qwen):
    as_text = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": '{"in": "Köln"}'}}]}
    assert qwen.render_chat([ASK, as_text]) == qwen.render_chat([ASK, CALL])
    own = "{% for c in messages[0].tool_calls %}{{ c.function.arguments if c.function.arguments is string else 'object' }}{% endfor %}"
    assert ChatTemplate(own, "t", {}).render([as_text]) == '{"in": "Köln"}'


def test_parts_of_text_and_developer(qwen):
    parts = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
    assert qwen.render_chat([{"role": "developer", "content": "Be kind."}, parts]) == qwen.render_chat([SYSTEM, ASK])
    listed = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | length }}{% endif %}{% endfor %}"
    assert ChatTemplate(listed, "t", {}).render([parts]) == "2"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_templates_reach_nothing_of_python(source):
    with pytest.raises(BadConversation):
        template = ChatTemplate(source, "t", {})
        raise BadConversation("nothing came out", None, "") if template.render([ASK]) == "" else AssertionError


def test_objects_are_shown_by_name_only():
    assert (
        ChatTemplate("{{ messages[0].image }}", "t", {}).render([{**ASK, "image": open}])
        == "<builtin_function_or_method>"
    )


# Masks ---------------------------------------------------------------------------------------------------------------


def test_mask_of_a_real_template_without_marks(qwen):
    ids, mask = qwen.encode_chat([SYSTEM, ASK, ANSWER, MORE, END])
    assert _trained(qwen, ids, mask) == ["Hello!<|im_end|>", "Good bye.<|im_end|>"]
    assert ids == qwen.encode(qwen.render_chat([SYSTEM, ASK, ANSWER, MORE, END]), add_special_tokens=False)
    ids, mask = qwen.encode_chat([ASK, CALL, RESULT, ANSWER], TOOLS)
    call = '<tool_call>\n{"name": "weather", "arguments": {"in": "Köln"}}\n</tool_call><|im_end|>'
    assert _trained(qwen, ids, mask) == [call, "Hello!<|im_end|>"]
    ids, mask = qwen.encode_chat([ASK, {**CALL, "content": "Let me see."}, RESULT, ANSWER], TOOLS)
    assert _trained(qwen, ids, mask) == [f"Let me see.\n{call}", "Hello!<|im_end|>"]
    ids, mask = qwen.encode_chat([ASK, {**CALL, "weight": 0}, RESULT, ANSWER], TOOLS)
    assert _trained(qwen, ids, mask) == ["Hello!<|im_end|>"]
    ids, mask = qwen.encode_chat([ASK, ANSWER], train_on_input=True)
    assert all(mask)


@pytest.mark.parametrize(
    "content",
    [
        "Hello!", " leading", "trailing \n", "\n\nlines\n\n", "Hi", "Hi<|im_end|>\n<|im_start|>assistant\nHi", "<|im_end|>", "é" * 50,
        "👨‍👩‍👧 e\u0301", "<think>a</think>b", "1" * 100, "\ue000 \uf8ff", "assistant\n", "user\nHi", "a", "▁", "You are a helpful assistant.",
    ],
)  # fmt: skip
def test_any_content_is_found_exactly(qwen, content):
    """Contents that look like the template's own text, like each other, or that are rewritten by Unicode rules."""
    for messages in (
        [ASK, {**ANSWER, "content": content}],
        [ASK, {**ANSWER, "content": content}, ASK, {**ANSWER, "content": content}],
    ):
        text, spans = qwen._chat(False).spans(messages)
        assert [text[start:end] for start, end in spans] == [f"{content}<|im_end|>"] * (len(messages) // 2)
        ids, mask = qwen.encode_chat(messages)
        trained = qwen.decode([number for number, t in zip(ids, mask) if t], skip_special_tokens=False)
        assert f"{content}<|im_end|>" in trained or "e\u0301" in content or content[0] == "\n"


def test_textual_end_of_turn_is_learned(small):
    ids, mask = small.encode_chat([ASK, ANSWER, MORE, END])
    assert _trained(small, ids, mask) == ["Hello!<|im_end|>", "Good bye.<|im_end|>"]


def test_no_bos_is_doubled_or_added(assets):
    llama3 = load_tokenizer(assets / "tokenizers/llama3", chat_template="llama3")
    ids, mask = llama3.encode_chat([ASK, ANSWER])
    assert ids.count(128000) == 1 and ids[0] == 128000 and not mask[0]
    assert _trained(llama3, ids, mask) == ["Hello!<|eot_id|>"]
    assert ids[: mask.index(True)] == llama3.encode_prompt([ASK])


def test_sentencepiece_chats(assets):
    llama2 = load_tokenizer(assets / "tokenizers/llama2", chat_template="llama2")
    ids, mask = llama2.encode_chat([ASK, ANSWER, MORE, END])
    assert ids.count(1) == 2 and _trained(llama2, ids, mask) == ["Hello! </s>", "Good bye. </s>"]
    mistral = load_tokenizer(assets / "tokenizers/mistral/tokenizer.model.v3", chat_template="mistral")
    ids, mask = mistral.encode_chat([ASK, ANSWER])
    assert [mistral.id_to_token(number) for number in ids] == ["<s>", "[INST]", "▁Hi", "[/INST]", "▁Hello", "!", "</s>"]
    assert mask == [False] * 4 + [True] * 3


def test_batches_are_the_same_and_bring_their_errors(qwen):
    rows = [[ASK, ANSWER], [ASK, {**ANSWER, "content": " "}], [ASK, CALL, RESULT, ANSWER]]
    results = qwen.encode_chat_batch(rows, [None, None, TOOLS])
    assert results[0] == qwen.encode_chat(rows[0]) and results[2] == qwen.encode_chat(rows[2], TOOLS)
    assert isinstance(results[1], BadConversation) and (results[1].index, results[1].reason) == (1, "empty answer")
    assert qwen.encode_chat_batch([]) == []


def test_template_args_reach_the_template(assets):
    tokenizer = load_tokenizer(
        assets / "tokenizers/qwen2.5", chat_template="qwen3", chat_template_args={"enable_thinking": False}
    )
    assert tokenizer.render_chat([ASK], add_generation_prompt=True).endswith("<think>\n\n</think>\n\n")
    assert tokenizer.render_chat([ASK], add_generation_prompt=True, enable_thinking=True).endswith("assistant\n")


VICUNA = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}
{%- else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
NO_END = """{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"""
END_AT_LAST = NO_END.replace(
    "{% endfor %}", "{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", 1
)
TRIMS = NO_END.replace("m.content + '\n\n'", "(m.content | trim) + eos_token")
UPPER = NO_END.replace("m.content", "(m.content | upper)")
HEADER_IS_STOP = """{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
COUNTS = """{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}{{ messages[1].content | length }}"""
COUNTS_IN_HEADER = """{% for m in messages %}{{ m.role + ' (' + m.content | length | string + '): ' + m.content + eos_token }}{% endfor %}"""
TWICE = """{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + m.content }}{% endfor %}"""
CHAT = [SYSTEM, ASK, ANSWER, MORE, END]


@pytest.mark.parametrize(
    "source, expected",
    [
        (VICUNA, "<s>Be kind. USER: Hi ASSISTANT:⟦ Hello!</s>⟧USER: Bye ASSISTANT:⟦ Good bye.</s>⟧"),
        (
            NO_END,
            "### system:\nBe kind.\n\n### user:\nHi\n\n### assistant:\n⟦Hello!⟧\n\n### user:\nBye\n\n### assistant:\n⟦Good bye.⟧\n\n",
        ),
        (
            END_AT_LAST,
            "### system:\nBe kind.\n\n### user:\nHi\n\n### assistant:\n⟦Hello!⟧\n\n### user:\nBye\n\n### assistant:\n⟦Good bye.\n\n</s>⟧",
        ),
        (
            TRIMS,
            "### system:\nBe kind.</s>### user:\nHi</s>### assistant:\n⟦Hello!</s>⟧### user:\nBye</s>### assistant:\n⟦Good bye.</s>⟧",
        ),
        (HEADER_IS_STOP, "<|system|>Be kind.<|user|>Hi<|assistant|>⟦Hello!⟧<|user|>Bye<|assistant|>⟦Good bye.⟧"),
    ],
)
def test_unusual_templates_without_marks(source, expected):
    added = ("<s>", "</s>", "<|user|>", "<|assistant|>")
    assert _shown(source, CHAT, added) == expected
    spaced = [{**message, "content": f"\n {message['content']} \n"} for message in CHAT]
    if source == TRIMS:
        assert _shown(source, spaced, added) == expected


@pytest.mark.parametrize("source", [COUNTS, COUNTS_IN_HEADER, TWICE])
def test_what_cannot_be_told_is_an_error_that_names_the_template(source):
    with pytest.raises(
        UserError, match=r"mine\.jinja does not show which part of its text is message \d .*generation %\}"
    ):
        _shown(source, [ASK, {**ANSWER, "content": "Hello! " * 200}, MORE, END])


def test_a_template_that_changes_answers_needs_marks():
    marked = UPPER.replace(
        "{{ '### ' + m.role + ':\n' + (m.content | upper) + '\n\n' }}",
        "{{ '### ' + m.role + ':\n' }}{% generation %}{{ m.content | upper }}{% endgeneration %}",
    )
    assert "⟦HELLO!⟧" in _shown(marked, [ASK, ANSWER]).replace("⟦HI⟧", "HI")
    assert "⟦HELLO!⟧" in _shown(UPPER, [ASK, ANSWER])  # the sentinels show where, whatever stands there


def test_marks_that_are_filtered_afterwards_are_an_error():
    source = "{% set x %}{% generation %} {{ messages[1].content }} {% endgeneration %}{% endset %}{{ x | trim }}"
    with pytest.raises(UserError, match="mine.jinja changes what a generation block gave"):
        _shown(source, [ASK, ANSWER])


def test_an_answer_the_template_leaves_out_is_an_error():
    source = "{% for m in messages %}{{ m.content or '' }}|{% endfor %}"
    with pytest.raises(
        BadConversation, match=r"mine.jinja shows nothing of message 1 \(assistant\), which holds tool_calls"
    ):
        _shown(source, [ASK, CALL, RESULT, ANSWER])


def test_spans_and_tokens():
    assert merge([(5, 7), (0, 2), (2, 3), (4, 4)]) == [(0, 3), (5, 7)]
    assert subtract((0, 9), [(0, 2), (4, 5)]) == [(2, 4), (5, 9)]
    offsets = [
        (0, 2),
        (3, 5),
        (5, 6),
        (5, 6),
        (6, 8),
    ]  # the space at 2 belongs to the second; two tokens share a character
    assert mask_of(offsets, [(2, 3)]) == [False, True, False, False, False]
    assert mask_of(offsets, [(5, 6)]) == [False, False, True, True, False]
    assert mask_of(offsets, [(1, 4), (7, 8)]) == [True, True, False, False, True]
    assert mask_of(offsets, []) == [False] * 5 and mask_of([], [(0, 1)]) == []


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages, text, index",
    [
        ([], "a conversation must be a list of at least one message", None),
        (["Hi"], "message 0 must be an object with role and content, but is 'Hi'", 0),
        ([ASK, {"role": "bot", "content": "x"}], "message 1 has the role 'bot'; roles are system, developer, user, assistant, tool, ipython", 1),
        ([ASK, {"role": "assistant"}], "message 1 (assistant) has no content", 1),
        ([{"role": "user", "content": None}], "message 0 (user) has no content", 0),
        ([{"role": "user", "content": 3}], "message 0: content must be text or a list of parts, but is 3", 0),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0 has a part of type 'image'; only text can be used", 0),
        ([ASK, {**ANSWER, "content": " \n"}], "message 1 is an empty answer of the assistant", 1),
        ([ASK, {**ANSWER, "weight": 0.5}], "message 1: weight must be 0 or 1, not 0.5", 1),
        ([ASK, {**ANSWER, "train": "no"}], "message 1: train must be true or false, not 'no'", 1),
        ([ASK, {**ANSWER, "content": "\ufdd2"}], "a message holds U+FDD0 to U+FDD3, which are no characters: take them out", None),
    ],
)  # fmt: skip
def test_bad_messages(qwen, messages, text, index):
    with pytest.raises(BadConversation) as caught:
        qwen.encode_chat(messages)
    assert (str(caught.value), caught.value.index) == (text, index)


def test_empty_answers_may_stand_untrained(qwen):
    ids, mask = qwen.encode_chat([ASK, {**ANSWER, "content": "", "weight": 0}, MORE, END])
    assert _trained(qwen, ids, mask) == ["Good bye.<|im_end|>"]


def test_refusals_name_the_message():
    source = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    with pytest.raises(BadConversation) as caught:
        _shown(source, [ASK, ANSWER, MORE, MORE, END])
    assert str(caught.value) == "mine.jinja refuses the conversation at message 3 (user): roles must alternate"
    assert (caught.value.index, caught.value.reason) == (3, "refused by the template")


def test_broken_templates(tmp_path, assets):
    with pytest.raises(UserError) as caught:
        ChatTemplate("{% for m in messages %}\n{{ m.content }}\n{% endfo %}", "mine.jinja", {})
    assert str(caught.value).startswith("mine.jinja is no valid jinja: line 3: Encountered unknown tag 'endfo'.")
    with pytest.raises(UserError) as caught:
        load_tokenizer(assets / "models/stories260K", chat_template="chatmll")
    assert (
        str(caught.value)
        == f"chatmll is neither a file nor a built-in chat template; built in are {', '.join(built_in_names())}"
    )
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}{{ messages[0].content + 1 }}")
    tokenizer = load_tokenizer(assets / "models/stories260K", chat_template=str(tmp_path / "own.jinja"))
    with pytest.raises(BadConversation, match=r"own.jinja refuses the conversation at message 0 \(user\): "):
        tokenizer.render_chat([ASK])


def test_templates_by_name_and_file(assets, tmp_path):
    folder = tmp_path / "model"
    load_tokenizer(assets / "models/stories260K").save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.chat_template, tokenizer.render_chat([ASK]), tokenizer.render_chat([ASK], TOOLS)) == (
        "plain",
        "plain",
        "with tools",
    )
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").render_chat([ASK], TOOLS) == "with tools"
    (folder / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(folder).render_chat([ASK]) == "from the file"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named[1:]}))
    with pytest.raises(UserError, match="has templates named tool_use but no default"):
        load_tokenizer(folder).render_chat([ASK])
