"""Kernels against plain arithmetic, for every mask, soft cap and grouping."""

import pytest
import torch

from tunesmith.nn.attention import Sight, attend
from tunesmith.nn.kernels import block_mask, causal_mask

B, T, K = 2, 24, 16
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 10 + [2] * 3 + [-1] * 4, [0] * 24])
SEGMENTS = [(7, False), (10, False), (3, False), (4, True), (24, False)]


def tensors(heads: int, groups: int):
    torch.manual_seed(0)
    return torch.randn(B, T, heads, K), torch.randn(B, T, groups, K), torch.randn(B, T, groups, K)


def plain(q, k, v, documents, window, scale, softcap):
    """Token by token, straight from the definition."""
    out = torch.zeros_like(q)
    for b in range(B):
        for t in range(T):
            seen = [
                s
                for s in range(t + 1)
                if (window is None or t - s < window) and (documents is None or documents[b, s] == documents[b, t])
            ]
            for h in range(q.shape[2]):
                g = h // (q.shape[2] // k.shape[2])
                scores = k[b, seen, g] @ q[b, t, h] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[b, t, h] = scores.softmax(0) @ v[b, seen, g]
    return out


# FlexAttention is compiled where it is used; uncompiled it shows the same arithmetic on a CPU, and warns of its speed.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("packed", [False, True])
def test_every_path_is_the_definition(heads, groups, window, softcap, packed):
    q, k, v = tensors(heads, groups)
    documents = DOCUMENTS if packed else None
    expected = plain(q, k, v, documents, window, 0.3, softcap)
    sights = {
        "mask": Sight({window: causal_mask(T, window, q.device, documents)}, {}),
        "flex": Sight({}, {}, block_masks={window: block_mask(T, window, documents, B, q.device)}),
    }
    if packed:
        sights["loop"] = Sight({}, {}, segments=SEGMENTS)
    real = torch.ones(B, T, dtype=torch.bool) if documents is None else documents >= 0
    for path, sight in sights.items():
        if path == "flex" and (window, groups) not in ((None, 2), (5, 2)):
            continue  # slow in eager mode
        found = attend(q, k, v, sight, window, 0.3, softcap)
        assert torch.allclose(found[real], expected[real], atol=1e-5), path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_masks_are_the_same(monkeypatch):
    """On CUDA they are compiled; the compiler serves a CPU, too. Other lengths and starts compile nothing anew in the end."""
    from torch._dynamo.utils import counters

    from tunesmith.nn import kernels

    torch.compiler.reset()
    cases = [(256, 0), (512, 0), (768, 0), (512, 256), (1000, 250), (600, 500), (900, 128), (700, 190), (1100, 300)]
    compiled, builder = [], kernels._compiled_mask_builder()
    for length, start in cases:
        documents = (torch.arange(length) // 97).expand(2, -1).contiguous()
        plain = block_mask(length, None, documents, 2, documents.device, start)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_plain_mask_builder", lambda: builder)
            built = block_mask(length, None, documents, 2, documents.device, start)
        compiled.append(counters["frames"]["ok"])
        names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices")
        assert all(torch.equal(getattr(built, name), getattr(plain, name)) for name in names)
        assert built.seq_lengths == plain.seq_lengths == (length - start, length)
        ids = (torch.tensor(1), torch.tensor(0), torch.tensor(30), torch.tensor(start))
        assert built.mask_mod(*ids) == plain.mask_mod(*ids)
    assert compiled[-1] == compiled[-3]


def test_causal_needs_no_mask():
    assert causal_mask(8, None, torch.device("cpu")) is None
    assert causal_mask(8, 8, torch.device("cpu")) is None
    assert causal_mask(8, 7, torch.device("cpu")) is not None
