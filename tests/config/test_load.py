"""Layers, settings, interpolation and the choice of sections: what load_config makes of words and files."""

from pathlib import Path

import pytest

from tunesmith.config import ConfigError, dump, load, load_config, recipe_name
from tunesmith.configs.generate import Prompt
from tunesmith.configs.loggers import ThirdPartyLogger
from tunesmith.configs.optimizers import SGD, AdamW, ThirdPartyOptimizer
from tunesmith.configs.recipes import RECIPES, overlays
from tunesmith.configs.schedule import Cosine
from tunesmith.configs.weights import FullWeights, LoRAWeights
from tunesmith.errors import UserError

NEEDED = ["model=some/model", "dataset.source=chats.jsonl"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def test_recipe_defaults_are_sensible():
    config = load_config("sft", *NEEDED)
    assert config.optimizer == AdamW(lr=2e-5) and config.clip_grad_norm == 1.0
    assert config.lr_scheduler == Cosine(warmup_ratio=0.03) and config.weights == FullWeights()


def test_layers_merge_in_the_order_written():
    write(
        "my.yaml",
        "recipe: sft\nmodel: a\ndataset: {source: x}\nbatch_size: 3\noptimizer:\n  lr: 1\nweights: {type: lora, rank: 5}\n",
    )
    config = load_config("my.yaml", "optimizer.lr=7e-4", "+lora")
    assert config.weights == LoRAWeights(rank=16, alpha=32) and config.batch_size == 3
    assert config.optimizer.lr == 7e-4, "settings come last, wherever they stand"
    write("late.yaml", "batch_size: 9\n")
    assert load_config("sft", "--config", "my.yaml", "+late.yaml").batch_size == 9
    assert load_config("sft", "--config=my.yaml").batch_size == 3
    assert load_config("sft", "+lora", "my.yaml").weights.rank == 5


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("optimizer.lr=3e-4", 3e-4),
        ("optimizer.lr=1", 1.0),
        ("optimizer.lr=1_0e-5", 1e-4),
        ("optimizer.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("max_steps=1e3", 1000),
        ("max_steps=None", None),
        ("max_steps=null", None),
        ("seed=", None),
        ("compile=True", True),
        ("dataset.source=a=b=c", "a=b=c"),
        ("dataset.split=train[:95%]", "train[:95%]"),
        ("dataset.split=[95%:]", "[95%:]"),
        ("dataset.system_prompt=yes", "yes"),
        ("dataset.system_prompt=Be brief: one line # only", "Be brief: one line # only"),
        ("output_dir=2024", "2024"),
        ("output_dir=2024-01-01", "2024-01-01"),
        ("output_dir='a b'", "a b"),
        ("dataset.column_map={input: question, output: answer}", {"input": "question", "output": "answer"}),
        ("sample_prompts=['[INST] hi', two]", ["[INST] hi", "two"]),
        ("tokenizer.chat_template_args={depth: 3, rate: 1e-3}", {"depth": 3, "rate": 1e-3}),
        ("ac_option=op", "op"),
        ("ac_option=3", 3),
        ("weights=lora", LoRAWeights()),
        ("optimizer=sgd", SGD(lr=2e-5)),
        ("weights.type=lora", LoRAWeights()),
    ],
)
def test_setting(word, value):
    config = load_config("sft", *NEEDED, word)
    for key in word.partition("=")[0].removesuffix(".type").split("."):
        config = getattr(config, key)
    assert config == value and type(config) is type(value)


def test_text_that_looks_like_yaml_stays_text():
    assert load_config("generate", "model=m", "prompt=Hello: world").prompt == "Hello: world"
    assert load_config("generate", "model=m", "prompt=[INST] hi").prompt == "[INST] hi"
    assert load_config("generate", "model=m", "prompt=[INST] hi [/INST]").prompt == "[INST] hi [/INST]"
    assert load_config("generate", "model=m", "prompt='[A color:, x]'").prompt == "[A color:, x]"
    assert load_config("generate", "model=m", "prompt=['A color:', x]").prompt == ["A color:", "x"]
    assert load_config("generate", "model=m", "regex=[a:]").regex == "[a:]"
    assert load_config("generate", "model=m", "prompt=[a, b]").prompt == ["a", "b"]
    assert load_config("generate", "model=m", "prompt={user: hi}").prompt == Prompt(user="hi")
    assert load_config("generate", "model=m", "prompt.user=hi", "prompt.system=be kind").prompt == Prompt(
        "hi", "be kind"
    )
    assert load_config("generate", "model=m", 'stop=["\\n"]').stop == ["\n"]


def test_tilde_deletes():
    assert load_config("sft", *NEEDED, "~clip_grad_norm").clip_grad_norm is None
    assert load_config("sft", *NEEDED, "batch_size=7", "~batch_size").batch_size == 2
    assert load_config("sft", *NEEDED, "~batch_size", "batch_size=7").batch_size == 7
    write("my.yaml", "recipe: sft\nmodel: m\ndataset: {source: x}\noptimizer: {betas: [0.5, 0.5]}\n")
    assert load_config("my.yaml", "~optimizer.betas").optimizer.betas == (0.9, 0.999)
    assert isinstance(load_config("my.yaml", "~optimizer.betas", "optimizer.type=sgd").optimizer, SGD)


def test_a_new_type_keeps_what_it_also_has_and_drops_what_only_we_wrote():
    assert load_config("pretrain", "model=m", "dataset.source=x", "optimizer.type=sgd").optimizer == SGD(
        lr=3e-4, weight_decay=0.1
    )
    assert load_config("sft", *NEEDED, "optimizer.lr=1", "optimizer.type=sgd").optimizer == SGD(lr=1.0)


