"""The same update for every cut of the global batch, and the guards around it."""

import math

import pytest
import torch

from tunesmith.configs import optimizers
from tunesmith.configs.schedule import Cosine
from tunesmith.configs.shared import TrainSettings
from tunesmith.data.batch import IGNORED, Batch
from tunesmith.errors import UserError
from tunesmith.parallel.mesh import start_mesh
from tunesmith.training.load import load_model
from tunesmith.training.optim import build_optimizer
from tunesmith.training.step import Metric, train_step, validation_means

CPU = torch.device("cpu")


def loss_fn(head, hidden, batch):
    return {"loss": (head.cross_entropy(hidden, batch.labels), "tokens")}


def rows(count=8, length=12, seed=0):
    """Rows with prompts of different length, so that micro-batches hold different numbers of labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (count, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    for row in range(count):
        labels[row, : row + 1] = IGNORED
    return ids[:, :-1], labels


def micro_batches(size, **kwargs):
    ids, labels = rows(**kwargs)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return [Batch(ids[i : i + size], labels[i : i + size], positions[i : i + size]) for i in range(0, len(ids), size)]


def train(folder, size, steps=3, **settings):
    model = load_model(folder).train().requires_grad_(True)
    config = TrainSettings(**{"dtype": "fp32", "optimizer": optimizers.AdamW(lr=1e-3), **settings})
    optimizer = build_optimizer(model, config, steps, start_mesh(CPU))
    mesh = start_mesh(CPU)
    stats = [train_step(model, optimizer, micro_batches(size, seed=s), loss_fn, mesh, s) for s in range(1, steps + 1)]
    return model, stats


@pytest.mark.parametrize("settings", [{}, {"clip_grad_norm": 0.1}, {"optimizer": optimizers.Muon(lr=1e-3)}])
def test_the_update_does_not_depend_on_the_cut(tiny_model, settings):
    whole, stats = train(tiny_model, 8, **settings)
    # Muon orthogonalises in bfloat16: what differs in float32's last digit may round apart there.
    tolerance = 2e-3 if isinstance(settings.get("optimizer"), optimizers.Muon) else 1e-5
    for size in (1, 2, 3):
        cut, cut_stats = train(tiny_model, size, **settings)
        assert [s.loss for s in cut_stats] == pytest.approx([s.loss for s in stats], rel=max(tolerance, 1e-5))
        assert [s.grad_norm for s in cut_stats] == pytest.approx([s.grad_norm for s in stats], rel=max(tolerance, 1e-4))
        for (name, a), b in zip(whole.named_parameters(), cut.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=tolerance, msg=name)


def test_loss_is_the_mean_over_trained_tokens(tiny_model):
    model = load_model(tiny_model)
    ids, labels = rows(seed=1)
    expected = torch.nn.functional.cross_entropy(model.logits(ids).flatten(0, 1).float(), labels.flatten())
    _, stats = train(tiny_model, 2, steps=1)
    assert stats[0].loss == pytest.approx(expected.item(), rel=1e-6)
    assert stats[0].num_trained == int((labels != IGNORED).sum())


def test_optimizer_in_backward_makes_the_same_update(tiny_model):
    plain, stats = train(tiny_model, 8, lr_scheduler=Cosine(num_warmup_steps=1))
    early, early_stats = train(tiny_model, 8, lr_scheduler=Cosine(num_warmup_steps=1), optimizer_in_bwd=True)
    for (name, a), b in zip(plain.named_parameters(), early.parameters()):
        assert torch.equal(a, b), name
    assert [s.grad_norm for s in early_stats] == pytest.approx([s.grad_norm for s in stats], rel=1e-5)
    assert all(p.grad is None for p in early.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_activation_checkpointing": True},
        {"enable_activation_checkpointing": True, "ac_mode": "selective", "ac_option": 2},
        {"enable_activation_checkpointing": True, "ac_mode": "selective", "ac_option": "op"},
    ],
)
def test_activation_checkpointing_changes_no_gradient(tiny_model, settings):
    from tunesmith.parallel.parallelize import parallelize

    def gradients(**settings):
        model = load_model(tiny_model).train().requires_grad_(True)
        config = TrainSettings(dtype="fp32", **settings)
        parallelize(model, start_mesh(CPU), {}, config)
        batch = micro_batches(8)[0]
        model.lm_head.cross_entropy(model(batch.input_ids, batch.positions), batch.labels).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, recomputed = gradients(), gradients(**settings)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_a_batch_without_labels_gives_a_zero_gradient(tiny_model):
    model = load_model(tiny_model).train().requires_grad_(True)
    optimizer = build_optimizer(
        model, TrainSettings(dtype="fp32", optimizer=optimizers.SGD(lr=0.1)), 1, start_mesh(CPU)
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = micro_batches(8)[0]
    batch = Batch(batch.input_ids, torch.full_like(batch.labels, IGNORED), batch.positions)
    stats = train_step(model, optimizer, [batch], loss_fn, start_mesh(CPU), 1)
    assert stats.loss == 0.0 and stats.grad_norm == 0.0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def broken_loss(head, hidden, batch):
    return {"loss": (head.cross_entropy(hidden, batch.labels) * math.inf, "tokens")}


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_weights(tiny_model, in_backward):
    model = load_model(tiny_model).train().requires_grad_(True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, TrainSettings(dtype="fp32", optimizer_in_bwd=in_backward), 1, start_mesh(CPU))
    with pytest.raises(UserError, match="step 1: the loss is not finite"):
        train_step(model, optimizer, micro_batches(8), broken_loss, start_mesh(CPU), 1)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_such_steps_and_large_gradients_can_be_skipped(tiny_model):
    for settings, loss in [({"skip_nonfinite_steps": True}, broken_loss), ({"skip_grad_norm_above": 1e-6}, loss_fn)]:
        model = load_model(tiny_model).train().requires_grad_(True)
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer = build_optimizer(model, TrainSettings(dtype="fp32", **settings), 1, start_mesh(CPU))
        assert train_step(model, optimizer, micro_batches(8), loss, start_mesh(CPU), 1).skipped
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_fp16_scales_the_loss_and_survives_an_overflow(tiny_model):
    model, stats = train(tiny_model, 4, dtype="fp16", steps=2)
    _, exact = train(tiny_model, 4, steps=2)
    # The first scale (65,536) may overflow and skip; the loss itself is computed either way.
    assert stats[0].loss == pytest.approx(exact[0].loss, rel=1e-2)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


def test_validation_weights_every_token_the_same(tiny_model):
    model = load_model(tiny_model)
    optimizer = build_optimizer(model.requires_grad_(True), TrainSettings(dtype="fp32"), 1, start_mesh(CPU))
    mesh = start_mesh(CPU)
    whole = validation_means(model, optimizer, [micro_batches(8)], loss_fn, mesh)["loss"]
    assert validation_means(model, optimizer, [[b] for b in micro_batches(3)], loss_fn, mesh)["loss"] == pytest.approx(
        whole, rel=1e-6
    )


def test_a_term_without_a_count_is_an_error(tiny_model):
    def pairs(head, hidden, batch):
        return {"loss": (head.cross_entropy(hidden, batch.labels), "pairs")}

    model = load_model(tiny_model).train().requires_grad_(True)
    optimizer = build_optimizer(model, TrainSettings(dtype="fp32"), 1, start_mesh(CPU))
    with pytest.raises(KeyError, match="pairs"):
        train_step(model, optimizer, micro_batches(8), pairs, start_mesh(CPU), 1)


@pytest.mark.parametrize("in_backward", [False, True])
def test_the_gradient_norm_is_exact_also_in_bfloat16(tiny_model, in_backward):
    model = load_model(tiny_model, dtype="bfloat16").train().requires_grad_(True)
    optimizer = build_optimizer(model, TrainSettings(dtype="bf16", optimizer_in_bwd=in_backward), 1, start_mesh(CPU))
    squares = []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: squares.append(gradient.double().square().sum().item()))
    stats = train_step(model, optimizer, micro_batches(8), loss_fn, start_mesh(CPU), 1)
    assert stats.grad_norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_a_mean_over_nothing_is_not_logged(tiny_model):
    model = load_model(tiny_model).requires_grad_(True)
    mesh = start_mesh(CPU)
    optimizer = build_optimizer(model, TrainSettings(dtype="fp32"), 2, mesh)

    def loss(head, hidden, batch):
        total = head.cross_entropy(hidden, batch.labels)
        return {
            "loss": (total, "tokens"),
            "some": Metric(total.detach(), "tokens"),
            "none": Metric(total.detach() * 0, "rare"),
        }

    batches = micro_batches(3)
    for batch in batches:
        batch.counts["rare"] = 0
    stats = train_step(model, optimizer, batches, loss, mesh, 1)
    assert stats.metrics == {"some": pytest.approx(stats.loss)}
    assert set(validation_means(model, optimizer, [batches], loss, mesh)) == {"loss", "some"}
