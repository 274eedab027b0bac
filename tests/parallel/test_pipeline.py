"""A pipeline of ranks trains as one process does: losses, gradient norms, validation, logits and weights, for every schedule."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from torch import Tensor

from tunesmith.checkpoint.check import probe_logits
from tunesmith.config import load_config
from tunesmith.configs.layout import Layout
from tunesmith.configs.stages import SCHEDULES, pipeline_problems, stage_layers
from tunesmith.data.loader import chat_batches, text_batches
from tunesmith.data.tokenizer import find_tokenizer
from tunesmith.errors import ConfigError, UserError
from tunesmith.models.families import model_config
from tunesmith.models.initialize import initialize
from tunesmith.nn.part import local_tensor, parameter_parts
from tunesmith.parallel.mesh import start_mesh, stop_mesh
from tunesmith.training.build import build_model
from tunesmith.training.optim import build_optimizer
from tunesmith.training.source import find_model
from tunesmith.training.step import train_step, validation_means

STEPS, ROWS = 4, 8
MULTIPLE = [name for name in SCHEDULES if name not in ("GPipe", "1F1B")]
COMMON = [
    "dtype=fp32",
    f"max_steps={STEPS}",
    f"epochs={STEPS}",
    "tokenizer.max_seq_len=48",
    "optimizer.lr=0.05",
    "clip_grad_norm=2",
    "device=cpu",
]


@dataclass
class Trained:
    numbers: list[float]
    """Loss and gradient norm of every step, a validation loss, some logits: the same on every rank."""
    weights: dict[str, Tensor]
    """Of the whole model."""
    change: dict[str, Tensor]
    """From the first step to the last."""


def train(words: list[str]):
    """One rank's share of a short run: its numbers, and {parameter: (part, before, after)}."""
    config = load_config(*words)
    mesh = start_mesh(torch.device("cpu"), Layout.of(config), 60)
    source = find_model(config.model, need_weights=not getattr(config, "from_scratch", False))
    tokenizer = find_tokenizer(config.tokenizer, source.tokenizer, source.family.chat_templates)
    batches_of = text_batches if words[0] == "pretrain" else chat_batches
    data = batches_of(config, tokenizer, mesh, max_seq_len=48)
    model = build_model(config, source, tokenizer, mesh)
    optimizer = build_optimizer(model, config, data.total_steps, mesh)

    def loss_of(head, hidden, batch):
        return {"loss": (head.cross_entropy(hidden, batch.labels, 64), "tokens")}

    def weights():
        return {n: local_tensor(p.detach()).clone() for n, p in model.named_parameters() if p.requires_grad}

    before, numbers = weights(), []
    for step in range(1, STEPS + 1):
        batches = data.step(step)
        stats = train_step(model, optimizer, batches, loss_of, mesh, step)
        numbers += [stats.loss, stats.grad_norm]
        if step == 2:  # between training steps: one must not disturb the other
            numbers.append(validation_means(model, optimizer, [[batch] for batch in batches], loss_of, mesh)["loss"])
    numbers += probe_logits(model)[0, -1, :5].tolist()
    data.close()
    parts, after = parameter_parts(model), weights()
    return numbers, {name: (parts[name], before[name], after[name]) for name in after}


def whole(results) -> Trained:
    weights, change = {}, {}
    for numbers, parameters in results:
        assert numbers == results[0][0], "ranks disagree"
        for name, (part, before, after) in parameters.items():
            for target, values in ((weights, after), (change, after - before)):
                part.put(values, target.setdefault(name, torch.full(part.shape, torch.nan)))
    return Trained(results[0][0], weights, change)


def run(ranks: int, folder: Path, *words: str) -> Trained:
    # A large eps: updates are nearly proportional to gradients, so rounding in one close to zero is no step of full size.
    defaults = {"global_batch_size": f"global_batch_size={ROWS}", "optimizer.type": "optimizer.eps=1"}
    words = (*words, *(word for given, word in defaults.items() if not any(given in other for other in words)))
    recipe = "pretrain" if any("from_scratch" in word for word in words) else "sft"
    return whole(run_distributed(train, ranks, [recipe, *words, *COMMON, f"model={folder}"]))


def assert_same(found: Trained, expected: Trained) -> None:
    assert found.numbers == pytest.approx(expected.numbers, rel=1e-5, abs=2e-6)
    copy = found.weights.pop("lm_head.weight", None) if "lm_head.weight" not in expected.weights else None
    if copy is not None:  # a tied head's own matrix
        assert torch.equal(copy, found.weights["model.embed_tokens.weight"])
    assert found.weights.keys() == expected.weights.keys()
    for name, change in expected.change.items():
        assert (found.change[name] - change).norm() <= 1e-5 * change.norm() + 1e-7, name


