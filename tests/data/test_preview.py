"""A preview marks what is in the loss, in colours or with brackets."""

import io

from rich.console import Console

from tests.data.conftest import write_lines
from tunesmith.config import load_config
from tunesmith.configs.data import PreferenceData, RewardData
from tunesmith.data.preview import preview

ROWS = [
    {"prompt": "the fox", "completion": "jumps over é"},
    {"prompt": "the dog", "completion": ""},
    {"prompt": "x", "completion": "y"},
]


def shown(tiny_model, source, terminal=False, **options):
    words = [f"dataset.{key}={value}" for key, value in options.items()]
    config = load_config("sft", f"model={tiny_model}", f"dataset.source={source}", "max_steps=1", *words)
    out = io.StringIO()
    console = Console(
        file=out,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        soft_wrap=True,
        highlight=False,
    )
    preview(config, 2, console)
    return out.getvalue()


def test_brackets_in_a_pipe(tiny_model, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", ROWS)
    text = shown(tiny_model, source)
    assert f"{source}:1 (prompt_completion)" in text
    assert '{"prompt": "the fox", "completion": "jumps over é"}' in text
    assert "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n⟦jumps over é<|im_end|>⟧\n" in text
    assert f"can't be used: 1 of 1 skipped: empty answer ({source}:2: column `completion`)" in text
    assert f"data: {source}: 2 of 3 rows used" in text and "⟦…⟧: in the loss" in text and "\x1b" not in text


def test_colours_in_a_terminal(tiny_model, tmp_path):
    text = shown(tiny_model, write_lines(tmp_path / "a.jsonl", ROWS), terminal=True)
    assert "\x1b[30;42m" in text and "⟦" not in text


def test_a_stream_is_read_only_as_far_as_shown(tiny_model, tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, ROWS * 20)
    with path.open("a") as file:
        file.write("not json\n")
    text = shown(tiny_model, path, streaming="true")
    assert "⟦jumps over é<|im_end|>⟧" in text and "data:" not in text


def test_text(tiny_model, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox " * 1000)
    config = load_config(
        "pretrain", f"model={tiny_model}", "from_scratch=false", f"dataset.source={path}", "max_steps=1"
    )
    out = io.StringIO()
    preview(config, 1, Console(file=out, soft_wrap=True, highlight=False))
    assert "t⟦he quick brown fox" in out.getvalue() or "⟦" in out.getvalue()
    assert "more tokens" in out.getvalue() and len(out.getvalue()) < 10_000


def test_preference_data(tiny_model, tmp_path):
    config = load_config("sft", f"model={tiny_model}", f"dataset.source={tmp_path}", "max_steps=1")

    def of(data, row):
        data.source = write_lines(tmp_path / "a.jsonl", [row])
        config.dataset, out = data, io.StringIO()
        preview(config, 1, Console(file=out, soft_wrap=True, highlight=False))
        return out.getvalue()

    begin = "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    text = of(PreferenceData(source="-"), {"prompt": "the fox", "chosen": "jumps", "rejected": "sits"})
    assert f"{begin}⟦jumps<|im_end|>⟧\n" in text and f"{begin}⟦sits<|im_end|>⟧\n" in text
    assert "(preference)" in text and "1 of 1 rows used as 1 pairs" in text
    text = of(PreferenceData(source="-"), {"prompt": "the fox", "completion": "jumps", "label": False})
    assert f"{begin}⟦jumps<|im_end|>⟧\n" in text and "in the loss, desirable: 0" in text
    text = of(RewardData(source="-"), {"text": "the fox", "label": 2})
    assert "the⟦ fox⟧" in text and "1 where a score is read, class 2" in text
