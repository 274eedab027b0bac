"""Every optimizer by name updates, and goes on from its saved state to the bit."""

import json
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from tunesmith.checkpoint.tensor_files import read_stem
from tunesmith.checkpoint.write import write_tensors
from tunesmith.configs import optimizers
from tunesmith.configs.schedule import Cosine
from tunesmith.configs.shared import TrainSettings
from tunesmith.errors import UserError
from tunesmith.parallel.mesh import start_mesh
from tunesmith.training.optim import build_optimizer


class CountsInItsGroup(torch.optim.SGD):
    """Keeps a number in its parameter group, as Prodigy and schedule-free optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["momentum"] = 1 - 1 / (1 + group["count"])
        return super().step(closure)


class Nests(torch.optim.Optimizer):
    """Keeps dicts, lists and tuples of tensors and numbers in a parameter's state, as Shampoo and L-BFGS do."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    moments = {"first": torch.zeros_like(parameter), 2: [torch.zeros_like(parameter), None]}
                    state.update(moments=moments, history=[], seen=(0, {"step": torch.zeros(())}), empty={})
                state["moments"]["first"].lerp_(parameter.grad, 0.1)
                state["moments"][2][0].addcmul_(parameter.grad, parameter.grad)
                state["history"] = [*state["history"], parameter.grad.clone()][-2:]
                count, (counter,) = state["seen"][0] + 1, state["seen"][1].values()
                counter.add_(1)
                state["seen"] = (count, {"step": counter})
                update = state["moments"]["first"] / (state["moments"][2][0].sqrt() + 1e-3) + sum(state["history"])
                parameter.sub_(update, alpha=group["lr"] / (count + float(counter)))


OPTIMIZERS = [
    optimizers.AdamW(lr=1e-2, weight_decay=0.1),
    optimizers.AdamW(lr=1e-2, fused=False),
    optimizers.AdamW(lr=1e-2, betas=(0.9, 0.95), state_dtype="bf16"),
    optimizers.AdamW(lr=1e-2, fused=False, state_dtype="bf16"),
    optimizers.SGD(lr=1e-2, momentum=0.9),
    optimizers.Adafactor(lr=1e-2),
    optimizers.Muon(lr=1e-2),
    optimizers.AdamW8bit(lr=1e-2),
    pytest.param(
        optimizers.ThirdPartyOptimizer("bitsandbytes.optim.AdamW8bit", lr=1e-2),
        marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
    ),
    optimizers.ThirdPartyOptimizer(f"{__name__}.CountsInItsGroup", lr=1e-2),
    optimizers.ThirdPartyOptimizer(f"{__name__}.Nests", lr=1e-2),
    optimizers.ThirdPartyOptimizer("torch.optim.RAdam", lr=1e-2, options={"betas": (0.8, 0.9)}),
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))


def run(model, optimizer, steps):
    for step in steps:
        optimizer.set_step(step)
        inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        optimizer.scaled(model(inputs).square().mean()).backward()
        optimizer.step(finite_loss=True)


def _name(config):
    return "-".join(str(getattr(config, key)) for key in ("type", "fused", "state_dtype") if hasattr(config, key))


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("config", OPTIMIZERS, ids=_name)
@torch.compiler.set_stance("force_eager")  # torchao would compile its step for half a minute
def test_state_round_trip_continues_to_the_bit(config, in_backward, tmp_path):
    settings = TrainSettings(dtype="fp32", optimizer=config, optimizer_in_bwd=in_backward, lr_scheduler=Cosine())

    def build(model):
        return build_optimizer(model, settings, 6, start_mesh(torch.device("cpu")))

    through = network()
    run(through, build(through), range(1, 7))

    stopped = network()
    first = build(stopped)
    run(stopped, first, range(1, 4))
    tensors, values = first.state()
    resumed = network()
    resumed.load_state_dict(stopped.state_dict())
    second = build(resumed)
    write_tensors(tensors, tmp_path, "optimizer")
    second.load_state(read_stem(tmp_path, "optimizer"), json.loads(json.dumps(values)))
    run(resumed, second, range(4, 7))

    assert not torch.equal(through[0].weight, network()[0].weight)
    for (name, a), b in zip(through.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("value", [{1, 2}, {(1, 2): 3}, {1: 0, "1": 0}, torch.float32])
def test_a_state_that_can_not_be_saved_is_named(value):
    settings = TrainSettings(dtype="fp32", optimizer=optimizers.ThirdPartyOptimizer(f"{__name__}.Nests", lr=1e-2))
    model = network()
    optimizer = build_optimizer(model, settings, 1, start_mesh(torch.device("cpu")))
    run(model, optimizer, [1])
    optimizer._optimizers[0].state[model[0].bias]["moments"]["odd"] = value
    with pytest.raises(
        UserError, match=rf"0\.bias::moments::odd can't be saved: it is of the type {type(value).__name__}"
    ):
        optimizer.state()


def test_vectors_are_not_decayed():
    model = network()
    settings = TrainSettings(dtype="fp32", optimizer=optimizers.AdamW(weight_decay=0.1))
    optimizer = build_optimizer(model, settings, 1, start_mesh(torch.device("cpu")))
    decay = {
        id(p): group["weight_decay"] for o in optimizer._optimizers for group in o.param_groups for p in group["params"]
    }
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0,
        "2.weight": 0.1,
        "2.bias": 0,
    }