@pytest.fixture(scope="module")
def models(tiny_model, chat_file, tmp_path_factory):
    """{is tied: folder of a model of four layers}, and the data beside each."""
    folders = {}
    for tied in (False, True):
        folder = folders[tied] = tmp_path_factory.mktemp("four_layers")
        numbers = json.loads((tiny_model / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(numbers | {"num_hidden_layers": 4, "tie_word_embeddings": tied, "initializer_range": 0.08})
        )
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_text((tiny_model / file).read_text())
        save_random(folder)
    return folders


def save_random(folder: Path) -> None:
    from safetensors.torch import save_file

    from tunesmith.models.decoder import build

    hf_config, family, config = model_config(folder)
    model = build(hf_config, family, config)
    initialize(model, 0)
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "model.safetensors")


@pytest.fixture(scope="module")
def alone(models, chat_file):
    """What one process makes of the same options; each is run once."""
    known = {}

    def of(tied: bool, *words: str) -> Trained:
        if (tied, words) not in known:
            known[tied, words] = run(1, models[tied], *words)
        return known[tied, words]

    return of


LORA = ["+lora", "weights.target_modules=[q_proj,down_proj,lm_head]"]
PIPELINE = "pipeline_parallel_dim=2"


def compare(models, alone, ranks: int, schedule: str, tied: bool, words: list[str], layout: tuple[str, ...] = ()):
    found = run(ranks, models[tied], *words, PIPELINE, f"pipeline_parallel_schedule={schedule}", *layout)
    assert_same(found, alone(tied, *words))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains_as_one_process(models, alone, chat_file, schedule):
    """A tied head, whose two matrices are on two ranks or on one; rows of many widths."""
    compare(models, alone, 2, schedule, True, [f"dataset.source={chat_file}", "batch_size=2"])


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_adapters_on_the_head_and_packed_rows(models, alone, chat_file, schedule):
    words = [f"dataset.source={chat_file}", "dataset.packed=true", "batch_size=1", *LORA]
    compare(models, alone, 2, schedule, True, words)


def test_a_stage_without_anything_to_train(models, alone, chat_file):
    words = [f"dataset.source={chat_file}", "batch_size=2", "+lora"]
    words.append('weights.target_modules=["model.layers.3.self_attn.q_proj"]')
    compare(models, alone, 2, "InterleavedZeroBubble", False, words)


@pytest.mark.parametrize("schedule, size, rows", [("1F1B", 5, 15), ("DualPipeV", 2, 10)])
def test_the_last_step_of_an_epoch(models, alone, chat_file, schedule, size, rows):
    """Of 24 rows it has fewer: its micro-batches have five and four, or are fewer than the schedule needs."""
    words = [f"dataset.source={chat_file}", f"batch_size={size}", f"global_batch_size={rows}"]
    compare(models, alone, 2, schedule, True, words)


def test_muon_where_a_stage_has_nothing_to_train(models, alone, chat_file):
    words = [f"dataset.source={chat_file}", "batch_size=2", "+lora", "optimizer.type=muon"]
    words.append('weights.target_modules=["model.layers.3.self_attn.q_proj"]')
    compare(models, alone, 2, "1F1B", False, words)


@pytest.mark.slow
def test_sharded_stages(models, alone, chat_file):
    words = [f"dataset.source={chat_file}", "batch_size=1"]
    compare(models, alone, 4, "InterleavedZeroBubble", True, words)


def test_tensor_parallel_stages(models, alone, chat_file):
    words = [f"dataset.source={chat_file}", "batch_size=2"]
    compare(models, alone, 4, "1F1B", True, words, ("tensor_parallel_dim=2",))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "tied, size, packed, weights",
    [(False, 2, "true", "full"), (False, 1, "false", "lora"), (True, 1, "true", "full"), (True, 2, "false", "lora")],
)
def test_every_schedule_with_every_kind_of_data(models, alone, chat_file, schedule, tied, size, packed, weights):
    words = [f"dataset.source={chat_file}", f"dataset.packed={packed}", f"batch_size={size}"]
    compare(models, alone, 2, schedule, tied, words + (LORA if weights == "lora" else []))


RECOMPUTED = "enable_activation_checkpointing=true"
LAYOUTS = [
    (),
    ("tensor_parallel_dim=2",),
    ("tensor_parallel_dim=2", "sequence_parallel=false"),
    ("context_parallel_dim=2",),
    ("data_parallel_replicate_dim=2",),
]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
@pytest.mark.parametrize(
    "layout, more",
    [(layout, more) for layout in LAYOUTS for more in ([], [*LORA, "weights.use_dora=true", RECOMPUTED])]
    + [((), [RECOMPUTED]), ((), ["+qlora"])],
)
def test_every_layout(models, alone, chat_file, schedule, layout, more):
    compare(models, alone, 4, schedule, True, [f"dataset.source={chat_file}", "batch_size=1", *more], layout)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B"])
def test_weights_are_let_go_after_the_forward_pass(models, alone, chat_file, schedule):
    words = [f"dataset.source={chat_file}", "batch_size=1"]
    compare(models, alone, 4, schedule, True, words, ("fsdp_reshard_after_forward=always",))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_four_ranks_from_scratch(models, alone, tmp_path, tied):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n\n" * 200)
    words = [f"dataset.source={text}", "batch_size=2", "from_scratch=true"]
    found = run(4, models[tied], *words, "pipeline_parallel_dim=4")
    assert_same(found, alone(tied, *words))


