"""What is found before weights are loaded, each as one sentence, all of them at once."""

import gzip
import importlib.util
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from tunesmith.checkpoint.adapter_config import read_adapter_config
from tunesmith.config import load_config
from tunesmith.errors import ConfigError, UserError
from tunesmith.training import preflight
from tunesmith.training.preflight import machine


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path("chats.jsonl").write_text(json.dumps({"messages": messages, "text": "ab", "chosen": "a", "rejected": "b"}))
    return tmp_path


@pytest.fixture
def model(tiny_model) -> Path:
    """A copy of the tiny model that a test may damage."""
    shutil.copytree(tiny_model, "model")
    return Path("model")


def findings(*words: str) -> list[str]:
    defaults = ["model=model", "dataset.source=chats.jsonl"] if words[0] in ("sft", "pretrain") else []
    try:
        preflight.check(load_config(words[0], *defaults, *words[1:]))
    except ConfigError as error:
        return str(error).split("\n")
    return []


def test_nothing_to_find(model):
    assert findings("sft") == []
    assert findings("generate", "model=model") == []


def test_everything_at_once(model):
    words = [
        "model=absent",
        "dataset.source=absent.jsonl",
        "expert_parallel_dim=2",
        "optimizer.type=nopackage.Adam",
        "tokenizer.chat_template=chatlm",
    ]
    found = findings("sft", *words)
    assert len(found) == 5
    for part in (
        "there is no folder absent",
        "there is no file absent.jsonl",
        "`expert_parallel_dim`",
        "nopackage",
        "no file chatlm",
    ):
        assert any(part in line for line in found), part


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def spoil_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "cut off: "),
        (lengthen, "too long: "),
        (spoil_header, "damaged header"),
        (lambda file: file.write_bytes(b""), "empty"),
        (
            lambda file: file.write_bytes(struct.pack("<Q", 1000) + b"{}"),
            "cut off: 10 bytes, and its header alone needs 1,008",
        ),
    ],
    ids=["cut", "long", "header", "empty", "head only"],
)
def test_damaged_weights(model, damage, said):
    damage(model / "model.safetensors")
    found = findings("sft")
    assert (
        len(found) == 1
        and found[0].startswith(f"model/model.safetensors: {said}")
        and found[0].endswith("download it again")
    )


def test_latest_stands_for_the_checkpoint_it_names(model):
    Path("latest").write_text("model\n")
    assert findings("generate", "model=latest") == []
    Path("latest").write_text("gone\n")
    assert findings("generate", "model=latest") != []


def test_git_lfs_pointer(model):
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert findings("sft") == [
        "model/model.safetensors: a Git LFS pointer, not the weights themselves; run `git lfs pull`"
    ]


def test_missing_shards(model):
    shutil.move(model / "model.safetensors", model / "model-00001-of-00003.safetensors")
    names = {f"w{i}": f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    said = "model: 2 of 3 weight files are missing (model-00002-of-00003.safetensors, model-00003-of-00003.safetensors); download the model again"
    assert findings("sft") == [said]
    for content in ("[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}'):
        (model / "model.safetensors.index.json").write_text(content)
        assert len(findings("sft")) == 1 and findings("sft")[0].startswith("model/model.safetensors.index.json: ")
    (model / "model.safetensors.index.json").write_text("{")
    assert "model/model.safetensors.index.json: not valid JSON" in findings("sft")[0]


def test_folders_that_are_no_model(model):
    Path("empty").mkdir()
    assert findings("sft", "model=empty") == ["empty: no config.json, so this is no model folder"]
    assert "is a file" in findings("sft", "model=chats.jsonl")[0]
    Path("empty/original").mkdir()
    Path("empty/original/params.json").touch()
    assert findings("sft", "model=empty") == [
        "empty: no config.json; Meta's weights are in empty/original: name that folder"
    ]
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert findings("sft") == [], "of PyTorch's own files the tensors are read, and nothing else"
    (model / "pytorch_model.bin").rename(model / "model-00001-of-00002.safetensors")
    assert "neither model.safetensors nor model.safetensors.index.json" in findings("sft")[0]
    (model / "model-00001-of-00002.safetensors").unlink()
    assert findings("sft") == ["model: no *.safetensors: no weights"]
    assert findings("pretrain") == [], "from scratch needs no weights"


def test_unknown_architecture(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["FancyForCausalLM"]}))
    found = findings("sft")
    assert (
        len(found) == 1
        and "FancyForCausalLM" in found[0]
        and "LlamaForCausalLM" in found[0]
        and "config.json" in found[0]
    )
    (model / "config.json").write_text("{")
    assert "config.json: not valid JSON" in findings("sft")[0]


