"""`tune run reward`: the same numbers on every layout, whole or packed; what it saves scores the same in transformers and PEFT."""

import json
import math
import random
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tunesmith
from tests.recipes.test_layouts import LAYOUTS, Runs, assert_same, result, train
from tests.recipes.test_layouts import run_recipe as run_on_rank
from tunesmith.config import load_config
from tunesmith.errors import UserError
from tunesmith.losses.reward import bradley_terry, class_cross_entropy
from tunesmith.models.families import all_families
from tunesmith.training.preflight import check, warn_of_unloadable

WEIGHTS = {
    "full": [],
    "lora": ["+lora"],
    "dora": ["+dora"],
    "qlora": ["+qlora"],
}
COMMON = """reward dtype=fp32 device=cpu max_steps=4 optimizer.type=sgd optimizer.lr=0.05 lr_scheduler.type=constant clip_grad_norm=1.0
global_batch_size=8 tokenizer.max_seq_len=64""".split()
WORDS = "the quick brown fox jumps over lazy dog".split()
GOOD, BAD = "good great fine nice".split(), "bad awful poor nasty".split()


def text(source: random.Random, last: list[str]) -> str:
    return " ".join([*source.choices(WORDS, k=source.randint(1, 5)), source.choice(last)])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """{task: rows to learn from}, 48 of each: what is good ends in a good word."""
    folder, source = tmp_path_factory.mktemp("rows"), random.Random(0)
    rows: dict[str, list] = {"preference": [], "classification": [], "process": []}
    for number in range(48):
        prompt, is_good = text(source, WORDS), number % 2
        pair = {"prompt": prompt, "chosen": text(source, GOOD), "rejected": text(source, BAD)}
        rows["preference"].append(pair | {"margin": 0.25 * (number % 3)})
        rows["classification"].append({"text": text(source, (BAD, GOOD)[is_good]), "label": is_good})
        labels = [source.random() < 0.5 for _ in range(source.randint(1, 4))]
        steps = [text(source, GOOD if label else BAD) for label in labels]
        rows["process"].append({"prompt": prompt, "completions": steps, "labels": labels})
    for task, content in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {task: folder / f"{task}.jsonl" for task in rows}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def words_of(task, weights, packed, model, files):
    more = {"preference": ["centring_coefficient=0.1"], "classification": ["num_labels=2"], "process": []}[task]
    data = [f"model={model}", f"task={task}", f"dataset.source={files[task]}", f"dataset.packed={packed}"]
    return [*COMMON, *WEIGHTS[weights], *data, *more]


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- the same on every layout ------------------------------------------------------------------------

SOME = [
    ("dp2", "preference", "qlora", False, 1),
    ("tp2", "preference", "lora", True, 2),
    ("cp2", "preference", "full", True, 8),
    ("cp2", "process", "lora", False, 2),
    ("pp2", "preference", "full", False, 2),
]
ALL = [
    case
    for case in [
        *product(LAYOUTS, ["preference"], WEIGHTS, [True], [1]),  # padded rows: above, and in test_grid.py
        *product(LAYOUTS, ["classification", "process"], ["lora"], [True], [2]),
    ]
    if case not in SOME and not (case[2] == "qlora" and "tp2" in case[0])  # the model is too small
]


@pytest.mark.parametrize(
    ("layout", "task", "weights", "packed", "batch_size"),
    [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)],
)
def test_the_layout_changes_no_number(layout, task, weights, packed, batch_size, runs, tmp_path, tiny_model, files):
    words = words_of(task, weights, packed, tiny_model, files)
    expected = runs.one([*words, "batch_size=4"])
    assert_same(train([*words, f"batch_size={batch_size}"], tmp_path / "run", layout), expected)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["preference", "process"])
def test_tensor_parallel_ranks_that_hold_all_tokens(task, runs, tmp_path, tiny_model, files):
    words = words_of(task, "lora", False, tiny_model, files)
    found = train([*words, "sequence_parallel=false", "batch_size=2"], tmp_path / "run", "tp2")
    assert_same(found, runs.one([*words, "batch_size=4"]))


