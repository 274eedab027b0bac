"""Divergences by hand and against TRL's; their gradients through every kind of head against autograd on full logits in float64."""

import math
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import nn

from tunesmith.losses.distillation import Distillation, TopK
from tunesmith.losses.divergence import forward_kl, jensen_shannon, reverse_kl, symmetric_kl
from tunesmith.nn.head import Head, VocabularyShard, with_label
from tunesmith.nn.lora import LoRA, LoRAHead, _with_adapter

B, T, D, V, D_TEACHER = 2, 9, 16, 37, 24
DIVERGENCES = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "symmetric": symmetric_kl(0.3),
    "jsd": jensen_shannon(0.2),
}


def rows_of(name: str, log_p, log_q):
    """The same in plain torch, for autograd."""
    p, q = log_p.exp(), log_q.exp()
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    if name == "jsd":
        m = 0.2 * p + 0.8 * q
        return 0.2 * (p * (log_p - m.log())).sum(-1) + 0.8 * (q * (log_q - m.log())).sum(-1)
    return {"forward": forward, "reverse": reverse, "symmetric": 0.3 * forward + 0.7 * reverse}[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("forward", 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ("reverse", 0.5 * math.log(2 / 3) + 0.5 * math.log(2)),
        ("symmetric", 0.3 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) + 0.7 * (0.5 * math.log(4 / 3))),
        # m = 0.2 p + 0.8 q = (0.55, 0.45)
        ("jsd", 0.2 * (0.75 * math.log(15 / 11) + 0.25 * math.log(5 / 9)) + 0.8 * 0.5 * (math.log(10 / 11) + math.log(10 / 9))),
    ],
)  # fmt: skip
def test_two_classes_by_hand(name, expected):
    p, q = torch.tensor([[0.75, 0.25]]).double(), torch.tensor([[0.5, 0.5]]).double()
    values, _ = DIVERGENCES[name](p.log(), q.log())
    assert values.item() == pytest.approx(expected, rel=1e-12)
    values, slope = DIVERGENCES[name](q.log(), q.log())
    gradient = slope - q * slope.sum()
    assert values.item() == pytest.approx(0, abs=1e-15) and gradient.abs().max() < 1e-15


