"""Weights from scratch."""

import torch

from tests.models.conftest import build_empty, config_json, make_reference
from tunesmith.models import families
from tunesmith.models.initialize import initialize, initialize_parameter


def test_every_parameter_is_drawn_by_its_own_name(case):
    model = build_empty(config_json(make_reference(case)))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    initialize(model, seed=3)
    spread = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (0.0 if model.config.norm == "unit_offset" else 1.0)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.std().item() / spread - 1) < 0.1 and abs(parameter.mean().item()) < spread / 10, name
    first = model.model.layers["0"].mlp.down_proj.weight
    assert not torch.equal(first, model.model.layers["1"].mlp.down_proj.weight)
    again = torch.empty_like(first)
    initialize_parameter(model, "model.layers.0.mlp.down_proj.weight", again, seed=3)
    assert torch.equal(first, again)
    initialize_parameter(model, "model.layers.0.mlp.down_proj.weight", again, seed=4)
    assert not torch.equal(first, again)


def test_weights_start_as_in_transformers(case):
    """Each parameter by itself: so a depth-scaled start of some of them would show."""
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = config_json(make_reference(case))
    model = build_empty(hf)
    initialize(model, seed=0)
    fresh = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{key: value for key, value in hf.items() if key != "architectures"})
    )
    ours = dict(model.named_parameters())
    for name, parameter in fresh.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(ours[name], parameter), name
        else:
            assert abs(ours[name].std() / parameter.std() - 1) < 0.1, name


def test_named_sizes_start_with_the_spread_that_transformers_reads():
    from transformers import AutoConfig

    for name, (family, hf, _) in families.named_sizes().items():
        theirs = AutoConfig.for_model(**{key: value for key, value in hf.items() if key != "architectures"})
        spread = theirs.get_text_config().initializer_range
        assert family.read_config(family.text_config(hf)).initializer_range == spread, name