def test_names_of_models(monkeypatch):
    assert (
        "is a named size, for training from scratch; its trained weights are meta-llama/Llama-3.2-1B-Instruct"
        in findings("sft", "model=llama3_2/1B")[0]
    )
    assert findings("pretrain", "model=llama3_2/1B") == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", "cache")
    assert "HF_HUB_OFFLINE is set" in findings("sft", "model=some/model")[0]
    snapshot = Path("cache/hub/models--some--model/snapshots/abc")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    assert findings("sft", "model=some/model") == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert preflight.check(load_config("sft", "model=other/model", "dataset.source=chats.jsonl")) == [
        "other/model is taken for a Hub id, which is looked up when the run starts"
    ]


def test_adapters(model):
    Path("adapter").mkdir()
    assert "holds no adapter_config.json" in findings("sft", "weights.type=lora", "weights.adapter=adapter")[0]
    Path("adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "absent"}))
    assert findings("sft", "weights.type=lora", "weights.adapter=adapter") == [
        "adapter: no adapter_model.safetensors, so this adapter has no weights"
    ]
    shutil.copy(model / "model.safetensors", "adapter/adapter_model.safetensors")
    assert findings("sft", "weights.type=lora", "weights.adapter=adapter") == []
    assert "is a PEFT adapter; name its base" in findings("sft", "model=adapter")[0]
    assert "there is no folder absent" in findings("generate", "model=adapter")[0]
    assert findings("export", "model=adapter", "base=model", "output_dir=out") == []
    Path("adapter/adapter_config.json").write_text("{}")
    assert "names no base model" in findings("export", "model=adapter", "output_dir=out")[0]


def test_an_adapter_of_another_base(model):
    """It loads, where the shapes are the same: that it was made for another model is worth a sentence."""
    Path("adapter").mkdir()
    shutil.copytree(model, "copies/model-b")
    shutil.copytree(model, "copies/other")
    change_config(Path("copies/other"), rope_theta=5e5)

    def warning(named: str, base: str) -> str | None:
        Path("adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
        return preflight.warn_of_another_base(Path("adapter"), base)

    for named, base in (
        ("model", str(Path("model").resolve())),
        ("model", "copies/model-b"),  # the same weights
        ("owner/Model-B", "copies/model-b"),
        ("owner/model-b", "/cache/models--owner--model-b/snapshots/0123abc"),
        ("/gone/model-b/", "owner/model-b"),
    ):
        assert warning(named, base) is None, (named, base)
    for named, base in (("copies/other", "model"), ("owner/model-a", "copies/model-b"), ("owner/a", "owner/b")):
        assert (warning(named, base) or "").startswith(
            f"the adapter in adapter was made for {named}, and is put on {base}"
        )
    shutil.copy(model / "model.safetensors", "adapter/adapter_model.safetensors")
    Path("adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "copies/other"}))
    config = load_config(
        "sft", "model=model", "dataset.source=chats.jsonl", "weights.type=lora", "weights.adapter=adapter"
    )
    assert any("was made for copies/other" in note for note in preflight.check(config))


@pytest.mark.parametrize(
    "content, message",
    [
        ({"r": "x"}, "`r` is 'x', and must be a whole number above 0"),
        ({"r": 0}, "`r` is 0, and must be a whole number above 0"),
        ({"lora_alpha": "x"}, "`lora_alpha` is 'x', and must be a number"),
        (
            {"rank_pattern": {"q_proj": "x"}},
            "`rank_pattern` is {'q_proj': 'x'}, and must be an object of whole numbers",
        ),
        ({"base_model_name_or_path": 5}, "`base_model_name_or_path` is 5, and must be text"),
    ],
)
def test_wrong_kinds_of_values_in_adapter_config(model, content, message):
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **content}))
    expected = f"adapter/adapter_config.json: {message}"
    assert findings("sft", "weights.type=lora", "weights.adapter=adapter") == [expected]
    with pytest.raises(UserError) as error:
        read_adapter_config("adapter")
    assert str(error.value) == expected


