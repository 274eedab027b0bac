"""On every layout, every gradient of every family equals transformers'. (A right loss has hidden an 83 % wrong gradient.)"""

import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.distributed import run_distributed
from tests.models.conftest import CASES, config_json, make_reference, relative_error, tokens

LAYOUTS = {
    "dp2": dict(),
    "ddp2": dict(data_parallel_replicate_dim=2),
    "tp2": dict(tensor_parallel_dim=2),
    "tp2 without sequence parallelism": dict(tensor_parallel_dim=2, sequence_parallel=False),
    "cp2": dict(context_parallel_dim=2),
    "pp2": dict(pipeline_parallel_dim=2, gradient_accumulation_steps=2),
}
IDS, LABELS = tokens(2, 40), tokens(2, 40, seed=1)
LABELS[0, :9] = -100


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """{case: folder with config.json, model.safetensors and gradients.safetensors} made with transformers."""
    return {case: write_reference(case, tmp_path_factory.mktemp(case.replace(" ", "_"))) for case in CASES}


def write_reference(case, folder):
    reference = make_reference(case)
    logits = reference(IDS, use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="sum").backward()
    (folder / "config.json").write_text(json.dumps(config_json(reference)))
    weights = dict(reference.named_parameters())
    save_file({name: p.detach() for name, p in weights.items()}, folder / "model.safetensors")
    save_file({name: p.grad for name, p in weights.items()}, folder / "gradients.safetensors")
    return folder


def gradients_on_mesh(folders, layout, widths=()):
    """{case: {parameter: (part, gradient of it)}} of this rank. widths: of micro-batches of both rows, cut to them; by default each row is one."""
    from tunesmith.checkpoint.load import load_weights, read_model_config
    from tunesmith.configs.layout import Layout
    from tunesmith.configs.shared import TrainSettings
    from tunesmith.data.batch import Batch
    from tunesmith.models.decoder import build
    from tunesmith.nn.part import local_tensor, parameter_parts
    from tunesmith.parallel.gradients import sum_partial
    from tunesmith.parallel.mesh import start_mesh
    from tunesmith.parallel.parallelize import parallelize
    from tunesmith.parallel.pipeline import forward_backward
    from tunesmith.training.step import own_tokens

    config = TrainSettings(dtype="fp32", **layout)
    mesh = start_mesh(torch.device("cpu"), Layout.of(config))
    found = {}
    for case, folder in folders.items():
        hf_config, family, shape = read_model_config(folder)
        if any(Layout.of(config).problems(shape)):
            continue
        with torch.device("meta"):
            model = build(hf_config, family, shape)
        parallelize(model, mesh, family.tp_plan, config)
        model.to_empty(device="cpu")
        model.init_buffers("cpu", 40)
        load_weights(model, folder, family)
        whole = Batch(IDS, LABELS, torch.arange(40).expand(2, 40))
        cuts = [(slice(None), slice(width)) for width in widths]
        cuts = cuts or [(slice(row, row + 1), slice(40)) for row in range(mesh.dp_rank, 2, mesh.dp_size)]
        batches = [own_tokens(model, whole.map_tokens(lambda tokens, _, cut=cut: tokens[cut]), mesh) for cut in cuts]

        def loss_of(hidden, batch, model=model):
            return model.lm_head.cross_entropy(hidden, batch.labels, chunk_size=16)

        forward_backward(model, batches, loss_of, nullcontext)
        gradients = {}
        for name, parameter in model.named_parameters():
            own = torch.nn.Parameter(local_tensor(parameter.detach()))
            own.grad = local_tensor(parameter.grad)
            gradients[name] = own
        sum_partial(model, gradients, mesh)
        parts = parameter_parts(model)
        names = gradients.keys() - model.copies.keys()
        found[case] = {name: (parts[name], gradients[name].grad) for name in names}
    return found


def together(ranks):
    """{parameter: whole tensor} from what ranks hold."""
    whole = {}
    for parts in ranks:
        for name, (part, tensor) in parts.items():
            part.put(tensor, whole.setdefault(name, torch.full(part.shape, torch.nan)))
    return whole


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_gradient_equals_transformers(references, layout):
    ranks = run_distributed(gradients_on_mesh, 2, references, layout)
    assert len(ranks[0]) > len(CASES) * 0.8
    assert not wrong_gradients(references, ranks)


def wrong_gradients(references, ranks):
    """{case and parameter: relative error} of what is not transformers'."""
    wrong = {}
    for case in ranks[0]:
        expected = load_file(references[case] / "gradients.safetensors")
        ours = together([rank[case] for rank in ranks])
        assert ours.keys() == expected.keys()
        errors = {name: relative_error(ours[name], expected[name]) for name in expected}
        wrong |= {f"{case}: {name}": error for name, error in errors.items() if not error < 1e-5}
    return wrong
