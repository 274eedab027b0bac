"""Quantized repositories of every family: what transformers reads from them, through torchao, is what we do."""

import logging
from itertools import product

import pytest
import torch
from torch import nn

import tunesmith
from tests.models.conftest import make_reference
from tunesmith.models.families import model_config
from tunesmith.nn.fake_quantize import apply_fake_quantization
from tunesmith.nn.quantize import NF4Linear
from tunesmith.nn.quantized import QuantizedLinear
from tunesmith.nn.rounding import rounded
from tunesmith.nn.scheme import KINDS, TRAINED, Scheme
from tunesmith.training.convert import quantize_repository

FAMILIES = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 olmo2".split()

SOME = [(case, "int4_weight_only") for case in ("llama mqa tied", "gemma3_text", "phi3")]
SOME += [("llama mha biased", kind) for kind in KINDS if KINDS[kind].groups != "always"]
ALL = [case for case in product([*FAMILIES, "llama mha biased", "llama mqa tied"], KINDS) if case not in SOME]
QUIET = ("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


def random_ids():
    return torch.randint(3, 101, (2, 12), generator=torch.Generator().manual_seed(0))


def their_logits(model):
    """Of a model of transformers, as in training: bitsandbytes rounds scales to bf16 once more for generation on some CPUs."""
    return model.train()(random_ids()).logits


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize(("case", "kind"), [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)])
def test_transformers_reads_what_we_do(tmp_path, case, kind):
    logging.getLogger("torchao").setLevel(logging.ERROR)
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchao")
    width = {"intermediate_size": 128} if kind == "nf4" else {}
    make_reference(case, **width).save_pretrained(tmp_path / "model")
    pytest.importorskip("bitsandbytes")
    scheme = Scheme(kind)
    quantize_repository(tmp_path / "model", tmp_path / "quantized", scheme)
    ours = tunesmith.load_model(tmp_path / "quantized")
    linear = [module for module in ours.modules() if isinstance(module, nn.Linear)]
    assert linear and all(isinstance(module, (QuantizedLinear, NF4Linear)) for module in linear)
    with torch.no_grad():
        found = ours.logits(random_ids())
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", attn_implementation="eager")
        assert type(theirs.get_output_embeddings().weight) is nn.Parameter
        expected = their_logits(theirs)
        trained = tunesmith.load_model(tmp_path / "model")
        with rounded(trained, scheme):
            errors = [(one - found).norm() / found.norm() for one in (expected, trained.logits(random_ids()))]
        if kind in TRAINED.values():
            apply_fake_quantization(trained, scheme)
            errors.append((trained.logits(random_ids()) - found).norm() / found.norm())
    assert max(errors) < (2e-2 if scheme.rounds_inputs else 1e-5)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_family_tells_the_inputs_of_its_linear_layers(tmp_path, case):
    make_reference(case, head_dim=None if case in ("mistral", "phi3") else 32).save_pretrained(tmp_path)
    _, family, shape = model_config(tmp_path)
    told = family.linear_inputs(shape)
    layers = {
        name: module for name, module in tunesmith.load_model(tmp_path).named_modules() if isinstance(module, nn.Linear)
    }
    assert {name.replace("*", "0"): inputs for name, (inputs, _) in told.items()} == {
        name: module.in_features for name, module in layers.items() if ".0." in name
    }
    assert {name.rpartition(".")[2] for name, (_, is_cut) in told.items() if is_cut} == {"o_proj", "down_proj"}


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize(
    "case", [*list(KINDS)[:5], "int8 in groups", "nf4", "nf4, scales quantized", "nf4 in bf16 bytes"]
)
def test_we_read_what_transformers_wrote(tmp_path, case):
    """With torchao's and bitsandbytes' own defaults, which map weights to levels in other ways."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    transformers, torchao = pytest.importorskip("transformers"), pytest.importorskip("torchao.quantization")
    pytest.importorskip("bitsandbytes")
    make_reference("llama", intermediate_size=320).save_pretrained(tmp_path / "model")
    group, four = torchao.PerGroup(32), {"weight_dtype": torch.int4}
    config = {
        "int8_weight_only": lambda: torchao.Int8WeightOnlyConfig(),
        "int8 in groups": lambda: torchao.Int8WeightOnlyConfig(granularity=group),
        "int8_dynamic": lambda: torchao.Int8DynamicActivationInt8WeightConfig(),
        "int4_weight_only": lambda: torchao.IntxWeightOnlyConfig(**four, granularity=group),
        "int8_dynamic_int4": lambda: torchao.Int8DynamicActivationIntxWeightConfig(**four, weight_granularity=group),
        "float8_weight_only": lambda: torchao.Float8WeightOnlyConfig(),
        "nf4": lambda: {},
        "nf4, scales quantized": lambda: {"bnb_4bit_use_double_quant": True},
        "nf4 in bf16 bytes": lambda: {"bnb_4bit_quant_storage": "bfloat16", "bnb_4bit_use_double_quant": True},
    }[case]()
    how = (
        transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **config)
        if isinstance(config, dict)
        else transformers.TorchAoConfig(config)
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=how)
    theirs.save_pretrained(tmp_path / "quantized")
    ours = tunesmith.load_model(tmp_path / "quantized")
    assert sum(isinstance(module, (QuantizedLinear, NF4Linear)) for module in ours.modules()) == 14
    with torch.no_grad():
        found, expected = ours.logits(random_ids()), their_logits(theirs)
        plain = tunesmith.load_model(tmp_path / "model").logits(random_ids())
    assert (found - expected).norm() < (3e-2 if "dynamic" in case else 1e-5) * expected.norm()
    assert (plain - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("kind", ["int8_weight_only", "nf4"])
def test_models_that_score(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    config = make_reference("qwen3", intermediate_size=128).config
    config.num_labels, config.pad_token_id = 3, 0
    reference = transformers.AutoModelForSequenceClassification.from_config(config)
    reference.save_pretrained(tmp_path / "model")
    quantize_repository(tmp_path / "model", tmp_path / "quantized", Scheme(kind))
    ours = tunesmith.load_model(tmp_path / "quantized")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "quantized")
    with torch.no_grad():
        expected, found = their_logits(theirs), ours.logits(random_ids())[:, -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (reference(random_ids()).logits - expected).abs().max() > 1e-5
