"""`tune import`: torchtitan/NAME.txt holds the sentences and the settings that torchtitan/NAME.toml becomes.

After a wanted change: TUNESMITH_WRITE_GOLDEN=1 pytest tests/config/test_torchtitan.py, then read `git diff tests/config/torchtitan`.
"""

import difflib
import json
import os
from pathlib import Path

import pytest
import yaml

from tunesmith.cli.main import main
from tunesmith.config import dump, load_config, load_settings
from tunesmith.configs.torchtitan import import_toml
from tunesmith.configs.torchtitan_keys import MODELS
from tunesmith.errors import UserError
from tunesmith.models.families import named_sizes

FOLDER = Path(__file__).parent / "torchtitan"
CASES = sorted(path.stem for path in FOLDER.glob("*.toml"))


@pytest.mark.parametrize("case", CASES)
def test_import(case, monkeypatch):
    monkeypatch.chdir(FOLDER)
    imported = import_toml(Path(f"{case}.toml"))
    load_settings("pretrain", imported.settings)
    settings = yaml.safe_dump(imported.settings.plain(), sort_keys=False, width=200)
    said = "".join(f"{note}\n" for note in imported.notes) + "\n" + settings
    golden = FOLDER / f"{case}.txt"
    if os.environ.get("TUNESMITH_WRITE_GOLDEN"):
        golden.write_text(said, encoding="utf-8")
    expected = golden.read_text(encoding="utf-8")
    assert said == expected, "\n" + "".join(
        difflib.unified_diff(expected.splitlines(True), said.splitlines(True), "golden", "said")
    )


def test_every_key_of_july_2025_is_known(monkeypatch):
    monkeypatch.chdir(FOLDER)
    told = [str(note) for note in import_toml(Path("everything.toml")).notes]
    assert not [one for one in told if "no such key" in one]
    assert all(one.startswith("everything.toml:") and ":0" not in one for one in told)


def test_sizes_are_ours():
    assert {size for size, _ in MODELS.values()} <= set(named_sizes())


def test_printed_and_written_files_load(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = FOLDER / "eight.toml"
    assert main(["import", str(source)]) == 0
    printed, told = capsys.readouterr()
    assert "float8 training is not there yet" in told and "eight.toml:19: `model.converters`" in printed
    assert main(["import", str(source), "mine.yaml"]) == 0
    assert capsys.readouterr().out == "Written to mine.yaml\n"
    config = load_config("mine.yaml")
    assert Path("mine.yaml").read_text() == printed and config.tensor_parallel_dim == 8
    Path("again.yaml").write_text(dump(config))
    assert dump(load_config("again.yaml")) == dump(config)


def test_what_is_open_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(FOLDER / "foreign.toml"), "mine.yaml"]) == 0
    assert capsys.readouterr().out == "Written to mine.yaml; fill in model before you run it\n"


@pytest.mark.parametrize(
    ("layout", "steps", "said"),
    [
        ("data_parallel_replicate_degree = 2\ndata_parallel_shard_degree = 4\ntensor_parallel_degree = 2", 40, None),
        ("data_parallel_shard_degree = 1", 5, None),
        ("", 5, "leaves open (the number of processes)"),
        (
            "data_parallel_replicate_degree = 2\ntensor_parallel_degree = 2\ncontext_parallel_degree = 4",
            5,
            "(the number of processes, divided by tensor_parallel_dim 2 and context_parallel_dim 4)",
        ),
    ],
)
def test_validation_steps_are_those_of_all_ranks(tmp_path, layout, steps, said):
    (tmp_path / "run.toml").write_text(f"[validation]\nenabled = true\nsteps = 5\n[parallelism]\n{layout}\n")
    imported = import_toml(tmp_path / "run.toml")
    settings = imported.settings.plain()
    assert (settings["max_val_steps"], settings["batch_size_val"]) == (steps, 8)
    told = [str(note) for note in imported.notes if "`validation.steps`" in str(note)]
    assert ("run.toml:3: " in told[0] and "multiply 5 by" in told[0] and said in told[0]) if said else not told


@pytest.mark.parametrize("section", ["parallelism", "experimental", "compile"])
def test_asynchronous_tensor_parallelism(tmp_path, section):
    content = (
        f"[training]\ncompile = true\ntensor_parallel_degree = TP\n[{section}]\nenable_async_tensor_parallel = true\n"
    )
    for ranks in (1, 2):
        (tmp_path / "run.toml").write_text(content.replace("TP", str(ranks)))
        imported = import_toml(tmp_path / "run.toml")
        load_settings("pretrain", imported.settings)
        told = [note for note in map(str, imported.notes) if "`parallelism.enable_async" in note]
        assert ("enable_async_tensor_parallel" in imported.settings.plain()) == (ranks == 2) == (not told)
        assert all("run.toml:5: " in note and "`tensor_parallel_degree` above 1" in note for note in told)


def test_the_debug_model_has_its_tokenizers_vocabulary(tmp_path):
    content = {
        "model": {"vocab": {"a": 0, "b": 1}},
        "added_tokens": [{"content": "<s>", "id": 2}, {"content": "a", "id": 0}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "run.toml").write_text(f'[model]\nflavor = "debugmodel"\ntokenizer_path = "{tmp_path}"\n')
    settings = import_toml(tmp_path / "run.toml").settings.plain()
    assert settings["model_args"]["vocab_size"] == 3 and settings["model_args"]["num_hidden_layers"] == 6


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[training\nsteps = 1\n", "not valid TOML"),
        (b"steps = caf\xe9\n", "not UTF-8"),
        (
            b"[training]\n\nlocal_batch_size = 'many'\n",
            "run.toml:3: `training.local_batch_size` must be a whole number, got 'many'",
        ),
        (b"[training]\ncompile = 'maybe'\n", "run.toml:2: `compile` should be true or false, got 'maybe'"),
    ],
)
def test_mistakes_have_their_place(tmp_path, monkeypatch, capsys, content, said):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_bytes(content)
    assert main(["import", "run.toml"]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no such file"):
        import_toml(Path("absent.toml"))


def test_a_named_size_behind_config_is_the_model_of_pretraining():
    config = load_config("pretrain", "--config", "llama3/8B", "dataset.source=texts")
    assert config.model == "llama3/8B" and config.from_scratch
    assert load_config("pretrain", "--config", "llama3/8B", "dataset.source=texts", "model=other").model == "other"
    with pytest.raises(UserError, match="no config `llama3/8B`"):
        load_config("sft", "--config", "llama3/8B", "dataset.source=texts")
