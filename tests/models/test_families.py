"""Finding families, reading config.json, named sizes."""

import json
import subprocess
import sys

import pytest
import torch

from tests.models.conftest import TINY
from tunesmith.errors import UserError
from tunesmith.models.decoder import build
from tunesmith.models.families import FAMILIES, all_families, find_family, model_config, named_sizes
from tunesmith.nn.head import Head
from tunesmith.nn.lora import adaptable_layers

KNOWN_SIZES = {
    "llama2/7B": 6_738_415_616,
    "llama2/70B": 68_976_648_192,
    "code_llama2/7B": 6_738_546_688,
    "code_llama2/34B": 33_743_970_304,
    "llama3/8B": 8_030_261_248,
    "llama3_1/405B": 405_853_388_800,
    "llama3_2/1B": 1_235_814_400,
    "llama3_2/3B": 3_212_749_824,
    "llama3_3/70B": 70_553_706_496,
    "smollm2/135M": 134_515_008,
    "smollm2/1.7B": 1_711_376_384,
    "mistral/7B": 7_241_732_096,
    "gemma/2B": 2_506_172_416,
    "gemma/7B": 8_537_680_896,
    "gemma2/2B": 2_614_341_888,
    "gemma2/9B": 9_241_705_984,
    "gemma2/27B": 27_227_128_320,
    "gemma3/270M": 268_098_176,
    "gemma3/1B": 999_885_952,
    "gemma3/4B": 3_880_263_168,
    "phi3/mini": 3_821_079_552,
    "phi4/14B": 14_659_507_200,
    "qwen2/0.5B": 494_032_768,
    "qwen2/7B": 7_615_616_512,
    "qwen2_5/3B": 3_085_938_688,
    "qwen2_5/72B": 72_706_203_648,
    "qwen3/0.6B": 596_049_920,
    "qwen3/8B": 8_190_735_360,
    "qwen3/32B": 32_762_123_264,
    "olmo2/1B": 1_484_916_736,
    "olmo2/32B": 32_234_279_936,
}
"""Parameters, as the Hub counts them."""

LLAMA = {key: value for key, value in TINY.items() if value is not None} | {"architectures": ["LlamaForCausalLM"]}


def read(hf: dict):
    return find_family(hf, "config.json").read_config(hf)


@pytest.mark.parametrize("name", KNOWN_SIZES)
def test_named_sizes_have_the_published_number_of_parameters(name):
    family, hf, _ = named_sizes()[name]
    with torch.device("meta"):
        model = build(hf, family, family.read_config(hf))
    assert sum(parameter.numel() for parameter in model.parameters()) == KNOWN_SIZES[name]


def test_every_named_size_is_complete():
    for name, (family, hf, repository) in named_sizes().items():
        assert find_family(hf, name) is family
        assert json.loads(json.dumps(hf)) == hf
        assert repository.count("/") == 1
        family.read_config(hf)


def test_named_sizes_are_configs_that_transformers_understands():
    from transformers import AutoConfig

    for name, (family, hf, _) in named_sizes().items():
        config = AutoConfig.for_model(**hf)
        ours = family.read_config(hf)
        for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "tie_word_embeddings"):
            assert getattr(config, key) == getattr(ours, key), (name, key)


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
def test_plans_name_modules_that_exist(family):
    hf = next(iter(family.sizes.values()))
    with torch.device("meta"):
        model = build(hf, family, family.read_config(hf))
    modules = {name for name, _ in model.named_modules()}
    for pattern in family.tp_plan:
        assert pattern.replace("*", "0") in modules, pattern
    linears = {name for name in modules if isinstance(model.get_submodule(name), torch.nn.Linear) and ".0." in name}
    assert linears <= {pattern.replace("*", "0") for pattern in family.tp_plan}


