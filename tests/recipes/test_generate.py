"""tune run generate: prompts in, texts out."""

import io
import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

import tunesmith
from tunesmith.configs.generate import Generate, Prompt, Speculative
from tunesmith.configs.shared import TokenizerConfig
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.recipes.generate import main
from tunesmith.training.preflight import check


def config_of(folder, **options):
    return Generate(
        **{"model": str(folder), "device": "cpu", "dtype": "fp32", "max_new_tokens": 8, "temperature": 0.0, **options}
    )


def run(capsys, folder, **options) -> str:
    main(config_of(folder, **options))
    captured = capsys.readouterr()
    assert " tokens/s)" in captured.err
    return captured.out


def test_one_prompt_gives_its_text_alone(capsys, assets):
    folder = assets / "models" / "stories260K"
    assert (
        run(capsys, folder, prompt="Once upon a time, there was", max_new_tokens=5, stream=False).strip()
        == "a little girl"
    )


def test_several_prompts_are_told_apart_and_written(capsys, tiny_model, tmp_path):
    file = tmp_path / "texts.jsonl"
    out = run(
        capsys,
        tiny_model,
        prompt=["the quick", "brown " * 30],
        num_samples=2,
        temperature=1.0,
        chat=False,
        output_file=str(file),
    )
    headings = [line for line in out.splitlines() if line.startswith("── ")]
    assert headings[0] == "── 1 of 2, sample 1 of 2: the quick"
    assert headings[3].startswith("── 2 of 2, sample 2 of 2: brown brown") and headings[3].endswith("…")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the quick"] * 2 + ["brown " * 30] * 2
    assert all(row["text"] in out for row in rows)
    again = run(
        capsys,
        tiny_model,
        prompt=["the quick", "brown " * 30],
        num_samples=2,
        temperature=1.0,
        chat=False,
        batch_size=1,
        stream=True,
    )
    assert again == out


def test_chat_prompts_bring_their_system_message(capsys, tiny_model, tmp_path):
    file = tmp_path / "texts.jsonl"
    answer = run(capsys, tiny_model, prompt=Prompt("the fox", "be brief"), output_file=str(file))
    row = json.loads(file.read_text())
    assert row == {"prompt": "the fox", "system": "be brief", "text": answer.removesuffix("\n")}
    assert run(capsys, tiny_model, prompt="the fox") == run(capsys, tiny_model, prompt=Prompt("the fox")) != answer


def test_standard_input(capsys, tiny_model, monkeypatch):
    expected = run(capsys, tiny_model, prompt="the quick\nfox")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\nfox\n"))
    assert run(capsys, tiny_model) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    with pytest.raises(UserError, match="a prompt is no UTF-8 text"):
        main(config_of(tiny_model))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(UserError, match="there is no prompt"):
        main(config_of(tiny_model))


