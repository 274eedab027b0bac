"""What dump writes reads back to the same config; the JSON Schema accepts it and says what a schema should."""

import functools
import itertools
import json
import random
import string
import tempfile
from pathlib import Path

import jsonschema
import pytest
import yaml

from tunesmith.config import dump, json_schema, load, load_config
from tunesmith.configs import _schema as schema
from tunesmith.configs._write import flow
from tunesmith.configs.recipes import RECIPES, overlay_path, overlays

FILLED = {
    "sft": ["model=some/model", "dataset.source=chats.jsonl"],
    "pretrain": ["model=llama3_2/1B", "dataset.source=wikitext"],
    "generate": ["model=some/model"],
    "export": ["model=some/model", "output_dir=out"],
}
LAYERS = [(name, *words) for name, words in FILLED.items()]
LAYERS += [
    ("sft", *FILLED["sft"], *(f"+{name}" for name in names))
    for n in (1, 2)
    for names in itertools.combinations(overlays(), n)
    if not ("qat" in names and {"qlora", "qdora"} & {*names})  # a pair that is refused
]
LAYERS += [
    (
        "sft",
        "model=m",
        "dataset.0.source=a",
        "dataset.1.source=b",
        "dataset_val.source=c",
        "dataset_val.column_map={a: b}",
    ),
    (
        "sft",
        *FILLED["sft"],
        "optimizer.type=a.b.C",
        "optimizer.x=[1, {y: 2.5}]",
        "metric_logger.type=wandb",
        "lr_scheduler.type=wsd",
    ),
    (
        "sft",
        *FILLED["sft"],
        "~lr_scheduler.warmup_ratio",
        "clip_grad_norm=null",
        "enable_activation_checkpointing=true",
        "ac_mode=selective",
        "ac_option=op",
    ),
    ("generate", "model=m", "prompt.user=hi", "stop=['\\n', '${x', ' ']"),
    ("generate", "model=m", "prompt=[a, 'b: c']"),
    ("lora_finetune_single_device", "--config", "llama3_1/8B_qlora_single_device"),
]


@pytest.mark.parametrize("words", LAYERS, ids=" ".join)
def test_dump_reads_back(words, tmp_path):
    config = load_config(*words)
    file = tmp_path / "config.yaml"
    file.write_text(dump(config, header="one\ntwo"), encoding="utf-8")
    again = load_config(file)
    assert again == config and dump(again) == dump(config)
    file.write_text(dump(config, sort=True), encoding="utf-8")
    assert load_config(file) == config


@functools.cache
def validator(recipe: str) -> jsonschema.Draft202012Validator:
    made = json_schema(recipe)
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


@pytest.mark.parametrize("words", [words for words in LAYERS if " ".join(words).count("+") < 2], ids=" ".join)
def test_schema_accepts_what_we_write(words):
    loaded = load(list(words))
    validator(loaded.recipe.name).validate({"recipe": loaded.recipe.name} | schema.plain(loaded.config))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batchsize": 1},
        {"dtype": "bf61"},
        {"optimizer": {"type": "sgd", "eps": 1}},
        {"epochs": "many"},
        {"recipe": "ppo"},
        {"dataset": {}},
    ],
    ids=str,
)
def test_schema_refuses(wrong):
    right = {"recipe": "sft"} | schema.plain(load_config("sft", *FILLED["sft"]))
    validator("sft").validate(right)
    assert not validator("sft").is_valid(right | wrong)


def test_schema_takes_layers_that_others_complete():
    """A file without `recipe` can't be run by itself, so it need not be complete."""
    for name, recipe in RECIPES.items():
        layer = yaml.safe_load(recipe.defaults.read_text(encoding="utf-8")) or {}
        validator(name).validate(layer)
        assert not validator(name).is_valid(layer | {"recipe": name})
    for name in overlays():
        validator("sft").validate(yaml.safe_load(overlay_path(name).read_text(encoding="utf-8")))


def test_schema_takes_references_and_explains():
    made = json_schema("sft")
    right = schema.plain(load_config("sft", *FILLED["sft"]))
    validator("sft").validate(
        right | {"batch_size_val": "${batch_size}", "optimizer": {"type": "x.y.Z", "whatever": 1}}
    )
    assert all("description" in entry for entry in made["properties"].values())
    assert json.loads(json.dumps(made)) == made


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_has_a_sentence(recipe):
    def walk(cls):
        for name, hint in schema.hints(cls).items():
            assert schema.sentences(cls).get(name), f"{cls.__name__}.{name}"
            for member in schema.members(hint):
                if schema.is_section(member):
                    walk(member)

    walk(RECIPES[recipe].config_class)
    text = dump(load([recipe], partial=True).config)
    assert all("#" in line for line in text.splitlines() if line and not line.startswith("#"))


def test_any_text_survives():
    rng = random.Random(0)
    odd = [*string.printable, "é", "\u0085", "\u2028", "\U0001f600", "\x7f", "${", "$${", "- ", ": ", " #"]
    texts = ["".join(rng.choices(odd, k=rng.randrange(6))) for _ in range(300)]
    texts += "true null ~ 1e3 1_000 .5 0x1 on 2024-01-01 1:30 = << - ? ! & * @ ` % | > {a} [b] a:".split() + [
        "",
        " ",
        "a ",
        " a",
    ]
    config = load_config("sft", *FILLED["sft"])
    config.sample_prompts = texts
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(dump(config), encoding="utf-8", newline="")
        assert load_config(file).sample_prompts == texts


@pytest.mark.parametrize(
    "value", [1e-5, 3e-4, 0.1, 1e22, 1.0, -2.5e-7, 123456789.125, 5, True, None, [1, [2.0, "x"]], {"a": {"b": 1e-9}}]
)
def test_other_readers_read_the_same(value):
    assert yaml.safe_load(flow(value)) == value
