"""The head's losses against torch's, with every kind of head."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tunesmith.nn.head import Head

B, T, D, V = 3, 13, 16, 37


class AdaptedHead(Head):
    """As an adapter would extend it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(4, D)), nn.Parameter(torch.randn(V, 4))

    def project(self, hidden):
        return super().project(hidden) + F.linear(F.linear(hidden, self.lora_A), self.lora_B)


def make(kind: str, softcap: float | None = None) -> tuple[Head, list[nn.Parameter]]:
    torch.manual_seed(0)
    embedding = nn.Embedding(V, D)
    cls = AdaptedHead if "adapted" in kind else Head
    head = cls(D, V, embedding if "tied" in kind else None, softcap)
    nn.init.normal_(head.matrix)
    if "frozen" in kind:
        head.matrix.requires_grad_(False)
    return head, [p for p in [head.matrix, *(p for n, p in head.named_parameters() if "lora" in n)] if p.requires_grad]


def data(ignored: str = "some"):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, D, generator=generator, requires_grad=True)
    labels = torch.randint(0, V, (B, T), generator=generator)
    if ignored == "some":
        labels[0, :7], labels[2, 5] = -100, -100
    if ignored == "all":
        labels[:] = -100
    return hidden, labels


def expected(head, hidden, labels, parameters):
    logits = head.project(hidden)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100).view_as(
        labels
    )
    return losses, torch.autograd.grad(losses.sum() * 0.25, [hidden, *parameters])


@pytest.mark.parametrize(
    "kind", ["plain", "tied", "frozen", "tied frozen", "adapted", "adapted tied", "adapted frozen"]
)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_size, ignored", [(0, "some"), (8, "some"), (8, "none"), (1024, "some")])
def test_losses_and_every_gradient(kind, softcap, chunk_size, ignored):
    head, parameters = make(kind, softcap)
    hidden, labels = data(ignored)
    losses, gradients = expected(head, hidden, labels, parameters)
    total = head.cross_entropy(hidden, labels, chunk_size)
    assert total.dtype == torch.float32 and torch.allclose(total, losses.sum(), rtol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(total * 0.25, [hidden, *parameters]), gradients):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    log_probs = head.log_probs(hidden, labels, chunk_size)
    assert log_probs.shape == labels.shape and torch.allclose(log_probs, -losses, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(log_probs.sum() * -0.25, [hidden, *parameters]), gradients):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "tied", "adapted"])
@pytest.mark.parametrize("loss", ["cross_entropy", "log_probs"])
def test_nothing_to_learn_gives_zero_and_a_zero_gradient(kind, loss):
    head, parameters = make(kind)
    hidden, labels = data("all")
    value = getattr(head, loss)(hidden, labels).sum()
    assert value.item() == 0
    gradients = torch.autograd.grad(value, [hidden, *parameters], materialize_grads=True)
    assert all((gradient == 0).all() for gradient in gradients)


def test_without_gradients():
    head, _ = make("plain")
    hidden, labels = data()
    with torch.no_grad():
        assert torch.allclose(head.cross_entropy(hidden, labels, 8), -head.log_probs(hidden, labels, 8).sum())


def test_a_second_backward_is_refused():
    head, _ = make("plain")
    loss = head.cross_entropy(*data())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_bfloat16_loss_is_that_of_the_rounded_logits_in_float32():
    head, _ = make("plain")
    head.bfloat16()
    hidden, labels = data()
    hidden = hidden.detach().bfloat16().requires_grad_()
    loss = head.cross_entropy(hidden, labels, 8)
    whole = F.cross_entropy(head.logits(hidden).float().flatten(0, 1), labels.flatten(), reduction="sum")
    assert torch.allclose(loss, whole, rtol=1e-3)
    loss.backward()
    assert head.weight.grad.dtype == hidden.grad.dtype == torch.bfloat16


def test_a_tied_head_follows_its_embedding():
    head, _ = make("tied")
    embedding = head.tied_to
    assert dict(head.named_parameters()) == {} and head.state_dict() == {}
    embedding.weight = nn.Parameter(torch.zeros(V, D))
    assert (head.logits(torch.ones(1, D)) == 0).all()
