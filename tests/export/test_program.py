"""A program before it is traced: in calls of any size it computes what the model does, for every kind of model."""

import pytest
import torch

from tests.models.conftest import CASES, pair, relative_error, tokens
from tunesmith.export.onnx import PassingProgram
from tunesmith.export.program import Program


@pytest.fixture(params=CASES)
def model(request):
    model = pair(request.param)[1].requires_grad_(False).eval()
    model.init_buffers("cpu", 40)
    return model


PIECES = [(0, 7), (7, 8), (8, 9), (9, 14), *((n, n + 1) for n in range(14, 30))]


def expected(model, ids):
    return model.head.logits(model(ids))


@pytest.mark.parametrize("plain_arithmetic", [False, True])
def test_program_in_pieces_equals_the_model(model, plain_arithmetic):
    program, ids = Program(model, 40, all_logits=True, plain_arithmetic=plain_arithmetic), tokens(1, 30)
    for _ in range(2):  # the second sequence finds the slots of the first
        parts = [program(ids[:, start:stop], torch.tensor([start])) for start, stop in PIECES]
        assert relative_error(torch.cat(parts, 1), expected(model, ids)) < 2e-6


def test_only_the_last_logits(model):
    program, ids = Program(model, 40), tokens(1, 9)
    logits = program(ids, torch.tensor([0]))
    assert logits.shape == (1, model.config.vocab_size)
    assert relative_error(logits, expected(model, ids)[:, -1]) < 2e-6


def test_the_model_is_left_as_it_is(model):
    names, ids = [name for name, _ in model.named_parameters()], tokens(1, 9)
    before = expected(model, ids)
    program = Program(model, 40)
    program(ids, torch.tensor([0]))
    assert names == [name for name, _ in model.named_parameters()] and not dict(model.named_buffers())
    torch.testing.assert_close(expected(model, ids), before, rtol=0, atol=0)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in program.parameters()} == shared


def test_passed_keys_and_values_with_padding(model):
    """Rows of different lengths, padded at the left, as Optimum and transformers do."""
    program, ids = PassingProgram(model, 40), tokens(2, 30)
    ids[1, :5] = 0
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    shape = (2, model.config.num_key_value_heads, 0, model.config.head_dim)
    past = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.config.num_hidden_layers)]
    parts = []
    for start, stop in PIECES:
        logits, past = program(ids[:, start:stop], mask[:, :stop], positions[:, start:stop], past)
        parts.append(logits)
    logits = torch.cat(parts, 1)
    assert relative_error(logits[:1], expected(model, ids[:1])) < 2e-6
    assert relative_error(logits[1:, 5:], expected(model, ids[1:, 5:])) < 2e-6