@pytest.mark.parametrize(("ours", "beta"), [(forward_kl, 0.0), (reverse_kl, 1.0), (jensen_shannon(0.3), 0.3)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.slow  # its import alone takes 10 seconds
def test_as_trl(ours, beta, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(B, T, V), torch.randn(B, T, V), torch.randint(0, V, (B, T))
    labels[0, :4] = -100
    student.requires_grad_()
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, temperature, reduction="sum")
    (expected,) = torch.autograd.grad(theirs, student)
    head = Head(V, V)
    head.weight = nn.Parameter(torch.eye(V), requires_grad=False)
    rows = with_label(teacher, labels)
    loss = Distillation(lambda _, which: rows[which], with_label(labels, labels), ours, V, 1.0, temperature)
    found = head.sums(student, labels, loss, 5)
    (gradient,) = torch.autograd.grad(found[0], student)
    torch.testing.assert_close(found[0], theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


# --- through heads --------------------------------------------------------------------------------------


def make(kind: str, softcap: float | None, rows: slice = slice(None)) -> tuple[Head, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    matrix, up, down = (torch.randn(*shape, generator=generator) * 0.5 for shape in ((V, D), (V, 4), (4, D)))
    embedding = nn.Embedding(V, D, _weight=matrix.clone()) if "tied" in kind else None
    head = Head(D, V, embedding, softcap)
    if "tied" not in kind:
        head.weight = nn.Parameter(matrix[rows].clone())
    parameters = [head.matrix]
    if "lora" in kind:
        head.matrix.requires_grad_(False)
        head = _with_adapter(head, LoRA(rank=4, use_dora="dora" in kind), None)
        assert isinstance(head, LoRAHead)
        head.lora_A, head.lora_B = nn.Parameter(down), nn.Parameter(up[rows].clone())
        parameters = [head.lora_A, head.lora_B]
        if head.lora_magnitude is not None:
            head.lora_magnitude = nn.Parameter(head.row_norms() * 1.3)
            parameters.append(head.lora_magnitude)
    return head, parameters


def data():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, D, generator=generator, requires_grad=True)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :4], labels[1, 5] = -100, -100
    return hidden, labels, torch.randn(B, T, D_TEACHER, generator=generator)


def teacher_of(vocabulary: int, rows: slice = slice(None)) -> Head:
    generator = torch.Generator().manual_seed(2)
    head = Head(D_TEACHER, vocabulary, softcap=9.0)
    head.weight = nn.Parameter(torch.randn(V + 5, D_TEACHER, generator=generator)[:vocabulary][rows] * 0.4)
    return head.requires_grad_(False)


def live(teacher: Head, hidden, labels):
    rows = with_label(hidden, labels)
    return lambda student, which: teacher.logits_beside(student, rows[which])


def top(teacher: Head, hidden, labels, shared: int, k: int, temperature: float):
    log_probs = torch.log_softmax(teacher.logits(with_label(hidden, labels))[:, :shared].double() / temperature, -1)
    values, ids = log_probs.topk(k)
    if k < shared:
        values = torch.cat([values, log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)], -1)
    return lambda _, which: TopK(ids[which], values[which].float())


def loss_of(name, guide, labels, shared, temperature=1.0, kd_ratio=0.6):
    return Distillation(guide, with_label(labels, labels), DIVERGENCES[name], shared, kd_ratio, temperature)


def expected(head, parameters, hidden, labels, teacher, teacher_hidden, name, temperature, kd_ratio=0.6, k=None):
    """Sums and gradients by autograd in float64 on all logits."""
    head, teacher = head.double(), teacher.double()
    if head.tied_to is not None:
        head.tied_to.double()
    hidden = hidden.detach().double().requires_grad_()
    chosen = labels != -100
    logits, other = head.logits(hidden)[chosen], teacher.logits(teacher_hidden.double())[chosen]
    shared = min(logits.shape[-1], other.shape[-1])
    log_q, log_p = (torch.log_softmax(one[:, :shared] / temperature, -1) for one in (logits, other))
    if k is not None and k < shared:
        ids = log_p.topk(k).indices
        is_known = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, ids, True)
        log_q, log_p = (
            torch.cat([one.gather(-1, ids), one.masked_fill(is_known, -torch.inf).logsumexp(-1, keepdim=True)], -1)
            for one in (log_q, log_p)
        )
    kd = rows_of(name, log_p, log_q).sum()
    ce = nn.functional.cross_entropy(logits, labels[chosen], reduction="sum")
    total = kd_ratio * kd + (1 - kd_ratio) * ce
    gradients = torch.autograd.grad(total * 0.25, [hidden, *parameters])
    return [total, kd, ce], gradients