def test_a_terminal_streams_and_is_not_commanded(tiny_model, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    expected = run(capsys, tiny_model, prompt="the quick", temperature=1.0, max_new_tokens=40, chat=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    main(config_of(tiny_model, prompt="the quick", temperature=1.0, max_new_tokens=40, chat=False))
    monkeypatch.undo()
    text = terminal.getvalue()
    assert len(text) == len(expected)
    assert all(letter >= " " or letter in "\n\t" for letter in text)


def test_an_adapter_brings_its_base(capsys, tiny_model, tmp_path):
    from tunesmith.checkpoint.adapter import save_adapter
    from tunesmith.nn.lora import apply_lora, reset_adapters
    from tunesmith.training.load import load_model

    model = load_model(tiny_model)
    apply_lora(model, rank=4, alpha=64.0, dropout=0.0, target_modules="all-linear")
    reset_adapters(model, 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    save_adapter(model, tmp_path / "adapter", str(tiny_model))
    options = {"prompt": "the quick", "chat": False}
    adapted = run(capsys, tmp_path / "adapter", **options)
    assert (
        adapted
        == run(capsys, tiny_model, adapter=str(tmp_path / "adapter"), **options)
        != run(capsys, tiny_model, **options)
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_quantized_base(capsys, tiny_model, dtype):
    assert run(capsys, tiny_model, prompt="the quick", quantize_base=True, dtype=dtype)


def test_a_template_of_the_users_own(capsys, tiny_model, tmp_path):
    template = tmp_path / "shout.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}!{% endfor %}")
    own = run(capsys, tiny_model, prompt="the quick", tokenizer=TokenizerConfig(chat_template=str(template)))
    assert own == run(capsys, tiny_model, prompt="the quick!", chat=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt": []}, "`prompt` is an empty list"),
        ({"prompt": ["x", "caf\udce9"]}, "a prompt is no UTF-8 text"),
        ({"prompt": Prompt("caf\udce9")}, "a prompt is no UTF-8 text"),
        ({"prompt": "x", "output_file": "/nowhere/texts.jsonl"}, "`output_file`: there is no folder /nowhere"),
        ({"prompt": "x", "output_file": "/"}, "`output_file`: / is a folder"),
        ({"prompt": "fox " * 600, "chat": False}, "prompt 0 has .* tokens, but the model's context holds 512"),
        ({"prompt": "x", "device": "xpu"}, "device=xpu is not here"),
    ],
)
def test_mistakes_are_told(tiny_model, options, message):
    with pytest.raises(UserError, match=message):
        main(config_of(tiny_model, **options))


def test_guessing_ahead_writes_the_same(capsys, tiny_model, tmp_path):
    texts = []
    for number, section in enumerate(({}, {"prompt_lookup": True}, {"draft_model": str(tiny_model), "num_tokens": 3})):
        file = tmp_path / f"{number}.jsonl"
        options = {"prompt": ["the quick the quick the", "a"], "chat": False, "max_new_tokens": 20}
        run(capsys, tiny_model, speculative=Speculative(**section), output_file=str(file), log_probs=True, **options)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        texts.append([(row["text"], len(row["log_probs"])) for row in rows])
    assert texts[0] == texts[1] == texts[2]


def test_exact_log_probabilities_are_written(capsys, tiny_model, tmp_path):
    rows = {}
    for name in ("log_probs", "exact_logprobs"):
        file = tmp_path / f"{name}.jsonl"
        run(capsys, tiny_model, prompt="the quick", chat=False, output_file=str(file), **{name: True})
        rows[name] = json.loads(file.read_text())["log_probs"]
    assert rows["exact_logprobs"] == pytest.approx(rows["log_probs"], abs=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"log_probs": True}, "`log_probs` are written into `output_file`: name one"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"cache_tokens": 0}, "`cache_tokens` must be at least 1"),
        ({"stop": ["x", ""]}, "`stop` holds an empty string"),
    ],
)
def test_impossible_options(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        config_of(tiny_model, **options)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"prompt_lookup": True, "draft_model": "x"}, "`prompt_lookup` and `draft_model` can't be combined"),
        ({"num_tokens": 3}, "`num_tokens` needs `prompt_lookup` or a `draft_model`"),
    ],
)
def test_impossible_guessing(section, message):
    with pytest.raises(ValueError, match=message):
        Speculative(**section)


FORMS = [
    ({"regex": "[ab]{3}-[0-9]"}, "[ab]{3}-[0-9]"),
    ({"json_schema": {"type": "array", "items": {"const": 7}, "minItems": 2, "maxItems": 2}}, r"\[\s*7\s*,\s*7\s*\]"),
    ({"grammar": 'start: "x" /[0-9]/ "y"'}, "x[0-9]y"),
    ({"grammar": 'root ::= "x" [0-9] "y"'}, "x[0-9]y"),
]


@pytest.mark.parametrize("options, pattern", FORMS)
@pytest.mark.parametrize("in_file", [False, True])
def test_the_text_has_the_form_that_is_asked_for(capsys, tiny_model, tmp_path, options, pattern, in_file):
    ((name, form),) = options.items()
    if in_file and name != "regex":
        (tmp_path / "form").write_text(json.dumps(form) if name == "json_schema" else form)
        options = {name: str(tmp_path / "form")}
    out = run(
        capsys, tiny_model, prompt="the", chat=False, temperature=1.5, max_new_tokens=400, stream=False, **options
    )
    assert re.fullmatch(pattern, out.removesuffix("\n")), out