def test_unknown_architecture_names_the_known_ones():
    with pytest.raises(UserError) as error:
        find_family({"architectures": ["Qwen3ForCausalLm"]}, "folder/config.json")
    assert "folder/config.json" in str(error.value) and "did you mean Qwen3ForCausalLM?" in str(error.value)
    assert "LlamaForCausalLM" in str(error.value)
    with pytest.raises(UserError) as error:
        find_family({"architectures": ["FooForCausalLM"]}, "config.json")
    assert "FooForCausalLM is not among those known (" in str(error.value)
    with pytest.raises(UserError, match="names neither `architectures` nor a `model_type`"):
        find_family({}, "config.json")
    assert find_family({"model_type": "llama"}, "config.json").name == "llama"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(logits_scaling=8.0), "`logits_scaling` to 8.0, which is not understood"),
        (dict(attention_dropout=0.1), "`attention_dropout` to 0.1, which is not supported"),
        (dict(quantization_config={"bits": 4}), "`quantization_config`"),
        (dict(hidden_act="mish"), "unknown `hidden_act` 'mish'"),
        (dict(rope_scaling={"type": "su-per", "factor": 2.0}), "unknown rope type 'su-per'"),
        (dict(rope_scaling={"type": "linear"}), "needs `factor`"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0, "betas": 3}), "no `betas` that is understood"),
        (dict(num_key_value_heads=3), "must be a multiple of `num_key_value_heads`"),
        (dict(hidden_size=None), "has no `hidden_size`"),
    ],
)
def test_what_is_not_understood_is_refused(changes, message):
    with pytest.raises(UserError) as error:
        read({**LLAMA, **changes})
    assert message in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_size="64"), "`hidden_size` is '64', and must be a whole number above 0"),
        (dict(num_attention_heads=0), "`num_attention_heads` is 0, and must be a whole number above 0"),
        (dict(num_hidden_layers=-1), "`num_hidden_layers` is -1, and must be"),
        (dict(vocab_size="512"), "`vocab_size` is '512', and must be"),
        (dict(head_dim="8"), "`head_dim` is '8', and must be"),
        (dict(head_dim=7), "heads have 7 features (`head_dim`), and rotary positions need pairs of them"),
        (dict(head_dim=None, hidden_size=3), "heads have 0 features"),
        (dict(rope_theta="abc"), "`rope_theta` is 'abc', and must be a number above 0"),
        (dict(rope_parameters="x"), "`rope_parameters` is 'x', and must be an object"),
        (dict(rope_parameters={"rope_type": 5}), "`rope_type` is 5, and must be text"),
        (dict(rope_scaling={"type": "linear", "factor": "2"}), "`factor` is '2', and must be a number above 0"),
        (dict(rms_norm_eps=True), "`rms_norm_eps` is True, and must be a number, 0 or more"),
        (dict(tie_word_embeddings="no"), "`tie_word_embeddings` is 'no', and must be true or false"),
        (dict(eos_token_id=["</s>"]), "`eos_token_id` is ['</s>'], and must be a whole number or a list of them"),
        (dict(architectures="LlamaForCausalLM"), "`architectures` is 'LlamaForCausalLM', and must be a list of names"),
        (dict(architectures=None, model_type=7), "`model_type` is 7, and must be text"),
        (dict(architectures=["Qwen2ForCausalLM"], layer_types=["full_attention"]), "names 1 layers of 2"),
        (
            dict(partial_rotary_factor=0.5, rope_scaling={"type": "linear", "factor": 2.0}),
            "with the rope type 'linear'",
        ),
    ],
)
def test_wrong_kinds_of_values_are_told(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    with pytest.raises(UserError) as error:
        model_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json: ") and message in str(error.value)


def test_every_key_survives_every_kind_of_value(tmp_path):
    """Whatever stands in a config.json, it is read or told in one sentence."""
    odd = [None, 5, 0, -1, 1.5, True, "", "x", [], [1], ["x"], {}, {"a": 1}, {"rope_type": []}, [[]]]
    for name, (_family, hf, _) in named_sizes().items():
        if name.split("/")[0] in {"llama3_2", "mistral", "qwen2", "gemma2", "gemma3", "phi3", "olmo2"}:
            for key in {*hf, "rope_parameters", "rope_scaling", "layer_types", "text_config", "head_dim"}:
                for value in odd:
                    (tmp_path / "config.json").write_text(json.dumps({**hf, key: value}))
                    try:
                        model_config(tmp_path)
                    except UserError as error:
                        assert str(error).count(str(tmp_path)) == 1


def test_what_does_nothing_is_ignored():
    more = dict(attention_dropout=0.0, use_cache=True, torch_dtype="bfloat16", rope_interleaved=False, new_thing=None)
    assert read({**LLAMA, **more, "_private": 1}) == read(LLAMA)


def test_rope_in_both_spellings():
    for kind in (
        dict(rope_type="linear", factor=2.0),
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    ):
        old = read({**LLAMA, "rope_theta": 5e5, "rope_scaling": kind})
        new = read({**LLAMA, "rope_parameters": {**kind, "rope_theta": 5e5}})
        assert old == new and old.rope.theta == 5e5 and old.rope.kind == kind["rope_type"]
    assert read({**LLAMA, "rope_theta": 7.0}).rope.theta == 7.0


def test_windows():
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert read(mistral).layer_windows == (4096, 4096)
    assert read({**mistral, "sliding_window": None}).layer_windows == (None, None)
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 1}
    assert read(qwen).layer_windows == (None, None)
    assert read({**qwen, "use_sliding_window": True}).layer_windows == (None, 8)
    gemma = {**LLAMA, "architectures": ["Gemma2ForCausalLM"], "sliding_window": 8}
    assert read(gemma).layer_windows == (8, None)
    with pytest.raises(UserError, match="unknown entry 'chunked_attention' in `layer_types`"):
        read({**gemma, "layer_types": ["chunked_attention", "full_attention"]})


def test_model_config_names_the_file(tmp_path):
    pytest.importorskip("tunesmith.hub")
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "hidden_act": "mish"}))
    with pytest.raises(UserError) as error:
        model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value) and "unknown `hidden_act`" in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    hf, family, config = model_config(tmp_path)
    assert (hf, family.name, config.hidden_size) == (LLAMA, "llama", 64)


def test_records_import_no_torch():
    code = "import sys, tunesmith.models.families as f; f.named_sizes(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [family.name for family in all_families()] == list(FAMILIES)


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
def test_layers_are_known_by_name_without_the_model(family):
    hf = next(iter(family.sizes.values()))
    with torch.device("meta"):
        found = adaptable_layers(build(hf, family, family.read_config(hf)))
    names, heads = family.adaptable_layers(family.read_config(hf).num_hidden_layers)
    assert sorted(names) == sorted(found)
    assert heads == [name for name, module in found.items() if isinstance(module, Head)]
