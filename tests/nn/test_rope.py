"""Rotary positions beyond what parity with transformers already shows."""

import torch

from tunesmith.nn.config import RopeConfig
from tunesmith.nn.rope import Rotary, inverse_frequencies, rotate


def test_rotation_turns_pairs_by_position_times_frequency():
    rope = RopeConfig(theta=100.0)
    positions = torch.tensor([[0, 1, 5]])
    x = torch.randn(1, 3, 2, 8)
    cos, sin = Rotary(rope, 8)(positions)
    turned = rotate(x, cos, sin)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = positions[0, :, None] * torch.tensor([100.0 ** (-2 * i / 8) for i in range(4)])
    expected = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    assert torch.allclose(turned[..., :4], expected.real, atol=1e-6)
    assert torch.allclose(turned[..., 4:], expected.imag, atol=1e-6)


def test_scores_depend_on_distance_alone():
    rotary = Rotary(RopeConfig(), 16)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query: int, key: int) -> torch.Tensor:
        return (rotate(q, *rotary(torch.tensor([[query]]))) * rotate(k, *rotary(torch.tensor([[key]])))).sum()

    assert torch.allclose(score(7, 3), score(104, 100), atol=1e-4)


def test_rest_of_a_partly_rotated_head_is_left_alone():
    rotary = Rotary(RopeConfig(partial_rotary_factor=0.5), 16)
    x = torch.randn(2, 4, 3, 16)
    turned = rotate(x, *rotary(torch.arange(4)[None]))
    assert torch.equal(turned[..., 8:], x[..., 8:]) and not torch.allclose(turned[..., :8], x[..., :8])


def test_rotation_has_the_right_gradient():
    rotary = Rotary(RopeConfig(partial_rotary_factor=0.5), 8)
    cos, sin = (part.double() for part in rotary(torch.arange(3)[None]))
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)


def test_lengths_are_each_tokens_own():
    rope = RopeConfig(kind="dynamic", factor=4.0, max_position_embeddings=8)
    rotary, positions = Rotary(rope, 8), torch.arange(4)[None]
    lengths = [5, 20, 5, 30]
    each = rotary(positions, torch.tensor(lengths))
    for place, length in enumerate(lengths):
        assert torch.equal(each[0][0, place], rotary(positions, length)[0][0, place])
    assert torch.equal(rotary(positions, 8)[0], rotary(positions)[0])
    assert not torch.equal(rotary(positions, 9)[0], rotary(positions)[0])
    assert len({rotary.length_class(length) for length in (9, 10, 4, 8)}) == 3
    assert rotary.length_class(4) == rotary.length_class(8)


def test_frequencies_are_made_on_the_cpu_under_meta():
    with torch.device("meta"):
        assert inverse_frequencies(RopeConfig(), 8).device.type == "cpu"