def test_wrong_third_party_optimizers_are_named():
    for kind, options, text in [
        ("torch.optim.Nope", {}, "can't be imported"),
        ("torch.optim.SGD", {"momentun": 1}, "momentun"),
        ("torch.optim.LBFGS", {}, "needs a closure"),
    ]:
        settings = TrainSettings(dtype="fp32", optimizer=optimizers.ThirdPartyOptimizer(kind, options=options))
        with pytest.raises(UserError, match=text):
            build_optimizer(network(), settings, 1, start_mesh(torch.device("cpu")))


def test_muon_is_torchs():
    ours, theirs = network(), network()
    settings = TrainSettings(dtype="fp32", optimizer=optimizers.Muon(lr=1e-2, weight_decay=0.1))
    optimizer = build_optimizer(ours, settings, 3, start_mesh(torch.device("cpu")))
    matrices, vectors = [theirs[0].weight, theirs[2].weight], [theirs[0].bias, theirs[2].bias]
    muon = torch.optim.Muon(matrices, 1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    others = torch.optim.AdamW(vectors, 1e-2, weight_decay=0.0)
    for step in range(1, 4):
        run(ours, optimizer, [step])
        inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        theirs(inputs).square().mean().backward()
        for one in (muon, others):
            one.step()
            one.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def trained(state_dtype=None, dtype=torch.float32, steps=6, **more):
    model = network().to(dtype)
    config = optimizers.AdamW(lr=1e-2, weight_decay=0.1, state_dtype=state_dtype, **more)
    optimizer = build_optimizer(
        model, TrainSettings(dtype="fp32", optimizer=config), steps, start_mesh(torch.device("cpu"))
    )
    for step in range(1, steps + 1):
        optimizer.set_step(step)
        inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
        model(inputs).square().mean().backward()
        optimizer.step(finite_loss=True)
    return model, optimizer._optimizers[0]


@pytest.mark.parametrize("fused", [False, True])
def test_states_of_their_own_number_type(fused):
    plain, _ = trained(fused=fused)
    same, _ = trained("fp32", fused=fused)
    assert torch.equal(plain[0].weight, same[0].weight)  # the very numbers of torch's AdamW
    rounded, optimizer = trained("bf16", fused=fused)
    assert {tensor.dtype for tensor in optimizer.state[rounded[0].weight].values()} == {torch.float32, torch.bfloat16}
    assert rounded[0].weight.dtype == torch.float32
    change = (plain[0].weight - network()[0].weight).norm()
    assert 0 < (rounded[0].weight - plain[0].weight).norm() < 0.01 * change


def test_float32_states_under_bfloat16_weights():
    model, optimizer = trained("fp32", torch.bfloat16)
    state = optimizer.state[model[0].weight]
    assert (
        model[0].weight.dtype == torch.bfloat16 and state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    )


@pytest.mark.parametrize(("before", "after"), [(None, "bf16"), ("bf16", None)])
def test_another_state_dtype_after_a_resume(tmp_path, before, after):
    settings = [
        TrainSettings(dtype="fp32", optimizer=optimizers.AdamW(lr=1e-2, state_dtype=dtype)) for dtype in (before, after)
    ]
    model = network()
    first, second = (build_optimizer(model, one, 6, start_mesh(torch.device("cpu"))) for one in settings)
    run(model, first, range(1, 4))
    tensors, values = first.state()
    write_tensors(tensors, tmp_path, "optimizer")
    second.load_state(read_stem(tmp_path, "optimizer"), values)
    run(model, second, range(4, 7))
    averages = second._optimizers[0].state[model[0].weight]
    assert averages["exp_avg"].dtype == (torch.bfloat16 if after else torch.float32) and averages["step"] == 6


@pytest.mark.parametrize("in_backward", [False, True])
def test_the_gradient_norm_of_a_large_matrix_is_exact(in_backward):
    model = nn.Linear(2048, 2048, bias=False)
    settings = TrainSettings(dtype="fp32", optimizer_in_bwd=in_backward)
    optimizer = build_optimizer(model, settings, 1, start_mesh(torch.device("cpu")))
    gradient = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    optimizer.set_step(1)
    (model.weight * gradient).sum().backward()
    norm, _ = optimizer.step(finite_loss=True)
    assert norm == pytest.approx(gradient.double().norm().item(), rel=1e-6)
