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
from tunesmith.nn.int4 import Int4Linear
from tunesmith.nn.scheme import INTEGER_TYPES, Scheme
from tunesmith.training.convert import quantize_repository

FAMILIES = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 olmo2".split()

SOME = [(case, "int4_weight_only") for case in ("llama mqa tied", "gemma3_text", "phi3")]
ALL = [case for case in product([*FAMILIES, "llama mha biased", "llama mqa tied"], INTEGER_TYPES) if case not in SOME]


def random_ids():
    return torch.randint(3, 101, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("case", "kind"), [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)])
def test_transformers_reads_what_we_do(tmp_path, case, kind):
    logging.getLogger("torchao").setLevel(logging.ERROR)
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchao")
    make_reference(case).save_pretrained(tmp_path / "model")
    scheme = Scheme(kind, 32)
    quantize_repository(tmp_path / "model", tmp_path / "quantized", scheme)
    ours = tunesmith.load_model(tmp_path / "quantized")
    linear = [module for module in ours.modules() if isinstance(module, nn.Linear)]
    assert linear and all(isinstance(module, Int4Linear) for module in linear)
    with torch.no_grad():
        found = ours.logits(random_ids())
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", attn_implementation="eager")
        assert type(theirs.get_output_embeddings().weight) is nn.Parameter
        expected = theirs(random_ids()).logits
        trained = tunesmith.load_model(tmp_path / "model")
        apply_fake_quantization(trained, scheme)
        errors = [(one - found).norm() / found.norm() for one in (expected, trained.logits(random_ids()))]
    assert max(errors) < (1e-5 if kind == "int4_weight_only" else 2e-2)


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", INTEGER_TYPES)
def test_we_read_what_transformers_wrote(tmp_path, kind):
    """With torchao's own defaults, which map weights to levels in another way."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    transformers, torchao = pytest.importorskip("transformers"), pytest.importorskip("torchao.quantization")
    make_reference("llama").save_pretrained(tmp_path / "model")
    group = torchao.PerGroup(32)
    if kind == "int4_weight_only":
        config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)
    else:
        config = torchao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=group)
    how = transformers.TorchAoConfig(config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=how)
    theirs.save_pretrained(tmp_path / "quantized")
    ours = tunesmith.load_model(tmp_path / "quantized")
    assert sum(isinstance(module, Int4Linear) for module in ours.modules()) == 14
    with torch.no_grad():
        found, expected = ours.logits(random_ids()), theirs(random_ids()).logits
    assert (found - expected).norm() < 1e-2 * expected.norm()
