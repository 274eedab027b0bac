"""The verbs in this process: what they print and their exit codes."""

import errno
import json
from pathlib import Path

import pytest

from tunesmith.cli.main import VERBS, main
from tunesmith.config import load_config
from tunesmith.configs.recipes import RECIPES, overlays

NEEDED = ["model=some/model", "dataset.source=chats.jsonl"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tune(capsys, *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    capsys.readouterr()
    try:
        code = main(list(words))
    except SystemExit as error:
        code = int(error.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_says_what_there_is(capsys):
    for words in ([], ["--help"], ["-h"]):
        code, out, err = tune(capsys, *words)
        assert code == 0 and all(f"  {verb}" in out for verb in VERBS) and "examples:" in out and not err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(capsys, verb):
    code, out, err = tune(capsys, verb, "--help")
    assert code == 0 and f"usage: tune {verb}" in out and "examples:" in out and not err


def test_version_and_unknown_verbs(capsys):
    assert tune(capsys, "--version")[1].startswith("tunesmith 0.")
    code, out, err = tune(capsys, "rnu", "sft")
    assert code == 2 and not out and "did you mean `run`?" in err and err.count("\n") == 1
    assert tune(capsys, "sft", "model=m")[::2] == (2, "`sft` is a recipe: write `tune run sft …`\n")


def test_ls(capsys):
    code, out, _ = tune(capsys, "ls")
    assert code == 0
    for name in (*RECIPES, *(f"+{name}" for name in overlays()), "llama3_2", "0.5B", "alpaca_cleaned"):
        assert name in out, name


def test_ls_of_a_recipe(capsys):
    code, out, _ = tune(capsys, "ls", "sft")
    assert (
        code == 0
        and "weights.rank" in out
        and "optimizer.type=muon" in out
        and "batch_size" in out
        and "[required]" in out
    )
    assert tune(capsys, "ls", "lora_finetune_single_device")[1].startswith(
        "torchtune's lora_finetune_single_device is the recipe sft here"
    )
    for name, said in (
        ("qat_distributed", "sft here, with +qat\n"),
        ("qat_lora_finetune_distributed", "sft here, with +lora (or +dora, …) and +qat\n"),
        ("full_dpo_distributed", "preference here\n"),
        ("lora_dpo_single_device", "preference here, with +lora (or +qlora, +dora, …)\n"),
        ("knowledge_distillation_single_device", "distill here, with +lora (or +qlora, +dora, …)\n"),
    ):
        code, out, _ = tune(capsys, "ls", name)
        assert code == 0 and out.startswith(f"torchtune's {name} is the recipe {said}")
    assert "PPO" in tune(capsys, "ls", "ppo_full_finetune_single_device")[2]
    assert "did you mean `sft`?" in tune(capsys, "ls", "sfft")[2]


def test_cp_of_a_config(capsys):
    code, out, _ = tune(capsys, "cp", "sft", "+lora", *NEEDED, "./my.yaml")
    assert (code, out) == (0, "Copied to ./my.yaml\n")
    assert load_config("my.yaml") == load_config("sft", "+lora", *NEEDED)
    assert (
        tune(capsys, "cp", "sft", "open.yaml")[1]
        == "Copied to open.yaml; fill in model, dataset.source before you run it\n"
    )
    code, _, err = tune(capsys, "run", "open.yaml")
    assert code == 2 and "open.yaml" in err and "`model` is required" in err and "`dataset.source` is required" in err
    assert load_config("open.yaml", *NEEDED) == load_config("sft", *NEEDED)
    assert tune(capsys, "cp", "llama3_1/8B_full", "./my_custom_config.yaml")[1] == "Copied to ./my_custom_config.yaml\n"
    assert tune(capsys, "cp", "sft", *NEEDED, "noending")[1] == "Copied to noending.yaml\n"
    for name in ("llama3_1/8B_full_dpo", "qwen2/1.5B_to_0.5B_KD_lora_distributed", "llama3_1/8B_qat_lora"):
        assert tune(capsys, "cp", name, "theirs.yaml")[1] == "Copied to theirs.yaml\n"
        assert load_config("theirs.yaml") == load_config(name)
        assert tune(capsys, "cat", "--config", name)[1] == tune(capsys, "cat", "theirs.yaml")[1]


def test_cp_minds_what_is_there(capsys):
    Path("my.yaml").write_text("mine")
    for flag in ("-n", "--no-clobber"):
        code, out, _ = tune(capsys, "cp", flag, "sft", *NEEDED, "my.yaml")
        assert code == 0 and "left alone" in out and Path("my.yaml").read_text() == "mine"
    assert tune(capsys, "cp", "sft", *NEEDED, "my.yaml")[0] == 0 and Path("my.yaml").read_text() != "mine"
    code, _, err = tune(capsys, "cp", "sft", *NEEDED, "new/deep/my.yaml")
    assert code == 2 and "--make-parents" in err
    assert (
        tune(capsys, "cp", "sft", *NEEDED, "new/deep/my.yaml", "--make-parents")[0] == 0
        and Path("new/deep/my.yaml").is_file()
    )
    assert "its last word" in tune(capsys, "cp", "sft", "model=m")[2]
    assert "wants a recipe and the file" in tune(capsys, "cp", "my.yaml")[2]


def test_cp_leaves_what_is_there_when_the_disk_is_full(capsys, monkeypatch):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    Path("my.yaml").write_text("mine")
    monkeypatch.setattr(Path, "write_text", no_space)
    code, _, err = tune(capsys, "cp", "sft", *NEEDED, "my.yaml")
    assert code == 2 and err == "my.yaml: can't be written (No space left on device)\n"
    assert Path("my.yaml").read_text() == "mine" and not list(Path().glob(".my*"))


def test_cp_of_a_recipes_source(capsys):
    import tunesmith.recipes

    assert tune(capsys, "cp", "sft", "recipe.py")[1] == "Copied to recipe.py\n"
    source = Path(next(iter(tunesmith.recipes.__path__)), "sft.py").read_text()
    assert Path("recipe.py").read_text() == source
    assert (
        tune(capsys, "cp", "full_finetune_distributed", "other.py")[0] == 0 and Path("other.py").read_text() == source
    )
    assert "takes no settings" in tune(capsys, "cp", "sft", "+lora", "x.py")[2]
    assert tune(capsys, "cp", "ppo", "x.py")[0] == 2


def test_cat(capsys):
    code, out, _ = tune(capsys, "cat", "sft", "+lora", "optimizer.lr=1e-3")
    assert code == 0 and "model:  # REQUIRED." in out and "  rank: 16  #" in out and "  lr: 0.001  #" in out
    code, out, _ = tune(capsys, "cat", "sft", "--schema")
    assert json.loads(out)["properties"]["model"]["type"] == "string"
    Path("my.yaml").write_text("recipe: sft\nmodel: m\nepochs: 3\n")
    out = tune(capsys, "cat", "my.yaml", "--sort")[1]
    names = [line.partition(":")[0] for line in out.splitlines() if line and line[0].isalpha()]
    assert names[0] == "recipe" and names[1:] == sorted(names[1:]) and "epochs: 3" in out
    assert tune(capsys, "cat", "llama3_1/8B_full")[1].count("meta-llama/Meta-Llama-3.1-8B-Instruct") == 1
    assert tune(capsys, "cat", "absent.yaml")[0] == 2


RECIPE = """
from tunesmith.configs.sft import SFT
from tunesmith.errors import UserError

def main(config: SFT):
    {body}
"""


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("print('ran', config.batch_size)", 0, ""),
        ("raise UserError('mend it')", 2, "mend it\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        (
            "raise OSError(28, 'No space left on device', 'run/report.html')",
            2,
            "no space left on the disk for run/report.html: free some and try again; what was saved before is whole\n",
        ),
        (
            "raise PermissionError(13, 'Permission denied', 'secret')",
            2,
            "secret: no access (Permission denied); check its permissions, or name another\n",
        ),
        ("raise SystemExit(143)", 143, ""),
    ],
)
def test_exit_codes(capsys, tiny_model, body, code, said):
    Path("own.py").write_text(RECIPE.format(body=body))
    Path("chats.jsonl").write_text('{"text": "ab"}')
    found, out, err = tune(capsys, "run", "own.py", f"model={tiny_model}", "dataset.source=chats.jsonl", "batch_size=3")
    assert (found, err) == (code, said) and (out == "ran 3\n") == (code == 0)


def test_a_bug_keeps_its_traceback(tiny_model):
    Path("buggy.py").write_text(RECIPE.format(body="raise RuntimeError('ours')"))
    Path("chats.jsonl").write_text('{"text": "ab"}')
    with pytest.raises(RuntimeError, match="ours"):
        main(["run", "buggy.py", f"model={tiny_model}", "dataset.source=chats.jsonl"])


def test_run_refuses_before_anything_starts(capsys):
    code, out, err = tune(capsys, "run", "sft", "model=./absent", "dataset.source=absent.jsonl")
    assert code == 2 and not out and "there is no folder ./absent" in err and "there is no file absent.jsonl" in err
    assert tune(capsys, "run", "--nproc_per_nodes", "2", "sft")[0] == 2


def test_run_help_lists_the_options(capsys):
    code, out, _ = tune(capsys, "run", "sft", "--help")
    assert code == 0 and "usage: tune run" in out and "weights.rank" in out


@pytest.mark.parametrize(("words", "rows"), [(["--preview"], 3), (["--preview", "7"], 7), (["--preview=2"], 2)])
def test_preview(capsys, monkeypatch, tiny_model, words, rows):
    import sys
    import types

    seen = []
    stand_in = types.SimpleNamespace(preview=lambda config, n: seen.append((config.model, n)))
    monkeypatch.setitem(sys.modules, "tunesmith.data.preview", stand_in)
    Path("chats.jsonl").write_text('{"text": "ab"}')
    assert tune(capsys, "run", "sft", f"model={tiny_model}", "dataset.source=chats.jsonl", *words)[0] == 0
    assert seen == [(str(tiny_model), rows)]


def test_validate(capsys, tiny_model):
    Path("chats.jsonl").write_text('{"text": "ab"}')
    words = ["sft", f"model={tiny_model}", "dataset.source=chats.jsonl"]
    code, out, err = tune(capsys, "validate", *words)
    assert code == 0 and out.startswith(f"valid: sft of {tiny_model}") and not err
    assert tune(capsys, "validate", "--nproc_per_node", "8", *words)[0] == 0
    code, out, err = tune(capsys, "validate", *words, "batch_sise=1")
    assert code == 2 and not out and "did you mean `batch_size`?" in err