# --- which layers where, and what is refused ---------------------------------------------------------


def config_of(*words: str):
    return load_config("sft", "model=m", "dataset.source=d", "gradient_accumulation_steps=8", *words)


@pytest.mark.parametrize(
    "layers, words, sizes",
    [
        (4, ["pipeline_parallel_dim=2"], [2, 2]),
        (32, ["pipeline_parallel_dim=4"], [8, 9, 8, 7]),
        (6, ["pipeline_parallel_dim=2", "pipeline_parallel_schedule=ZBVZeroBubble"], [1, 2, 2, 1]),
        (7, ["pipeline_parallel_dim=2", "pipeline_parallel_split_points=[3]"], [3, 4]),
        (
            7,
            [
                "pipeline_parallel_dim=2",
                "pipeline_parallel_layers_per_stage=2",
                "pipeline_parallel_schedule=Interleaved1F1B",
            ],
            [2, 2, 2, 1],
        ),
    ],
)
def test_layers_of_stages(layers, words, sizes):
    stages = stage_layers(config_of(*words), layers)
    assert [len(stage) for stage in stages] == sizes
    assert [layer for stage in stages for layer in stage] == list(range(layers))


@pytest.mark.parametrize(
    "words, names",
    [
        (["pipeline_parallel_dim=5"], ["pipeline_parallel_dim: 5", "4 layers"]),
        (
            ["pipeline_parallel_dim=3", "pipeline_parallel_schedule=DualPipeV"],
            ["pipeline_parallel_dim: 3", "DualPipeV", "4 layers"],
        ),
        (
            ["pipeline_parallel_dim=2", "pipeline_parallel_split_points=[1,2]"],
            ["pipeline_parallel_split_points", "1F1B", "needs 2"],
        ),
        (
            ["pipeline_parallel_dim=2", "pipeline_parallel_split_points=[4]"],
            ["pipeline_parallel_split_points", "4 layers"],
        ),
        (
            ["pipeline_parallel_dim=2", "pipeline_parallel_layers_per_stage=1"],
            ["pipeline_parallel_layers_per_stage", "4 stages"],
        ),
    ],
)
def test_stages_that_the_model_cannot_be_cut_into(words, names):
    with pytest.raises(UserError) as error:
        stage_layers(config_of(*words), 4)
    assert all(name in str(error.value) for name in names), error.value


@pytest.mark.parametrize(
    "words, names",
    [
        (["gradient_accumulation_steps=1"], ["1F1B", "at least 2 micro-batches", "gradient_accumulation_steps"]),
        (["pipeline_parallel_schedule=DualPipeV", "gradient_accumulation_steps=3"], ["DualPipeV", "at least 4"]),
        (["pipeline_parallel_schedule=Interleaved1F1B", "gradient_accumulation_steps=5"], ["Interleaved1F1B", "even"]),
        (["pipeline_parallel_schedule=ZBVZeroBubble", "compile=true"], ["compile", "ZBVZeroBubble"]),
        (
            [
                "pipeline_parallel_schedule=ZBVZeroBubble",
                "enable_activation_checkpointing=true",
                "ac_mode=selective",
                "ac_option=op",
            ],
            ["ac_option: op", "ZBVZeroBubble"],
        ),
        (
            ["pipeline_parallel_schedule=DualPipeV", "fsdp_reshard_after_forward=always"],
            ["fsdp_reshard_after_forward", "DualPipeV"],
        ),
        (["optimizer_in_bwd=true"], ["optimizer_in_bwd", "pipeline_parallel_dim"]),
        (["pipeline_parallel_split_points=[1]", "pipeline_parallel_layers_per_stage=1"], ["not both"]),
        (["pipeline_parallel_split_points=[3,1]"], ["pipeline_parallel_split_points", "ascending"]),
    ],
)
def test_what_cannot_work_is_refused_naming_the_options(words, names):
    with pytest.raises(ConfigError) as error:
        config_of(PIPELINE, *words)
    assert all(name in str(error.value) for name in names), error.value


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_torch_takes_what_is_not_refused(name, count):
    """The rules about micro-batches are torch's own, so that it never has to speak."""
    schedule, ranks = SCHEDULES[name], 2
    config = config_of(PIPELINE, f"pipeline_parallel_schedule={name}")
    config.gradient_accumulation_steps = count
    refused = any(pipeline_problems(config))
    try:
        build_schedule(name, ranks, ranks * schedule.stages_per_rank, count)
    except ValueError:
        assert refused
    else:
        assert not refused


def build_schedule(name: str, ranks: int, count: int, micro_batches: int) -> None:
    from unittest.mock import Mock

    from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

    stages = [
        Mock(num_stages=count, group_size=ranks, group_rank=0, stage_index=index, submod=None, is_last=False)
        for index in range(count // ranks)
    ]
    kind = get_schedule_class(name)
    kind(stages[0] if issubclass(kind, PipelineScheduleSingle) else stages, micro_batches, loss_fn=lambda *_: None)


@pytest.fixture(autouse=True)
def no_group_is_left():
    yield
    stop_mesh()
