"""Operations of a step: equal to what torch counts, and to the usual formula."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tunesmith.data.batch import IGNORED, Batch
from tunesmith.models import families
from tunesmith.models.decoder import build
from tunesmith.nn.lora import apply_lora, freeze_base, reset_adapters
from tunesmith.training.flops import PEAK_TFLOPS, _peak_of, forward_flops, training_flops

SHAPE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def make(name="llama3_2/1B", device="cpu", **more):
    family, hf, _ = families.named_sizes()[name]
    hf = {**hf, **SHAPE, **more}
    with torch.device("meta"):
        model = build(hf, family, family.read_config(hf))
    if device == "cpu":
        model.to_empty(device="cpu")
        model.init_buffers("cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.02)
    return model


def batch(rows=2, length=32, trained=32):
    ids = torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, trained:] = IGNORED
    return Batch(ids, labels, torch.arange(length).expand(rows, length).contiguous())


def counted(model, batch):
    """Products of matrices, forward and backward, as torch counts them; attention apart."""
    with FlopCounterMode(display=False) as counter:
        model.lm_head.logits(model(batch.input_ids)[batch.labels != IGNORED]).sum().backward()
    found = counter.get_flop_counts()["Global"]
    attention = sum(value for operator, value in found.items() if "attention" in str(operator))
    return sum(found.values()) - attention


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trained", [32, 20])
def test_products_of_matrices_are_those_that_torch_counts(tied, trained):
    model, rows = make(tie_word_embeddings=tied), batch(trained=trained)
    flops = training_flops(model)
    assert flops.of_step(64, 2 * trained, 0) == counted(model, rows)


def test_frozen_weights_cost_four_instead_of_six():
    model = make(tie_word_embeddings=False)
    apply_lora(model, rank=4)
    reset_adapters(model, 0)
    freeze_base(model)
    flops = training_flops(model)
    # The very first layer's inputs, which come from a frozen embedding, need no gradient: we count them, torch has none to count.
    first = 64 * 2.0 * (64 + 32 + 32 + 3 * 4) * 64
    assert flops.of_step(64, 64, 0) == counted(model, batch()) + first


def test_quantized_weights_count_as_what_they_stand_for():
    plain, quantized = make(device="meta"), make(device="meta")
    for model, base in ((plain, None), (quantized, "nf4")):
        apply_lora(model, rank=4, quantize_base=base)
        freeze_base(model)
    assert training_flops(plain) == training_flops(quantized)


class Experts(nn.Module):
    """Two of four feed-forward networks for each token."""

    experts_per_token = 2

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(64, 4, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(4, 48, 64)), nn.Parameter(torch.randn(4, 64, 48))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        shares, chosen = self.router(tokens).softmax(-1).topk(2)
        y = torch.zeros_like(tokens)
        for expert in range(4):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            out = (tokens[rows] @ self.up[expert].T).relu() @ self.down[expert].T
            y = y.index_add(0, rows, out * shares[rows, place, None])
        return y.view_as(x)


def test_of_experts_those_that_a_token_visits_count():
    model = make(tie_word_embeddings=False)
    for layer in model.model.layers.values():
        layer.mlp = Experts()
    assert training_flops(model).of_step(64, 64, 0) == counted(model, batch())


def test_whole_rows_give_the_usual_formula():
    family, hf, _ = families.named_sizes()["llama3/8B"]
    with torch.device("meta"):
        model = build(hf, family, family.read_config(hf))
    flops, length = training_flops(model), 8192
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n)
    seen = 32 * Batch(*(torch.arange(length)[None],) * 3).num_seen()
    per_token = flops.of_step(length, length, seen) / length
    assert per_token == 6 * matrices + 12 * 32 * 32 * 128 * (length + 1) / 2
    assert per_token == pytest.approx(51.8e9, rel=0.01)


def test_what_is_seen_through_windows_and_in_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    documents = torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1]], dtype=torch.int32)
    packed = Batch(positions, positions, positions, documents)
    assert packed.num_seen() == 1 + 2 + 3 + 1 + 2
    assert packed.num_seen(2) == 1 + 2 + 2 + 1 + 2
    assert Batch(positions, positions, torch.arange(8)[None]).num_seen(3) == 1 + 2 + 6 * 3


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
        ("NVIDIA H20", 148), ("NVIDIA RTX A6000", 154.85), ("NVIDIA GeForce RTX 4090", 165.2), ("AMD Instinct MI300X", 1300),
        ("AMD Instinct MI250X / MI250", 191.5), ("NVIDIA GH200 480GB", 989), ("NVIDIA A10G", 70), ("Tesla V100-SXM2-16GB", None), ("Some New Device", None),
    ],
)  # fmt: skip
def test_peaks_by_name(name, peak):
    assert _peak_of(name) == peak
    assert all(value > 0 for _, value in PEAK_TFLOPS)


def test_a_frozen_model_beside_costs_its_forward_pass_alone():
    model, rows = make(tie_word_embeddings=False).requires_grad_(False), batch(trained=20)
    with FlopCounterMode(display=False) as counter:
        model.lm_head.logits(model(rows.input_ids)[rows.labels != IGNORED])
    found = counter.get_flop_counts()["Global"]
    attention = sum(value for operator, value in found.items() if "attention" in str(operator))
    whole, half = forward_flops(model, 3), forward_flops(model, 6)
    assert whole.of_step(64, 40, 0) == sum(found.values()) - attention
    assert half.of_sight == whole.of_sight / 2 == training_flops(model).of_sight / 6
    assert (whole + half).of_token == 2 * whole.of_token
