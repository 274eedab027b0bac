"""Packed documents neither see each other nor share positions: they equal the same documents in rows of their own."""

import pytest
import torch

from tests.models.conftest import build_empty, config_json, make_reference, relative_error, take_weights, tokens
from tunesmith.models.decoder import segments

ROWS = [(11, 5, 20, -4), (17, 23)]
"""Lengths of the documents in each row; negative: padding."""


def packed_batch():
    ids, labels = tokens(2, 40), tokens(2, 40, seed=1)
    documents, positions = torch.empty(2, 40, dtype=torch.int32), torch.zeros(2, 40, dtype=torch.int64)
    for row, lengths in enumerate(ROWS):
        start = 0
        for number, length in enumerate(lengths):
            end = start + abs(length)
            documents[row, start:end] = number if length > 0 else -1
            positions[row, start:end] = torch.arange(end - start)
            if length < 0:
                labels[row, start:end] = -100
            start = end
    labels[1, :6] = -100
    return ids, labels, documents, positions


def documents_of(documents: torch.Tensor):
    for row in range(len(documents)):
        for number in documents[row].unique().tolist():
            if number >= 0:
                yield row, (documents[row] == number).nonzero().squeeze(-1)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("through", ["loop", "mask"])
def test_packed_equals_unpacked(case, through, monkeypatch):
    reference = make_reference(case)
    model = build_empty(config_json(reference))
    take_weights(model, reference.state_dict())
    model.init_buffers("cpu", max_seq_len=40)  # or frequencies that depend on the length would differ
    monkeypatch.setattr(model, "_is_compiled", lambda: through == "mask")
    ids, labels, documents, positions = packed_batch()

    hidden = model(ids, positions, documents)
    packed_loss = model.lm_head.cross_entropy(hidden, labels)
    packed_loss.backward()
    packed = gradients(model)

    total = torch.zeros(())
    for row, where in documents_of(documents):
        alone = model(ids[row, where][None])
        assert relative_error(hidden[row, where], alone[0]) < 1e-5
        total = total + model.lm_head.cross_entropy(alone, labels[row, where][None])
    total.backward()
    assert torch.allclose(total, packed_loss)
    errors = {name: relative_error(packed[name], gradient) for name, gradient in gradients(model).items()}
    assert max(errors.values()) < 1e-5, errors


def test_segments():
    documents = torch.tensor([[0, 0, 1, -1], [3, 3, 3, 3], [3, 4, -1, -1]])
    assert segments(documents) == [(2, False), (1, False), (1, True), (4, False), (1, False), (1, False), (2, True)]


def test_right_padding_changes_nothing():
    reference = make_reference("llama")
    model = build_empty(config_json(reference))
    take_weights(model, reference.state_dict())
    ids = tokens(2, 20)
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=ids.dtype)], 1)
    assert relative_error(model(padded)[:, :20], model(ids)) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf", "ignore::DeprecationWarning")
def test_compiled_layers_take_other_documents_without_compiling_anew():
    reference = make_reference("gemma3_text")
    plain, compiled = (build_empty(config_json(reference)) for _ in range(2))
    for model in (plain, compiled):
        take_weights(model, reference.state_dict())
    for layer in compiled.model.layers.values():
        layer.compile(fullgraph=True)
    ids, labels, documents, positions = packed_batch()
    others = (torch.arange(40) // 9).int().expand(2, 40).contiguous()
    for packs in (documents, others):
        for model in (plain, compiled):
            model.lm_head.cross_entropy(model(ids, positions, packs), labels).backward()
        expected = gradients(plain)
        assert all(relative_error(found, expected[name]) < 1e-5 for name, found in gradients(compiled).items())
        torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")