def change_config(model: Path, **numbers) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | numbers))


@pytest.mark.parametrize("recipe", ["sft", "pretrain"])
def test_targets_that_match_nothing(model, recipe):
    lora = ["from_scratch=false"] * (recipe == "pretrain") + ["weights.type=lora"]
    assert findings(recipe, *lora, "weights.target_modules=[q_prj]") == [
        "target_modules names 'q_prj', but no linear layer of this model is called that (did you mean 'q_proj'?): there are "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head; or write all-linear"
    ]
    assert "no linear layer" in findings(recipe, *lora, r"weights.target_modules='.*layers\.2\..*'")[0]
    for target in ("all-linear", "[q_proj, lm_head]", r"'.*layers\.1\..*'", "[layers.1.self_attn.q_proj]"):
        assert findings(recipe, *lora, f"weights.target_modules={target}") == []


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(model):
    content = json.loads((model / "tokenizer.json").read_text())
    count = len(content["model"]["vocab"])  # special tokens included
    change_config(model, vocab_size=count - 1)
    said = f"the tokenizer has {count} tokens and model an embedding of {count - 1} rows: they don't belong together"
    assert [line.startswith(said) for line in findings("sft")] == [True]
    change_config(model, vocab_size=count)
    assert findings("sft") == []
    assert findings("sft", "tokenizer.add_tokens=[<new>]") == [], "all weights may grow"
    grows = (
        "`tokenizer.add_tokens` grows the embedding, whose new rows an adapter doesn't hold: use `weights.type: full`"
    )
    assert findings("sft", "weights.type=lora", "tokenizer.add_tokens=[<new>]") == [grows]
    assert findings("sft", "weights.type=lora", "tokenizer.add_tokens=[<|im_end|>]") == [], "it has that one"
    assert findings("pretrain", f"model_args.vocab_size={count - 2}")[0].startswith(f"the tokenizer has {count} tokens")
    text = (model / "tokenizer.json").read_text()
    assert '"the"' in text
    (model / "tokenizer.json").write_text(text.replace('"the"', '": 999999,"'))  # it only looks like an id
    assert findings("sft") == []


def test_an_adapter_that_does_not_fit(model):
    from safetensors.numpy import save_file

    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": "model"}')

    def said(layer, inputs, outputs, *words):
        name = f"base_model.model.{layer}.lora_"
        tensors = {f"{name}A.weight": np.zeros((2, inputs)), f"{name}B.weight": np.zeros((outputs, 2))}
        save_file(tensors, "adapter/adapter_model.safetensors")
        return findings(*words)

    for words in (["sft", "weights.type=lora", "weights.adapter=adapter"], ["generate", "model=adapter"]):
        layer = "model.layers.1.mlp.up_proj"
        assert said(layer, 64, 128, *words) == []
        doesnt = "the adapter in adapter doesn't fit model: "
        assert said("model.layers.2.mlp.up_proj", 64, 128, *words) == [
            f"{doesnt}it has weights for model.layers.2.mlp.up_proj, and the model no such linear layer"
        ]
        for inputs, outputs, side, shape in ((96, 128, "A", (2, 96)), (64, 96, "B", (96, 2))):
            its = f"its base_model.model.{layer}.lora_{side}.weight has the shape {shape}"
            assert said(layer, inputs, outputs, *words) == [f"{doesnt}{its}, and the model's {layer} (128, 64)"]