@pytest.mark.parametrize(
    ("kind", "softcap"),
    [("plain", None), ("plain", 3.0), ("tied", 3.0), ("lora", None), ("lora tied", 3.0), ("lora dora", None)],
)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_gradient(kind, softcap, name):
    for temperature, vocabulary, k in ((1.0, V, None), (2.0, V - 4, None), (1.0, V + 5, None), (1.0, V, 6), (1.5, V - 4, 6)):  # fmt: skip
        head, parameters = make(kind, softcap)
        (hidden, labels, teacher_hidden), teacher = data(), teacher_of(vocabulary)
        shared = min(V, vocabulary)
        guide = live(teacher, teacher_hidden, labels)
        if k is not None:
            guide = top(teacher, teacher_hidden, labels, shared, k, temperature)
        loss = loss_of(name, guide, labels, shared, temperature)
        found = head.sums(hidden, labels, loss, 4)
        gradients = torch.autograd.grad(found[0] * 0.25, [hidden, *parameters])
        wanted = expected(head, parameters, hidden, labels, teacher, teacher_hidden, name, temperature, k=k)
        for ours, theirs in zip([*found, *gradients], [*wanted[0], *wanted[1]], strict=True):
            torch.testing.assert_close(ours, theirs.float(), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_chunks_change_nothing_and_all_likeliest_are_the_whole(name):
    results = []
    for chunk_size, k in ((0, None), (1, None), (5, None), (1024, None), (3, V)):
        head, parameters = make("plain", None)
        (hidden, labels, teacher_hidden), teacher = data(), teacher_of(V)
        guide = live(teacher, teacher_hidden, labels) if k is None else top(teacher, teacher_hidden, labels, V, k, 1.0)
        found = head.sums(hidden, labels, loss_of(name, guide, labels, V), chunk_size)
        results.append([*found, *torch.autograd.grad(found[0], [hidden, *parameters])])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0]):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_likeliest_alone_never_make_more_of_the_difference(name):
    """To put classes together can't raise any of these divergences; with more of them apart it grows to the whole."""
    head, _ = make("plain", None)
    (hidden, labels, teacher_hidden), teacher = data(), teacher_of(V)
    sums = [
        head.sums(hidden, labels, loss_of(name, top(teacher, teacher_hidden, labels, V, k, 1.0), labels, V))[1].item()
        for k in (1, 4, 12, V)
    ]
    assert sums == sorted(sums) and sums[0] > 0


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_without_labels_or_gradients(kind):
    head, parameters = make(kind, None)
    (hidden, labels, teacher_hidden), teacher = data(), teacher_of(V)
    nothing = torch.full_like(labels, -100)
    found = head.sums(hidden, nothing, loss_of("forward", live(teacher, teacher_hidden, nothing), nothing, V))
    assert found.tolist() == [0, 0, 0]
    assert all((one == 0).all() for one in torch.autograd.grad(found[0], [hidden, *parameters]))
    loss = loss_of("forward", live(teacher, teacher_hidden, labels), labels, V)
    with torch.no_grad():
        quiet = head.sums(hidden, labels, loss, 4)
    assert not quiet.requires_grad and torch.equal(quiet, head.sums(hidden, labels, loss, 4))


# --- where ranks share the vocabulary -------------------------------------------------------------------


def shared_gradients(head, parameters, teacher, name, k, vocabulary) -> list[torch.Tensor]:
    hidden, labels, teacher_hidden = data()
    shared = min(V, vocabulary)
    whole = teacher_of(vocabulary)
    guide = live(teacher, teacher_hidden, labels) if k is None else top(whole, teacher_hidden, labels, shared, k, 1.0)
    found = head.sums(hidden, labels, loss_of(name, guide, labels, shared), 4)
    found[0].backward()
    return [found.detach(), hidden.grad, *(parameter.grad for parameter in parameters)]


def on_a_rank(kind, name):
    dist.init_process_group("gloo")
    rank, group = int(os.environ["RANK"]), dist.group.WORLD
    assert group is not None
    results = []
    for vocabulary, k in CASES:
        rows = (slice(0, 19), slice(19, V))[rank]
        most = -(-vocabulary // 2)
        teacher_rows = slice(rank * most, min((rank + 1) * most, vocabulary))
        head, parameters = make(kind, None, rows)
        teacher = teacher_of(vocabulary, teacher_rows)
        head.shard = VocabularyShard(rows.start, rows.stop, group)
        teacher.shard = VocabularyShard(teacher_rows.start, teacher_rows.stop, group)
        found = shared_gradients(head, parameters, teacher, name, k, vocabulary)
        if "lora" in kind:  # A is whole on every rank, which has a summand
            dist.all_reduce(found[2])
        results.append(found)
    return results


CASES = [(V, None), (V - 4, None), (V + 5, None), (V, 6), (12, None), (V, V)]


@pytest.mark.parametrize(("kind", "name"), [("plain", "jsd"), ("lora", "reverse")])
def test_gradients_of_a_shared_head(kind, name):
    both = run_distributed(partial(on_a_rank, kind, name), 2)
    for (vocabulary, k), first, second in zip(CASES, *both, strict=True):
        head, parameters = make(kind, None)
        whole = shared_gradients(head, parameters, teacher_of(vocabulary), name, k, vocabulary)
        cut = {"plain": [2], "lora": [3]}[kind]
        for number, wanted in enumerate(whole):
            found = torch.cat([first[number], second[number]]) if number in cut else first[number]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            if number not in cut:
                torch.testing.assert_close(second[number], wanted, rtol=1e-5, atol=1e-5)