def test_third_party_classes():
    words = [
        "optimizer.type=bitsandbytes.optim.AdamW8bit",
        "optimizer.is_paged=true",
        "metric_logger.type=my.Logger",
        "metric_logger.a=1",
    ]
    config = load_config("sft", *NEEDED, *words)
    assert config.optimizer == ThirdPartyOptimizer("bitsandbytes.optim.AdamW8bit", 2e-5, {"is_paged": True})
    assert config.metric_logger == ThirdPartyLogger("my.Logger", {"a": 1})


def test_lists_of_sections():
    config = load_config("sft", "model=m", "dataset.0.source=a", "dataset.1.source=b", "dataset.1.weight=0.5")
    assert [source.source for source in config.dataset] == ["a", "b"] and config.dataset[1].weight == 0.5
    write("my.yaml", "recipe: sft\nmodel: m\ndataset:\n  - source: a\n  - source: b\n    packed: true\n")
    config = load_config("my.yaml", "dataset.0.source=c", "dataset.2.source=d", "~dataset.1.packed")
    assert [(source.source, source.packed) for source in config.dataset] == [("c", False), ("b", False), ("d", False)]


def test_interpolation():
    text = (
        "recipe: sft\nmodel: m\noutput_dir: runs/${dataset.source}-${batch_size}\ndataset: {source: x, system_prompt: 'costs $${5}'}\n"
        "batch_size_val: ${batch_size}\nmax_steps: ${tokenizer.max_seq_len}\ntokenizer: {max_seq_len: 64}\noptimizer: {lr: '${clip_grad_norm}'}\n"
    )
    config = load_config(write("my.yaml", text), "batch_size=5")
    assert (
        config.output_dir == "runs/x-5"
        and config.batch_size_val == 5
        and config.max_steps == 64
        and config.optimizer.lr == 1.0
    )
    assert config.dataset.system_prompt == "costs ${5}"
    assert load_config("my.yaml", "epochs=${log_every_n_steps}").epochs == 1, (
        "an option that no layer sets stands for its default"
    )
    assert load_config(write("again.yaml", dump(config))) == config


def test_anchors_and_merge_keys():
    write(
        "my.yaml", "recipe: sft\nmodel: m\ndataset: &d {source: a, packed: true}\ndataset_val:\n  <<: *d\n  source: b\n"
    )
    config = load_config("my.yaml")
    assert config.dataset_val.source == "b" and config.dataset_val.packed


def test_what_only_we_set_gives_way():
    assert load_config("sft", *NEEDED, "lr_scheduler.num_warmup_steps=10").lr_scheduler == Cosine(num_warmup_steps=10)
    assert load_config("sft", *NEEDED, "optimizer_in_bwd=true").clip_grad_norm is None
    with pytest.raises(ConfigError):
        load_config("sft", *NEEDED, "optimizer_in_bwd=true", "clip_grad_norm=1")


def test_every_overlay_loads_alone_and_together():
    for name in overlays():
        load_config("sft", *NEEDED, f"+{name}")
    config = load_config("sft", *NEEDED, "+qlora", "+dora", "+low_memory")
    assert config.weights.use_dora and config.weights.quantize_base == "nf4" and config.optimizer.type == "adamw_8bit"


def test_a_byte_order_mark_is_no_text():
    Path("my.yaml").write_bytes(b"\xef\xbb\xbfrecipe: sft\nmodel: m\ndataset: {source: a}\n")
    assert load_config("my.yaml").model == "m"


def test_table_of_recipes():
    for name, recipe in RECIPES.items():
        assert recipe.defaults.is_file() and recipe.config_class.__doc__ == recipe.summary, name
        assert recipe_name(load([name], partial=True).config) == name


OWN = '''
from dataclasses import dataclass
from tunesmith.configs.sft import SFT

@dataclass(kw_only=True)
class Mine(SFT):
    """My own method."""

    penalty: float = 0.5
    """How hard to punish."""

def main(config: Mine):
    print("penalty", config.penalty)
'''


def test_own_recipe_extends_the_options(capsys):
    import tunesmith.config

    write("my_recipe.py", OWN)
    config = load_config("./my_recipe.py", *NEEDED, "+lora", "penalty=0.9")
    assert config.penalty == 0.9 and config.weights.type == "lora" and config.clip_grad_norm == 1.0
    text = dump(config)
    assert "penalty: 0.9  # How hard to punish." in text and f"recipe: {Path('my_recipe.py').resolve()}" in text
    again = load([write("mine.yaml", text), "penalty=0.1"])
    assert again.config.penalty == 0.1 and again.file is not None
    assert load_config("my_recipe.py", "mine.yaml") == config
    tunesmith.config.run(config)
    assert capsys.readouterr().out == "penalty 0.9\n"
    with pytest.raises(UserError, match="did you mean `penalty`"):
        load_config("my_recipe.py", *NEEDED, "penalti=1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "needs a function main"),
        ("def main(config): pass", "say which config main takes"),
        ("def main(config: int): pass", "say which config main takes"),
    ],
)
def test_own_recipe_without_main(text, said):
    write("odd_recipe.py", text)
    with pytest.raises(UserError, match=said):
        load_config("odd_recipe.py")
    with pytest.raises(UserError, match="no such file"):
        load_config("absent_recipe.py")