@pytest.mark.parametrize(
    "options, words",
    [
        ({"regex": "a(b"}, r"the regex a\(b can't be used: unclosed group"),
        ({"json_schema": {"type": "objct"}}, "the JSON schema can't be used: Invalid type: objct"),
        ({"json_schema": "nowhere.json"}, "`json_schema`: nowhere.json can't be read .No such file.*name a file"),
        ({"grammar": "nowhere.lark"}, "`grammar`: nowhere.lark can't be read"),
        ({"grammar": "start: x"}, 'the grammar can\'t be used: .*unknown name: "x"'),
    ],
)
def test_a_form_that_cannot_be_used_is_told_before_the_model_is_loaded(tiny_model, monkeypatch, options, words):
    monkeypatch.setattr("tunesmith.recipes.generate.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=words):
        main(config_of(tiny_model, prompt="the", **options))


def test_forms_are_options_of_the_command_line():
    from tunesmith.config import load_config

    schema = "json_schema={type: object, properties: {a: {enum: [1, x, null]}}}"
    config = load_config("generate", "model=m", schema, "presence_penalty=0.5", "frequency_penalty=-1")
    assert config.json_schema == {"type": "object", "properties": {"a": {"enum": [1, "x", None]}}}
    assert (config.presence_penalty, config.frequency_penalty) == (0.5, -1.0)
    assert load_config("generate", "model=m", "json_schema=schema.json").json_schema == "schema.json"
    assert load_config("generate", "model=m", r"regex=[ab]{3}\d: x").regex == r"[ab]{3}\d: x"
    with pytest.raises(UserError, match="`json_schema` and `regex` can't be combined: leave one of them out"):
        load_config("generate", "model=m", "json_schema={}", "regex=a")


def test_a_search_finds_likelier_texts_than_greedy(capsys, assets, tmp_path):
    folder, file = assets / "models" / "stories260K", tmp_path / "texts.jsonl"
    options = {"prompt": ["Once upon a time, there was", "Lily"], "max_new_tokens": 12, "output_file": str(file)}
    run(capsys, folder, num_beams=4, num_samples=2, **options)
    found = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert len(set(found)) == 4
    run(capsys, folder, **options)
    greedy = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    model, tokenizer = tunesmith.load_model(folder), tunesmith.load_tokenizer(folder)

    def score(prompt, text):
        ids, start = tokenizer.encode(prompt + text), len(tokenizer.encode(prompt))
        log_probs = model.logits(torch.tensor([ids])).log_softmax(-1)[0]
        return log_probs[torch.arange(start - 1, len(ids) - 1), ids[start:]].mean().item()

    for place, prompt in enumerate(options["prompt"]):
        assert score(prompt, found[2 * place]) > score(prompt, found[2 * place + 1])
        assert score(prompt, found[2 * place]) >= score(prompt, greedy[place])


def test_what_a_search_is_not_for_is_told():
    from tunesmith.config import load_config

    with pytest.raises(UserError) as raised:
        load_config(
            "generate",
            "model=m",
            "num_beams=2",
            "num_samples=3",
            "stop=[x]",
            "regex=a",
            "compile=true",
            "early_stopping=always",
        )
    for words in (
        "set `temperature: 0`",
        "not `num_samples: 3`",
        "with `stop`",
        "with `regex`",
        "with `compile`",
        "`early_stopping` should be",
    ):
        assert words in str(raised.value)
    config = load_config(
        "generate", "model=m", "num_beams=2", "temperature=0", "early_stopping=never", "length_penalty=-1"
    )
    assert (config.early_stopping, config.length_penalty) == ("never", -1.0)


def test_drafts_that_can_not_guess_are_told_before_weights_are_read(tiny_model, tmp_path):
    for name, changes, words in (
        ("sized", {"vocab_size": 999}, "the draft model's vocabulary has 999 tokens, the model's"),
        (
            "scorer",
            {"architectures": ["LlamaForSequenceClassification"]},
            "`speculative.draft_model`: .* is a reward model",
        ),
        ("dynamic", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "depend on a text's length"),
    ):
        shutil.copytree(tiny_model, tmp_path / name)
        content = json.loads((tmp_path / name / "config.json").read_text())
        content.pop("rope_parameters", None)
        (tmp_path / name / "config.json").write_text(json.dumps(content | changes))
        with pytest.raises(UserError, match=words):
            check(config_of(tiny_model, prompt="a", speculative=Speculative(draft_model=str(tmp_path / name))))
    with pytest.raises(UserError, match="`speculative.draft_model`: there is no folder nowhere"):
        check(config_of(tiny_model, prompt="a", speculative=Speculative(draft_model="nowhere")))


def test_a_prompt_that_is_too_long_is_told_before_weights_are_read(tiny_model, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(tiny_model, broken)
    for file in broken.glob("*.safetensors"):  # whole as a file, but of another model
        save_file({"other.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="prompt 1 has .* tokens, but the model's context holds"):
        main(config_of(broken, prompt=["a", "the quick " * 5000], chat=False))


@pytest.mark.parametrize("beams", [1, 2])
def test_prompts_become_tokens_once(capsys, tiny_model, monkeypatch, beams):
    seen, encode = [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, *args: seen.append(text) or encode(self, text, *args))
    run(capsys, tiny_model, prompt=["the quick", "fox"], chat=False, num_beams=beams)
    assert [text for text in seen if text in ("the quick", "fox")] == ["the quick", "fox"]
