"""Reward models and classifiers of every family: scores and every gradient equal transformers', and each reads what the other wrote."""

import json

import pytest
import torch
import torch.nn.functional as F

import tunesmith
from tests.models.conftest import CASES, TINY, config_json, relative_error, take_weights, tokens
from tests.models.conftest import build_empty as empty
from tunesmith.models.score import ScoreModel, last_tokens

KINDS = ("llama", "llama mqa tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2")
WITHOUT_TOKENS = ("gemma3_text", "olmo2")
"""Families for which transformers has no classifier of tokens."""


def reference_of(case: str, per_token: bool = False, num_labels: int = 1, **more):
    """transformers' classifier with random weights."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

    kwargs = {**TINY, **CASES[case], "pad_token_id": 0, "num_labels": num_labels, "classifier_dropout": 0.0, **more}
    kwargs = {key: value for key, value in kwargs.items() if not (key == "head_dim" and value is None)}
    config = AutoConfig.for_model(case.split()[0], **kwargs)
    kind = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    torch.manual_seed(0)
    reference = kind.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return reference


def pair_of(case: str, per_token: bool = False, num_labels: int = 1):
    reference = reference_of(case, per_token, num_labels)
    model = empty(config_json(reference))
    take_weights(model, reference.state_dict())
    return reference, model


CLASSIFIERS = [
    *((case, False, 1 + 2 * (number % 2)) for number, case in enumerate(KINDS)),
    *((case, True, 2) for case in KINDS if case not in WITHOUT_TOKENS),
]


@pytest.mark.parametrize(("case", "per_token", "num_labels"), CLASSIFIERS)
def test_scores_and_every_gradient(case, per_token, num_labels):
    reference, model = pair_of(case, per_token, num_labels)
    ids = tokens(3, 24)
    ids[1, 17:] = 0  # padding
    theirs = reference(ids, use_cache=False).logits
    assert theirs.shape == ((3, 24, 2) if per_token else (3, num_labels))
    weights = torch.randn(theirs.shape)
    if per_token:  # transformers gives the row of a padding token no gradient
        weights[ids == 0] = 0
    (theirs * weights).sum().backward()
    labels = torch.full_like(ids, 0 if per_token else -100)
    if not per_token:
        labels[torch.arange(3), last_tokens(ids, None, 0).squeeze(1)] = 0
    found = model.head.scores(model(ids), labels)
    assert relative_error(model.scores(ids), theirs) < 1e-5
    ours = found if per_token else found.sum(1)
    (ours * weights).sum().backward()
    expected = dict(reference.named_parameters())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    errors = {name: relative_error(gradients[name], expected[name].grad) for name in expected}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(("case", "per_token", "num_labels"), CLASSIFIERS)
def test_each_reads_what_the_other_wrote(case, per_token, num_labels, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    reference, ids = reference_of(case, per_token, num_labels), tokens(3, 24)
    ids[1, 17:] = 0
    expected = reference(ids, use_cache=False).logits
    reference.save_pretrained(tmp_path / "theirs")
    model = tunesmith.load_model(tmp_path / "theirs")
    assert isinstance(model, ScoreModel) and model.num_outputs == expected.shape[-1]
    assert relative_error(model.scores(ids), expected) < 1e-5
    tunesmith.save_model(model, tmp_path / "ours")
    kind = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    again, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert relative_error(again(ids, use_cache=False).logits, expected) < 1e-5
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [type(reference).__name__]


def test_documents_of_a_row_are_scored_as_if_alone():
    _, model = pair_of("qwen3", False, 3)
    ids, documents = tokens(2, 24), torch.full((2, 24), -1)
    documents[0, :10], documents[0, 10:24], documents[1, :7] = 0, 1, 0
    ids[0, 9] = 0  # what looks like padding is not where a text ends
    with torch.no_grad():
        packed = model.scores(ids, documents)
        assert packed.shape == (2, 2, 3)
        for row, document, begin, end in ((0, 0, 0, 10), (0, 1, 10, 24), (1, 0, 0, 7)):
            alone = model.scores(ids[row : row + 1, begin:end])[0]
            torch.testing.assert_close(packed[row, document], alone, atol=1e-5, rtol=1e-5)


def test_a_classifier_of_tokens_scores_each():
    _, model = pair_of("llama", True, 2)
    ids = tokens(2, 9)
    assert model.scores(ids).shape == (2, 9, 2)
    assert model.scores(ids).dtype == model.bfloat16().scores(ids).dtype == torch.float32


def test_a_batch_without_labels_has_a_gradient():
    _, model = pair_of("llama")
    hidden = torch.randn(2, 5, 64, requires_grad=True)
    scores = model.head.scores(hidden, torch.full((2, 5), -100))
    F.logsigmoid(scores).sum().mul(0).backward()
    assert (model.head.weight.grad == 0).all() and (hidden.grad == 0).all()