@pytest.mark.parametrize("task", ["preference", "process", pytest.param("classification", marks=pytest.mark.slow)])
def test_packed_rows_give_the_gradient_of_unpacked_ones(task, tmp_path, tiny_model, files):
    """One step over all rows, however they lie."""
    whole = [*words_of(task, "full", False, tiny_model, files), "epochs=1", "max_steps=1", "batch_size=48"]
    plain = train([*whole, "global_batch_size=48"], tmp_path / "plain")
    assert_same(train([*whole, "dataset.packed=true", "global_batch_size=48"], tmp_path / "packed"), plain)
    logged = [metrics(tmp_path / name)[0] for name in ("plain", "packed")]
    assert logged[0]["accuracy"] == logged[1]["accuracy"] and logged[0]["num_trained"] == logged[1]["num_trained"]


@pytest.mark.parametrize("weights", ["full", pytest.param("dora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["one", pytest.param("dp2 x tp2", marks=pytest.mark.slow)])
def test_a_resume_changes_no_bit(weights, layout, tmp_path, tiny_model, files):
    words = [*words_of("preference", weights, True, tiny_model, files), "batch_size=2", "optimizer.type=adamw"]
    words += [f"dataset_val.source={files['preference']}", "max_steps=4", "global_batch_size=4"]
    through = train(words, tmp_path / "through", layout)
    for steps in (2, 4):
        found = train([*words, f"max_steps={steps}", "resume_from_checkpoint=true"], tmp_path / "run", layout)
    assert found[0] == through[0]
    assert all(torch.equal(found[1][name], tensor) for name, tensor in through[1].items())
    assert metrics(tmp_path / "run")[-1]["val_accuracy"] == metrics(tmp_path / "through")[-1]["val_accuracy"]


# --- what is saved -----------------------------------------------------------------------------------


def conversations(model: Path, file: Path, side: str):
    """Token ids of all answers, as transformers' tokenizer makes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for row in map(json.loads, file.read_text().splitlines()):
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        found.append(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False).input_ids)
    return tokenizer, found


def mean_reward(reference, tokenizer, ids: list[list[int]]) -> float:
    """Of padded batches, as transformers computes it."""
    inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        return reference(**inputs).logits.mean().item()


ENDS_IN_PADDING = "{% for message in messages %}{{ message.role }} {{ message.content }}<|endoftext|>{% endfor %}"


@pytest.mark.parametrize("template", [None, ENDS_IN_PADDING])
def test_transformers_gives_the_rewards_that_were_trained(template, tmp_path, tiny_model, files):
    """Also where a text ends in the token that it is padded with."""
    from transformers import AutoModelForSequenceClassification

    data = files["preference"]
    words = [*words_of("preference", "full", False, tiny_model, files), f"dataset_val.source={data}", "batch_size=8"]
    if template:
        (tmp_path / "template.jinja").write_text(template)
        words.append(f"tokenizer.chat_template={tmp_path / 'template.jinja'}")
    run(*words, folder=tmp_path / "run")
    folder, logged = newest(tmp_path / "run"), metrics(tmp_path / "run")[-1]
    reference, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    config = reference.config
    assert (config.num_labels, config.id2label, config.problem_type) == (1, {0: "reward"}, "regression")
    model = tunesmith.load_model(folder)
    for side in ("chosen", "rejected"):
        tokenizer, ids = conversations(folder, data, side)
        assert mean_reward(reference, tokenizer, ids) == pytest.approx(logged[f"val_reward_{side}"], abs=1e-5)
        ours = torch.stack([model.scores(torch.tensor([one]))[0] for one in ids])
        assert ours.mean().item() == pytest.approx(logged[f"val_reward_{side}"], abs=1e-5)


def run(*words: str, folder: Path) -> None:
    assert run_on_rank(words, folder) == 0


@pytest.mark.parametrize(
    "weights", ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qlora", "dora"))]
)
@pytest.mark.parametrize("task", ["preference", pytest.param("process", marks=pytest.mark.slow)])
def test_an_adapter_is_peft_s_and_is_merged(weights, task, tmp_path, tiny_model, files):
    from peft import AutoPeftModelForSequenceClassification, AutoPeftModelForTokenClassification
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    run(*words_of(task, weights, False, tiny_model, files), "batch_size=8", "optimizer.lr=1", folder=tmp_path / "run")
    folder = newest(tmp_path / "run")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["score"]
    assert settings["task_type"] == ("SEQ_CLS" if task == "preference" else "TOKEN_CLS")
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = {"num_labels": 1 if task == "preference" else 2}
    kinds = {
        "preference": (AutoPeftModelForSequenceClassification, AutoModelForSequenceClassification),
        "process": (AutoPeftModelForTokenClassification, AutoModelForTokenClassification),
    }
    adapted, merged = kinds[task]
    theirs = adapted.from_pretrained(folder, **labels, pad_token_id=0)
    theirs.config.pad_token_id = 0
    run("export", f"model={folder}", folder=tmp_path / "merged")
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        ours = tunesmith.load_model(folder).scores(ids)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        whole = merged.from_pretrained(tmp_path / "merged")(ids).logits
        torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tunesmith.load_model(tmp_path / "merged").scores(ids), expected, atol=1e-5, rtol=1e-5)  # fmt: skip
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"] == (
        {"0": "reward"} if task == "preference" else {"0": "wrong", "1": "right"}
    )


def test_an_adapter_of_peft_s_is_read(tmp_path, tiny_model):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3, pad_token_id=0)
    theirs = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, target_modules=["q_proj"]))
    theirs.peft_config["default"].base_model_name_or_path = str(tiny_model)
    theirs.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(3, 300, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(tunesmith.load_model(tmp_path / "adapter").scores(ids), theirs(ids).logits)


def test_a_reward_model_is_trained_on(tmp_path, tiny_model, files):
    """Its head is kept, where a language model gets a new one; an adapter goes on, too."""
    words = [*words_of("preference", "full", False, tiny_model, files), "batch_size=8"]
    run(*words, folder=tmp_path / "first")
    run(*words, f"model={newest(tmp_path / 'first')}", "max_steps=1", folder=tmp_path / "second")
    assert metrics(tmp_path / "second")[0]["loss"] < metrics(tmp_path / "first")[0]["loss"]
    lora = [*words_of("preference", "lora", False, tiny_model, files), "batch_size=8", "optimizer.lr=0.2"]
    run(*lora, folder=tmp_path / "third")
    run(*lora, f"weights.adapter={newest(tmp_path / 'third')}", "max_steps=1", folder=tmp_path / "fourth")
    assert metrics(tmp_path / "fourth")[0]["loss"] < metrics(tmp_path / "third")[0]["loss"]


@pytest.mark.parametrize(
    "task", ["preference", *(pytest.param(task, marks=pytest.mark.slow) for task in ("classification", "process"))]
)
def test_it_learns_what_is_good(task, tmp_path, files):
    model = Path(tunesmith.__file__).parent / "assets" / "tiny"
    words = [*words_of(task, "full", True, model, files), f"dataset_val.source={files[task]}", "optimizer.type=adamw"]
    words += ["epochs=6", "max_steps=24", "optimizer.lr=5e-4", "batch_size=4", "global_batch_size=4"]  # fmt: skip
    run(*words, folder=tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert rows[-1]["val_accuracy"] > 0.9 and rows[0]["accuracy"] < 0.8


@pytest.mark.slow
def test_it_learns_what_people_prefer(tmp_path, assets):
    """Polite answers over rude ones, on held-out pairs."""
    data = assets / "data/instruct-rasbt/instruction-data-with-preference.json"
    words = ["reward", f"model={Path(tunesmith.__file__).parent / 'assets' / 'tiny'}", "dtype=fp32", "device=cpu", "batch_size=8"]  # fmt: skip
    for option, split in (("dataset", "train[:80%]"), ("dataset_val", "train[80%:]")):
        words += [f"{option}.source={data}", f"{option}.split={split}", f"{option}.packed=true"]
    run(*words, "optimizer.lr=5e-4", "tokenizer.max_seq_len=256", folder=tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["val_accuracy"] > 0.7


# --- losses ------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    expected = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(3.0))]
    assert bradley_terry(chosen, rejected).tolist() == pytest.approx(expected)
    expected = [math.log1p(math.exp(-0.25)) + 0.1 * 2.25, math.log1p(math.exp(3.5)) + 0.1]
    assert bradley_terry(chosen, rejected, torch.tensor([0.25, 0.5]), 0.1).tolist() == pytest.approx(expected)
    assert bradley_terry(chosen.bfloat16(), rejected.bfloat16()).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("margin", [None, torch.tensor([0.3, 0.0, 1.2])])
def test_the_loss_of_pairs_is_trl_s(margin):
    from types import SimpleNamespace

    from trl import RewardTrainer

    rewards = torch.randn(6, 1, requires_grad=True)

    class Model(torch.nn.Module):
        def forward(self, **_):
            return SimpleNamespace(logits=rewards)

    accelerator = SimpleNamespace(gather_for_metrics=lambda values: values, gather=lambda values: values)
    trainer = SimpleNamespace(
        model=Model().eval(),
        args=SimpleNamespace(center_rewards_coefficient=0.01),
        accelerator=accelerator,
        _metrics={"eval": {}},
        _total_train_tokens=0,
    )
    from collections import defaultdict

    trainer._metrics = {"eval": defaultdict(list)}
    inputs = {} if margin is None else {"margin": margin}
    theirs = RewardTrainer.compute_loss(trainer, trainer.model, inputs)
    [expected] = torch.autograd.grad(theirs, rewards)
    ours = bradley_terry(*rewards.squeeze(-1).chunk(2), margin, 0.01).mean()
    [found] = torch.autograd.grad(ours, rewards)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found, expected)


def test_the_loss_of_steps_is_transformers_of_token_classification():
    """Which TRL's PRMTrainer takes: the mean over labelled tokens."""
    from transformers.loss.loss_utils import ForTokenClassification

    scores, labels = torch.randn(2, 7, 2), torch.randint(0, 2, (2, 7))
    labels[0, :4] = -100
    expected = ForTokenClassification(scores, labels, type("Config", (), {"num_labels": 2}))
    found = class_cross_entropy(scores[labels != -100], labels[labels != -100])
    torch.testing.assert_close(found.mean(), expected)
    torch.testing.assert_close(found.sum(), F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum"))


# --- what is refused ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tiny_model, files) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "run"
    run(*words_of("preference", "full", False, tiny_model, files), "max_steps=1", "batch_size=8", folder=folder)
    return newest(folder)


def test_a_reward_model_is_exported(reward_model, tmp_path):
    run("export", f"model={reward_model}", "dtype=bf16", folder=tmp_path / "small")
    model, small = tunesmith.load_model(reward_model), tunesmith.load_model(tmp_path / "small")
    ids = torch.randint(3, 300, (2, 12))
    assert small.model.weight_dtype == torch.bfloat16
    torch.testing.assert_close(small.scores(ids), model.scores(ids), atol=0.05, rtol=0.05)


def test_words_are_not_asked_of_a_reward_model(reward_model, tmp_path, chat_file):
    for words in (
        ["sft", f"dataset.source={chat_file}", f"output_dir={tmp_path / 'run'}"],
        ["generate", "prompt=What?"],
    ):
        with pytest.raises(UserError, match=r"is a reward model or classifier .* gives scores instead of words"):
            check(load_config(*words, f"model={reward_model}"))
    model, tokenizer = tunesmith.load_model(reward_model), tunesmith.load_tokenizer(reward_model)
    with pytest.raises(UserError, match="scores instead of words"):
        tunesmith.generate(model, tokenizer, ["What?"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["task=classification"], "gets a new head: say how many classes"),
        (["num_labels=3"], "`num_labels` is for `task: classification`"),
        (["task=process", "centring_coefficient=0.1"], "`centring_coefficient` is for `task: preference`"),
        (["task=classification", "dataset.label_names=[one]"], "names 1 class"),
        (["task=classification", "num_labels=3", "dataset.label_names=[a,b]"], "names 2 classes: name all 3"),
    ],
)
def test_labels_that_don_t_fit(more, message, tmp_path, tiny_model, files):
    task = "classification" if "task=classification" in more else "preference"
    words = ["reward", f"model={tiny_model}", f"dataset.source={files[task]}", f"output_dir={tmp_path / 'run'}", *more]
    with pytest.raises(UserError, match=message):
        check(load_config(*words, "device=cpu", "dtype=fp32"))


def test_another_task_than_the_model_s(reward_model, tmp_path, files):
    words = ["reward", f"model={reward_model}", f"dataset.source={files['process']}", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="scores texts with 1 label, and `task: process` every token with 2"):
        check(load_config(*words, "task=process", "device=cpu", "dtype=fp32"))


def test_what_transformers_will_not_load_is_said():
    [olmo] = [family for family in all_families() if family.name == "olmo2"]
    assert warn_of_unloadable(olmo, per_token=False) is None
    assert "transformers has no Olmo2ForTokenClassification" in str(warn_of_unloadable(olmo, per_token=True))


def test_a_class_beyond_the_last_is_no_row(tmp_path, tiny_model):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"number {n}", "label": n % 3}) + "\n" for n in range(12)))
    words = ["reward", "task=classification", "num_labels=2", f"model={tiny_model}", f"dataset.source={file}"]
    run(*words, "device=cpu", "dtype=fp32", folder=tmp_path / "run")
    assert result(tmp_path / "run")[0]
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert "a label that is no class" in json.dumps(report)
