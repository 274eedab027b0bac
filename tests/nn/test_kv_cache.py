"""Blocks, and attention to them: the definition, for every mix of steps and chunks; what comes out of models is tested with them."""

import pytest
import torch

from tunesmith.nn.cached_attention import attend_cached
from tunesmith.nn.config import DecoderConfig
from tunesmith.nn.kv_cache import BlockPool, Chunk, KVCache, Pass, Rows, Steps, blocks_of, groups_of

K = 4


def config(heads=2):
    return DecoderConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=heads,
        head_dim=K,
    )


def plain(q, keys, values, scale, window, softcap):
    """q (T, H, K): the last T tokens of a sequence with keys and values (S, G, K), straight from the definition."""
    out = torch.zeros_like(q)
    for t in range(len(q)):
        place = len(keys) - len(q) + t
        seen = slice(0 if window is None else max(0, place - window + 1), place + 1)
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // keys.shape[1])
            scores = keys[seen, group] @ q[t, head] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[t, head] = scores.softmax(0) @ values[seen, group]
    return out


def fill(pool, table, keys, values):
    """Put a sequence's keys and values (S, G, K) into its blocks."""
    places = torch.arange(len(keys))
    slots = pool.slots(torch.tensor(table)[places // pool.block_size], places % pool.block_size)
    pool.write(0, keys, values, slots)


@pytest.mark.parametrize("window", [None, 3, 7])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("ways", [groups_of, blocks_of], ids=["by block", "by row"])
@pytest.mark.parametrize(
    "tables, low",
    [
        ([[0, 1], [2], [3, 4, 5]], None),  # neighbours
        ([[7, 1], [30], [3, 12, 5]], None),  # far apart
        ([[20, 21, 0], [20, 21, 1], [20, 2], [20, 21, 3], [20, 4]], 16),  # shared, at the other end
        ([[4, 5, 0], [4, 6, 1], [9, 3, 2]], None),  # shared by some, in between
        ([[3, 4, 5]], None),  # one alone, in neighbours
        ([[3, 30, 12]], None),  # one alone, far apart
    ],
)
def test_steps_and_chunks_are_the_definition(window, softcap, heads, tokens, ways, tables, low):
    generator = torch.Generator().manual_seed(len(tables) + tokens)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    pool = BlockPool(config(heads), 40, block_size=4)
    contents = {block: (drawn(4, heads, K), drawn(4, heads, K)) for table in tables for block in table}
    sequences = []
    for row, table in enumerate(tables):
        keys, values = (torch.cat([contents[block][part] for block in table]) for part in (0, 1))
        own = sum(block in other for other in tables for block in table[-1:]) == 1
        length = len(keys) - (row % 3 if own else 0)
        sequences.append((keys[:length], values[:length]))
        fill(pool, table, keys, values)
    # A chunk after a past, one without, and one token of padding at the end.
    past = (drawn(9, heads, K), drawn(9, heads, K))
    pool_tables = [*tables, [36, 37, 38], [39, 35]]
    fill(pool, pool_tables[-2], *past)
    fresh = (drawn(6, heads, K), drawn(6, heads, K))
    ends = [len(keys) for keys, _ in sequences]
    positions = torch.tensor([[end - tokens + t for t in range(tokens)] for end in ends])
    line = tokens * len(tables)
    q = drawn(line + 4 + 6 + 1, 4, K)
    places = torch.cat([positions.flatten(), torch.arange(5, 9), torch.arange(6), torch.tensor([-1])])
    owners = [row for row in range(len(tables)) for _ in range(tokens)] + [len(tables)] * 4 + [len(tables) + 1] * 6
    blocks = [pool_tables[row][place // 4] for row, place in zip(owners, places.tolist())] + [pool.nowhere]
    k, v = (
        torch.cat([*(one[part][-tokens:] for one in sequences), past[part][5:], fresh[part], drawn(1, heads, K)])
        for part in (0, 1)
    )
    made = Pass(
        pool,
        places[None],
        pool.slots(torch.tensor(blocks), places.clamp(min=0) % 4),
        None,
        [
            Steps(0, line, len(tables), tokens, ways(tables, pool, low), positions, 4),
            Chunk(line, line + 4, 5, torch.tensor(pool_tables[-2])),
            Chunk(line + 4, line + 10, 0, torch.tensor(pool_tables[-1])),
        ],
    )
    found = attend_cached(q, k, v, made, 0, window, 0.4, softcap)
    for row, (keys, values) in enumerate(sequences):
        mine = slice(row * tokens, (row + 1) * tokens)
        assert torch.allclose(found[mine], plain(q[mine], keys, values, 0.4, window, softcap), atol=1e-5)
    for mine, (keys, values) in ((slice(line, line + 4), past), (slice(line + 4, line + 10), fresh)):
        assert torch.allclose(found[mine], plain(q[mine], keys, values, 0.4, window, softcap), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("past", [0, 1, 70])
@pytest.mark.parametrize("length", [63, 64, 65, 130])
def test_chunks_of_several_pieces_are_the_definition(length, past, dtype):
    generator = torch.Generator().manual_seed(length + past)
    q, keys, values = (
        torch.randn(size, heads, K, generator=generator).to(dtype)
        for size, heads in ((length, 4), (past + length, 2), (past + length, 2))
    )
    table = torch.randperm(60, generator=generator)
    for window in (None, 1, 3, 64, 100):
        pool = BlockPool(config(), 60, block_size=4)
        if past:
            fill(pool, table.tolist(), keys[:past], values[:past])
        places = torch.arange(past, past + length)
        chunk = Chunk(0, length, past, table[: -(-(past + length) // 4)])
        made = Pass(pool, places[None], pool.slots(table[places // 4], places % 4), None, [chunk])
        found = attend_cached(q, keys[past:], values[past:], made, 0, window, 0.4, None)
        expected = plain(q.float(), keys.float(), values.float(), 0.4, window, None)
        assert found.dtype == dtype
        assert torch.allclose(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_groups_go_through_neighbours_in_place_and_keep_ends_apart():
    pool = BlockPool(config(), 40, block_size=4)
    (group,) = groups_of([[0, 2], [1, 4]], pool)
    assert group.blocks == slice(0, 5) and group.owners.tolist() == [0, 1, 0, 2, 1]
    assert group.firsts.tolist() == [0, 0, 4, 0, 4]
    own, shared = groups_of([[30, 0], [30, 1], [30, 2]], pool, 20)
    assert own.blocks == slice(0, 3) and own.owners_per_block == 1
    assert shared.blocks == slice(30, 31) and shared.owners.tolist() == [0, 1, 2, 3]
    (apart,) = groups_of([[0], [39]], pool)
    assert isinstance(apart.blocks, torch.Tensor) and apart.blocks.tolist() == [0, 39]


def test_only_few_blocks_are_copied_into_rows():
    pool = BlockPool(config(), 2000, block_size=32)
    most = (1 << 18) // (32 * pool.keys[0].shape[1] * K)  # blocks whose keys are 2 ** 18 numbers
    tables = [list(range(most // 2)), [most]]
    assert isinstance(blocks_of(tables, pool), Rows)
    assert isinstance(blocks_of([*tables, [0]], pool), list)


def test_rows_are_copied_in_and_outside_of_inference_mode():
    pool = BlockPool(config(), 4, block_size=4)
    keys, values = (torch.randn(8, pool.keys[0].shape[1], K) for _ in range(2))
    fill(pool, [2, 1], keys, values)
    rows = blocks_of([[2, 1]], pool)
    assert isinstance(rows, Rows)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            found = pool.of_rows(0, rows)
        assert torch.equal(found[0], keys.transpose(0, 1)[None]) and torch.equal(found[1], values.transpose(0, 1)[None])


def test_a_row_without_tokens_may_be_padded():
    pool = BlockPool(config(), 4, block_size=4)
    assert isinstance(blocks_of([[], [1]], pool), list)


def test_half_precision_is_kept_wide_on_the_cpu():
    assert BlockPool(config(), 1, torch.bfloat16).keys[0].dtype == torch.float32


def test_copies_hold_the_same():
    pool = BlockPool(config(), 3)
    fill(pool, [1], torch.randn(32, 2, K), torch.randn(32, 2, K))
    pool.copy(1, 2)
    assert torch.equal(pool.keys[0][1], pool.keys[0][2]) and torch.equal(pool.values[0][1], pool.values[0][2])
    assert not pool.keys[0][0].any() and pool.keys[0][2].any()


def test_lengths_and_rows():
    cache = KVCache(config(), 3, 6)
    cache.add(cache.places(4, None, None))
    cache.length = torch.tensor([4, 2, 4])
    cache.select(torch.tensor([0, 2]))
    assert cache.length.tolist() == [4, 4] and cache.tables == [[0], [2]]
    cache.length = 1
    assert cache.length.tolist() == [1, 1]
    with pytest.raises(ValueError, match="a cache of 6 tokens can't take 6 after 1"):
        cache.add(cache.places(6, None, None))