def test_rows_longer_than_the_model_is_made_for(model):
    def notes(length):
        words = ("sft", "model=model", "dataset.source=chats.jsonl", f"tokenizer.max_seq_len={length}")
        return preflight.check(load_config(*words))

    assert notes(512) == []
    (note,) = notes(513)
    assert note.startswith("`tokenizer.max_seq_len` = 513 is more than the 512 tokens that model is made for")
    change_config(model, rope_scaling={"type": "linear", "factor": 2.0})
    assert notes(1024) == [] and "1024 tokens" in notes(1025)[0]


def test_numbers_of_the_model_that_are_not_understood(model):
    assert "`fancy`" in findings("pretrain", "model_args.fancy=true")[0]


def test_data(model):
    assert "did you mean `alpaca`?" in findings("sft", "dataset.source=alpca")[0]
    assert "no file matches" in findings("sft", "dataset.source=none*.jsonl")[0]
    assert findings("sft", "dataset.source=cha*.jsonl") == []
    assert "`dataset_val.source`: there is no file val.csv" in findings("sft", "dataset_val.source=val.csv")[0]
    assert "`dataset` is an empty list" in findings("sft", "dataset=[]")[0]
    assert "no module nopackage" in findings("sft", "dataset.reader=nopackage.read")[0]
    Path("own.py").write_text("def read(source, split):\n    yield {}\n")
    for file in ("own.py", "./own.py", str(Path("own.py").resolve())):
        assert findings("sft", f"dataset.reader={file}:read") == []
    assert findings("sft", "dataset.reader=./none.py:read") == ["`dataset.reader`: there is no file ./none.py"]


