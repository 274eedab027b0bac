"""A head whose rows two ranks share gives the gradients of the whole one."""

import os

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import nn

from tunesmith.nn.head import Head, VocabularyShard
from tunesmith.nn.lora import LoRA, LoRAHead, _with_adapter

D, V = 16, 37


def head_of(adapted: bool, rows: slice = slice(None)) -> Head:
    generator = torch.Generator().manual_seed(0)
    matrix, up, down = (torch.randn(*shape, generator=generator) for shape in ((V, D), (V, 4), (4, D)))
    head = Head(D, V)
    head.weight = nn.Parameter(matrix[rows])
    if adapted:
        head.weight.requires_grad_(False)
        head = _with_adapter(head, LoRA(rank=4), None)
        assert isinstance(head, LoRAHead)
        head.lora_A, head.lora_B = nn.Parameter(down), nn.Parameter(up[rows])
    return head


def gradients(head: Head, loss: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 9, D, generator=generator, requires_grad=True)
    labels = torch.randint(0, V, (2, 9), generator=generator)
    labels[0, :4] = -100
    total = (
        head.cross_entropy(hidden, labels, 4) if loss == "cross_entropy" else -head.log_probs(hidden, labels, 4).sum()
    )
    total.backward()
    assert hidden.grad is not None
    found = {"loss": total.detach(), "hidden": hidden.grad}
    return found | {name: p.grad for name, p in head.named_parameters() if p.grad is not None}


def on_a_rank(adapted: bool, loss: str) -> dict[str, torch.Tensor]:
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    rows = (slice(0, 19), slice(19, V))[rank]
    head = head_of(adapted, rows)
    assert dist.group.WORLD is not None
    head.shard = VocabularyShard(rows.start, rows.stop, dist.group.WORLD)
    found = gradients(head, loss)
    if "lora_A" in found:  # whole on every rank, which has a summand
        dist.all_reduce(found["lora_A"])
    return found


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "log_probs"])
def test_gradients_of_a_shared_head(adapted, loss):
    whole = gradients(head_of(adapted), loss)
    first, second = run_distributed(on_a_rank, 2, adapted, loss)
    for name, expected in whole.items():
        is_cut = name in ("weight", "lora_B")
        found = torch.cat([first[name], second[name]]) if is_cut else first[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if not is_cut:
            torch.testing.assert_close(second[name], expected, rtol=1e-5, atol=1e-5)
