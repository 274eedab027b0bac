"""Logits and every gradient equal transformers'."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.conftest import config_json, pair, relative_error, tokens


def test_logits_and_every_gradient(case):
    reference, model = pair(case)
    ids, labels = tokens(2, 40), tokens(2, 40, seed=1)
    labels[0, :9] = -100
    theirs = reference(ids, use_cache=False).logits
    F.cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    assert relative_error(model.logits(ids), theirs) < 1e-5
    model.lm_head.cross_entropy(model(ids), labels, chunk_size=16).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = dict(reference.named_parameters())
    assert gradients.keys() == expected.keys()
    errors = {name: relative_error(gradients[name], expected[name].grad) for name in expected}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3"]
)
def test_partial_rotary_factor_means_what_transformers_makes_of_it(kind):
    """Only Phi-3 rotates a part of each head; the others pass over the key."""
    head_dim = None if kind == "phi3" else 16
    reference, model = pair(kind, partial_rotary_factor=0.5, head_dim=head_dim)
    assert "partial_rotary_factor" in str(config_json(reference))
    ids = tokens(2, 40)
    assert relative_error(model.logits(ids), reference(ids, use_cache=False).logits) < 1e-5
    whole = pair(kind, head_dim=head_dim)[0](ids, use_cache=False).logits
    assert (relative_error(model.logits(ids), whole) < 1e-5) == (kind != "phi3")


def test_bfloat16_is_close(case):
    reference, model = pair(case, torch.bfloat16)
    ids = tokens(2, 40)
    exact = pair(case)[0](ids, use_cache=False).logits
    theirs, ours = (relative_error(one, exact) for one in (reference(ids, use_cache=False).logits, model.logits(ids)))
    assert ours < 1.5 * theirs + 1e-3
