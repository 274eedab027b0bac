"""The bookkeeping of a cache; what comes out of it is tested with the models."""

import pytest
import torch

from tunesmith.nn.config import DecoderConfig
from tunesmith.nn.kv_cache import KVCache

CONFIG = DecoderConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)


def test_rows_of_equal_length_are_written_behind_each_other():
    cache = KVCache(CONFIG, 2, 6)
    first, second = torch.randn(2, 3, 1, 4), torch.randn(2, 1, 1, 4)
    for new in (first, second):
        cache.write(0, new, -new, None)
        cache.advance(new.shape[1], None)
    keys, values = cache.read(0, 0, 4)
    assert torch.equal(keys, torch.cat([first, second], 1).transpose(1, 2)) and torch.equal(values, -keys)
    assert cache.uniform and cache.end == 4 and cache.length.tolist() == [4, 4]


def test_ragged_rows_and_padding():
    cache = KVCache(CONFIG, 2, 6)
    new = torch.randn(2, 2, 1, 4)
    cache.write(0, new, new, torch.tensor([[3, 4], [1, cache.max_length]]))
    keys = cache.keys[0][:, 0]
    assert torch.equal(keys[0, 3:5], new[0, :, 0]) and torch.equal(keys[1, 1], new[1, 0, 0])
    assert (keys[0, :3] == 0).all() and (keys[1, 2:6] == 0).all()


def test_a_part_lies_in_the_memory_of_the_whole():
    cache = KVCache(CONFIG, 3, 6)
    new = torch.randn(2, 4, 1, 4)
    part = cache.part(slice(1, 3))
    part.write(0, new, -new, None)
    part.advance(4, None)
    assert part.length.tolist() == [4, 4] and cache.length.tolist() == [0, 0, 0]
    cache.length = torch.tensor([0, 4, 4])
    keys, values = cache.read(0, 0, cache.end)
    assert torch.equal(keys[1:], new.transpose(1, 2)) and torch.equal(values, -keys) and not keys[0].any()


def test_lengths():
    cache = KVCache(CONFIG, 3, 6)
    cache.advance(4, None)
    cache.length = torch.tensor([4, 2, 4])
    assert not cache.uniform and cache.end == 4
    cache.select(torch.tensor([0, 2]))
    assert cache.uniform and cache.length.tolist() == [4, 4] and len(cache.keys[0]) == 2
    cache.length = 1
    assert cache.uniform and cache.end == 1
    with pytest.raises(ValueError, match="a cache of 6 tokens"):
        cache.end_after(6)
