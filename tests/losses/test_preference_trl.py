"""Preference losses, rewards and gradients against TRL 1.16's own trainers, one pair or one answer at a time.

TRL has no more: conservative DPO (`label_smoothing` has no effect on its `sigmoid`), which is held against its `aot`, the
same loss on a batch of one pair; and BCO, held against its paired `bco_pair` on a shifted reference. It has no
length-normalised `robust` or `hinge`; test_preference.py holds those against the plain ones.
"""

import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tunesmith.losses.preference import PAIRED, UNPAIRED, Answers, Outcome, Pairs

PROMPT, LENGTHS, REJECTED_LENGTHS = 3, [5, 1, 4, 7, 2, 6], [2, 7, 4, 3, 5, 1]
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    """TRL's trainers, imported when the first test asks: it takes eight seconds."""
    pytest.importorskip("trl", minversion="1.16")
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that trl.experimental is
        from trl.experimental.cpo.cpo_trainer import CPOTrainer
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    return SimpleNamespace(DPO=DPOTrainer, KTO=KTOTrainer, CPO=CPOTrainer, ORPO=ORPOTrainer)


ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def trainer(kind: type, **attributes):
    """The trainer without its models and data: what its loss reads, and nothing else."""
    made = object.__new__(kind)
    own = {"accelerator": ACCELERATOR, "aux_loss_enabled": False, "_metrics": {"train": defaultdict(list)}}
    own |= {
        "model": SimpleNamespace(training=True),
        "precompute_ref_logps": True,
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in (own | attributes).items():
        setattr(made, name, value)
    return made


def outputs(log_probs: torch.Tensor) -> SimpleNamespace:
    """What TRL's fused head gives beside log-probabilities serves its metrics only."""
    nothing = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def token_log_probs(lengths: list[int], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, T) log-probabilities of tokens, 0 at the prompt and the padding."""
    values = -torch.rand(len(lengths), PROMPT + max(lengths), generator=torch.Generator().manual_seed(seed)) * 4
    return (values * completion_mask(lengths, values.shape[1])).to(dtype)


def completion_mask(lengths: list[int], width: int) -> torch.Tensor:
    positions = torch.arange(width)
    return (positions >= PROMPT - 1) & (positions < PROMPT - 1 + torch.tensor(lengths)[:, None])


def by_trl_dpo(
    trl, loss_type: str, tokens: torch.Tensor, lengths: list[int], reference: torch.Tensor, **numbers
) -> tuple:
    """Loss of the two rows of tokens (2, T) with log p (2,) under the reference, and TRL's rewards: sums, whatever the loss."""
    numbers = {"beta": 0.1, "label_smoothing": 0.0} | numbers
    own = {"loss_types": [loss_type], "loss_weights": [1.0], "f_divergence_type": "reverse_kl", "ld_alpha": None}
    made = trainer(trl.DPO, use_weighting=False, **own, **numbers)
    mask = torch.nn.functional.pad(completion_mask(lengths, tokens.shape[1]), (1, 0)).long()
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    inputs |= {"ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:]}
    loss = made._compute_loss(lambda **_: outputs(tokens), inputs, return_outputs=False)
    metrics = made._metrics["train"]
    return loss, metrics["rewards/chosen"][0], metrics["rewards/rejected"][0]


def pairs_of(dtype: torch.dtype):
    """Six pairs one by one: log-probabilities of the tokens (2, T), lengths, log p under the reference (2,)."""
    chosen, rejected = token_log_probs(LENGTHS, 0, dtype), token_log_probs(REJECTED_LENGTHS, 1, dtype)
    for i, lengths in enumerate(zip(LENGTHS, REJECTED_LENGTHS)):
        reference = torch.stack([chosen[i].sum(), rejected[i].sum()]) + torch.tensor([1.5 - i, i - 2.0], dtype=dtype)
        yield torch.stack([chosen[i], rejected[i]]).requires_grad_(), list(lengths), reference


def ours(name: str, tokens: torch.Tensor, lengths: list[int], reference: torch.Tensor, **numbers) -> Outcome:
    chosen, rejected = tokens.sum(1).chunk(2)
    a, b = torch.tensor(lengths).chunk(2)
    return PAIRED[name].function(Pairs(chosen, rejected, a, b, reference[:1], reference[1:]), **{"beta": 0.1} | numbers)


def assert_same(loss: torch.Tensor, peer: torch.Tensor, tokens: torch.Tensor) -> None:
    """The loss, and its gradient with respect to the log-probability of every token."""
    assert torch.allclose(loss, peer.to(loss.dtype), **CLOSE)
    (gradient,), (expected,) = torch.autograd.grad(loss.sum(), tokens), torch.autograd.grad(peer.sum(), tokens)
    assert torch.allclose(gradient, expected, **CLOSE) and expected.abs().max() > 0


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
DPO_FAMILY = [  # TRL's name, ours, our numbers, whether rewards are averages here (TRL logs sums)
    ("sigmoid", "dpo", {}, False),
    ("sigmoid", "dpo", {"beta": 3.0}, False),
    ("sigmoid_norm", "dpo", {"beta": 3.0, "length_normalised": True}, True),
    ("aot", "dpo", {"label_smoothing": 0.1}, False),
    ("robust", "robust", {"label_smoothing": 0.1}, False),
    ("robust", "robust", {"beta": 2.0, "label_smoothing": 0.3}, False),
    ("ipo", "ipo", {}, True),
    ("ipo", "ipo", {"beta": 1.0}, True),
    ("hinge", "hinge", {}, False),
    ("apo_zero", "apo_zero", {}, False),
    ("apo_zero", "apo_zero", {"beta": 2.0}, False),
    ("apo_down", "apo_down", {}, False),
    ("apo_down", "apo_down", {"beta": 2.0}, False),
]


@DTYPES
@pytest.mark.parametrize("peer, name, numbers, averaged", DPO_FAMILY)
def test_dpo_trainer(trl, peer, name, numbers, averaged, dtype):
    for tokens, lengths, reference in pairs_of(dtype):
        known = {key: value for key, value in numbers.items() if key != "length_normalised"}
        expected, *rewards = by_trl_dpo(trl, peer, tokens, lengths, reference, **known)
        outcome = ours(name, tokens, lengths, reference, **numbers)
        assert_same(outcome.losses, expected, tokens)
        divisors = lengths if averaged else [1, 1]
        assert outcome.chosen_rewards.item() == pytest.approx(rewards[0] / divisors[0], rel=1e-6, abs=1e-6)
        assert outcome.rejected_rewards.item() == pytest.approx(rewards[1] / divisors[1], rel=1e-6, abs=1e-6)


CPO_FAMILY = [  # TRL's loss, its numbers, ours, our numbers, whether TRL gives its loss the average over tokens
    ("sigmoid", {}, "cpo", {}, False),
    ("sigmoid", {"label_smoothing": 0.2}, "cpo", {"label_smoothing": 0.2}, False),
    ("simpo", {"beta": 2.0, "simpo_gamma": 0.5}, "simpo", {"beta": 2.0, "gamma": 0.5}, True),
    ("simpo", {"beta": 10.0, "simpo_gamma": 3.0}, "simpo", {"beta": 10.0, "gamma": 3.0}, True),
]


@DTYPES
@pytest.mark.parametrize("loss_type, peer_numbers, name, numbers, averaged", CPO_FAMILY)
def test_cpo_trainer(trl, loss_type, peer_numbers, name, numbers, averaged, dtype):
    peer = trainer(trl.CPO, loss_type=loss_type, alpha=0.0, **{"beta": 0.1, "label_smoothing": 0.0} | peer_numbers)
    for tokens, lengths, reference in pairs_of(dtype):
        given = tokens.sum(1) / (torch.tensor(lengths) if averaged else 1)
        expected, *rewards = peer.cpo_loss(*given.chunk(2))
        outcome = ours(name, tokens, lengths, reference, **numbers)
        assert_same(outcome.losses, expected, tokens)
        assert torch.allclose(torch.cat(outcome[1:]), torch.cat(rewards), **CLOSE)


@DTYPES
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_trainer(trl, beta, dtype):
    """TRL's term is a reward that it subtracts, and float32 always."""
    peer = trainer(trl.ORPO, beta=beta)
    for tokens, lengths, reference in pairs_of(dtype):
        for scale in (1.0, 1e-3):  # the second: p near 1
            scaled = (tokens.detach() * scale).requires_grad_()
            negated, chosen_rewards, rejected_rewards, *_ = peer.odds_ratio_loss(
                *(scaled.sum(1) / torch.tensor(lengths)).chunk(2)
            )
            outcome = ours("orpo", scaled, lengths, reference, beta=beta)
            assert_same(outcome.losses, -negated, scaled)
            rewards = torch.cat([chosen_rewards, rejected_rewards]).to(dtype)
            assert torch.allclose(torch.cat(outcome[1:]), rewards, **CLOSE)


KL_ROW = 7


@DTYPES
@pytest.mark.parametrize("kl", [-2.0, 0.0, 1.25])
def test_kto_trainer(trl, kl, dtype):
    """TRL estimates kl itself, from the answers it is given for that: -2 is clamped there, and by the caller here."""
    tokens = token_log_probs(LENGTHS, 2, dtype).requires_grad_()
    mismatched = token_log_probs(LENGTHS, 3, dtype)
    desirable = torch.tensor([True, False, True, True, False, False])
    reference = tokens.detach().sum(1) + torch.linspace(-8, 8, 6, dtype=dtype)
    mask = torch.nn.functional.pad(completion_mask(LENGTHS, tokens.shape[1]), (1, 0)).long()
    numbers = {"beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 0.75}
    statistic = torch.tensor(max(kl, 0.0), dtype=dtype)

    answers = Answers(tokens.sum(1), torch.tensor(LENGTHS), desirable, reference)
    losses, rewards = UNPAIRED["kto"].function(answers, statistic, **numbers)
    for i in range(6):
        row = slice(i, i + 1)
        inputs = {"input_ids": mask[row], "attention_mask": mask[row], "completion_mask": mask[row]}
        inputs |= {"KL_" + key: mask[row] for key in ("attention_mask", "completion_mask")}
        inputs |= {"KL_input_ids": torch.full_like(mask[row], KL_ROW), "label": desirable[row]}
        inputs |= {"ref_logps": reference[row], "ref_KL_logps": mismatched[row].sum(1) - kl}

        def model(input_ids, row=row, **_):
            return outputs((mismatched if input_ids[0, 0] == KL_ROW else tokens)[row])

        peer = trainer(trl.KTO, loss_type="kto", calculate_KL=True, **numbers)
        expected = peer._compute_loss(model, inputs, return_outputs=False)
        side = "chosen" if desirable[i] else "rejected"
        assert peer._metrics["train"]["kl"][0] == pytest.approx(statistic.item(), abs=2e-6)
        assert torch.allclose(losses[i], expected, **CLOSE)
        assert rewards[i].item() == pytest.approx(peer._metrics["train"][f"rewards/{side}"][0], rel=1e-6, abs=1e-6)
        gradients = [torch.autograd.grad(loss, tokens, retain_graph=True)[0] for loss in (losses[i], expected)]
        assert torch.allclose(*gradients, **CLOSE) and gradients[1].abs().max() > 0


@DTYPES
@pytest.mark.parametrize("delta", [0.0, -0.4, 0.7])
def test_bco_as_two_answers_of_a_pair(trl, delta, dtype):
    """A reference that is likelier by delta / beta takes delta from both rewards."""
    for tokens, lengths, reference in pairs_of(dtype):
        expected, *shifted_rewards = by_trl_dpo(trl, "bco_pair", tokens, lengths, reference + delta / 0.1)
        answers = Answers(tokens.sum(1), torch.tensor(lengths), torch.tensor([True, False]), reference)
        losses, rewards = UNPAIRED["bco"].function(answers, torch.tensor(delta, dtype=dtype), beta=0.1)
        assert_same(losses.sum(), expected, tokens)
        assert (rewards - delta).tolist() == pytest.approx(shifted_rewards, rel=1e-6, abs=2e-6)
