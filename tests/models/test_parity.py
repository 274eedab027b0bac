"""Logits and every gradient equal transformers'."""

import torch
import torch.nn.functional as F

from tests.models.conftest import pair, relative_error, tokens


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


def test_bfloat16_is_close(case):
    reference, model = pair(case, torch.bfloat16)
    ids = tokens(2, 40)
    exact = pair(case)[0](ids, use_cache=False).logits
    theirs, ours = (relative_error(one, exact) for one in (reference(ids, use_cache=False).logits, model.logits(ids)))
    assert ours < 1.5 * theirs + 1e-3