def test_a_layout_that_does_not_fit_the_number_of_processes_is_refused_before_they_meet(model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert findings("sft") == [] and findings("sft", "tensor_parallel_dim=2") == []
    [said] = findings("sft", "context_parallel_dim=4")
    assert said == "`context_parallel_dim: 4` needs a multiple of 4 processes, but 6 were started"
    [said] = findings("sft", "data_parallel_shard_dim=2", "data_parallel_replicate_dim=2")
    assert said.startswith(
        "`data_parallel_replicate_dim: 2` x `data_parallel_shard_dim: 2` makes 4 processes, but 6 were started"
    )


def test_an_optimizer_that_needs_whole_parameters(model, monkeypatch):
    adafactor = "optimizer.type=adafactor"
    for option in ("data_parallel_shard_dim", "context_parallel_dim", "tensor_parallel_dim"):
        [said] = findings("sft", adafactor, f"{option}=2")
        assert "`optimizer.type: adafactor`" in said and f"`{option}: 2`" in said
    assert findings("sft", adafactor) == findings("sft", adafactor, "data_parallel_replicate_dim=2") == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    [said] = findings("sft", adafactor)
    assert "`optimizer.type: adafactor`" in said and "`data_parallel_shard_dim: -1`, which is 2" in said
    assert findings("sft", adafactor, "data_parallel_replicate_dim=2") == []


@pytest.mark.parametrize("tied", [True, False])
def test_eight_bit_states_of_a_tied_head_on_a_pipeline(model, monkeypatch, tied):
    monkeypatch.setitem(machine._EXTRAS, ("optimizer", "adamw_8bit"), ("json", "json"))  # torchao may be absent
    change_config(model, tie_word_embeddings=tied)
    pipeline = ["pipeline_parallel_dim=2", "gradient_accumulation_steps=2"]
    said = [line for line in findings("sft", "optimizer.type=adamw_8bit", *pipeline) if "adamw_8bit" in line]
    assert len(said) == tied and all("`pipeline_parallel_dim`" in line for line in said)


def test_samples_through_a_pipeline(model):
    for recipe in ("sft", "pretrain"):
        [said] = findings(recipe, "sample_prompts=[hi]", "pipeline_parallel_dim=2", "gradient_accumulation_steps=2")
        assert "`sample_prompts`" in said and "`pipeline_parallel_dim: 2`" in said


def test_rows_of_a_step_that_ranks_cannot_share(model, monkeypatch):
    words = ("sft", "batch_size=2", "global_batch_size=6")
    assert findings(*words) == []
    assert findings("sft", "batch_size=4", "global_batch_size=6") == [
        "`global_batch_size` = 6 is no multiple of `batch_size` = 4; take 8, or another `batch_size`"
    ]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert findings(*words) == [
        "`global_batch_size` = 6 is no multiple of `batch_size` = 2 x 4 data-parallel ranks; take 8, or another `batch_size`"
    ]
    assert findings(*words, "tensor_parallel_dim=2")[0].count("x 2 data-parallel ranks") == 1


def test_updates_in_the_backward_pass_where_ranks_make_one_micro_batch_of_a_step(model, monkeypatch):
    words = ("sft", "optimizer_in_bwd=true", "batch_size=2", "global_batch_size=8")
    [said] = findings(*words)
    assert "`optimizer_in_bwd`" in said and "`global_batch_size: 8`, which makes 4 micro-batches" in said
    assert findings(*words, "data_parallel_shard_dim=4") == []
    preflight.check(load_config(*words, "model=model", "dataset.source=chats.jsonl"), processes=0)  # not known yet
    for count, said in ((2, 1), (4, 0)):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        assert len(findings(*words)) == said


def test_what_writes_a_model_runs_in_one_process(model, monkeypatch):
    recipes = (["export", "model=model", "output_dir=out"], ["quantize", "model=model", "output_dir=out"])
    message = "`quantize` and `export` run in one process: leave the launch options out"
    for count, said in ((1, []), (2, [message])):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        assert [message in findings(*words) for words in recipes] == [bool(said)] * 2
        assert findings("generate", "model=model") == []
    monkeypatch.delenv("WORLD_SIZE")
    for count in (2, 0):  # 0: as many as the machine has devices
        with pytest.raises(ConfigError, match="one process"):
            preflight.check(load_config(*recipes[0]), processes=count)
        preflight.check(load_config("generate", "model=model"), processes=count)
    preflight.check(load_config(*recipes[0]), processes=1)


def test_output_folder(model, monkeypatch):
    Path("run").mkdir()
    assert findings("sft") == []
    Path("run/.lock").touch()  # left by a run that was killed before it wrote anything
    assert findings("sft") == []
    Path("run/old").touch()
    assert findings("sft") == [
        "`output_dir`: run is not empty; choose another, or set `resume_from_checkpoint=true` to go on from its newest checkpoint"
    ]
    assert findings("sft", "resume_from_checkpoint=true") == []
    assert findings("export", "model=model", "output_dir=run") == ["`output_dir`: run is not empty; choose another"]
    assert findings("sft", "output_dir=chats.jsonl") == ["`output_dir`: chats.jsonl is a file"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert findings("sft") == [], "a restart resumes by itself"


@pytest.mark.parametrize(
    ("word", "package"), [("metric_logger.type=wandb", "wandb"), ("optimizer.type=adamw_8bit", "torchao")]
)
def test_packages(model, monkeypatch, word, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    found = findings("sft", word)
    assert (
        len(found) == 1 and f"needs the package {package}, which is not installed: pip install 'tunesmith[" in found[0]
    )


@pytest.mark.parametrize(
    ("name", "content", "words", "said"),
    [
        ("a.jsonl", "", [], "`a.jsonl` holds no rows; check `source` and `split`"),
        ("a.jsonl", "\n\n", [], "`a.jsonl` holds no rows"),
        ("a.json", "[ ]", [], "`a.json` holds no rows"),
        ("a.csv", "prompt,completion\n", [], "`a.csv` holds no rows"),
        ("a.jsonl", '\n{"foo": 1}', [], "a.jsonl:2: no known format fits the columns `foo`"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"foo": 1}', mtime=0),
            [],
            "a.jsonl.gz:1: no known format fits the columns `foo`",
        ),
        ("a.json", '[{"foo": 1}, {"bar', [], "a.json row 1: no known format fits the columns `foo`"),
        ("a.csv", "prompt,answer\na,b", [], "a.csv:2: no known format fits the columns `prompt`, `answer`"),
        ("a.jsonl", "3", [], "a.jsonl:1: int where an object with columns was expected"),
        ("a.jsonl", "{", [], "a.jsonl:1: not a JSON object"),
        ("a.jsonl", '{"text": "a"}', ["dataset.format=messages"], "a.jsonl:1: no column `messages`"),
        ("a.jsonl", '{"text": "a"}', ["dataset.split=train["], "`split: train[` is no split"),
        ("a.jsonl", '{"text": "a"}', ["dataset.split=test"], "`a.jsonl` has no split `test`"),
        ("a.parquet.lock", "", [], "a.parquet.lock: not a kind of data file we read"),
    ],
)
def test_rows_that_can_not_be_used(model, name, content, words, said):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert [line.startswith(said) for line in findings("sft", f"dataset.source={name}", *words)] == [True]
    both = findings("sft", f"dataset_val.source={name}", *(word.replace("dataset", "dataset_val") for word in words))
    assert both == findings("sft", f"dataset.source={name}", *words), "the same of validation data"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}', ["dataset.split=test"]),
        ("a.json", '{"text": "a"}\n{"text": "b"}', []),
        ("a.json", json.dumps([{"text": "a" * 2_000_000}]), []),  # longer than what is looked at
        ("a.jsonl", '{"foo": 1}\n{"text": "a"}', ["dataset.split=[1:]"]),
        ("a.jsonl", '{"a": 1, "b": 2}', ["dataset.column_map={prompt: a, completion: b}"]),
        ("test.jsonl", '{"text": "a"}', []),
        ("a.md", "a text", []),
    ],
)
def test_rows_that_can(model, name, content, words):
    Path(name).write_text(content)
    assert findings("sft", f"dataset.source={name}", *words) == []


def test_folders_of_rows(model):
    Path("data").mkdir()
    shutil.copy("chats.jsonl", "data/train.jsonl")
    Path("data/test.csv").write_text("foo\n1\n")
    assert findings("sft", "dataset.source=data") == []
    assert "test.csv:2: no known format fits" in findings("sft", "dataset.source=data", "dataset.split=test")[0]
    assert findings("sft", "dataset.source=data", "dataset.split=val")[0].startswith("`data` has no split `val`")


def test_a_folder_without_a_tokenizer(model):
    tokenizer = shutil.move(model / "tokenizer.json", "tokenizer.json")
    assert findings("sft") == [
        "model holds no tokenizer: there must be tokenizer.json, vocab.json with merges.txt, or a .model or .tiktoken file"
    ]
    assert findings("sft", f"tokenizer.path={tokenizer}") == []
    vocabulary = json.loads(Path(tokenizer).read_text())["model"]["vocab"]
    (model / "vocab.json").write_text(json.dumps(vocabulary))
    (model / "merges.txt").touch()
    assert findings("sft") == []
    (model / "vocab.json").write_text(json.dumps(vocabulary | {"another": 100_000}))
    assert findings("sft")[0].startswith("the tokenizer has 100001 tokens and model an embedding of ")
