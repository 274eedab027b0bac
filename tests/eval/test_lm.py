"""The harness asks our model and its own HFLM the same: the same answers and the same scores."""

import dataclasses

import pytest

from tunesmith.configs.evaluate import Evaluate
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import UserError
from tunesmith.training.load import load_model

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the harness

NAMES = ["choices", "answers", "last_word", "text"]


BOOTSTRAPS = 100
"""The harness's number, 100,000, takes many seconds."""


@pytest.fixture(autouse=True)
def few_bootstraps(monkeypatch):
    monkeypatch.setattr("tunesmith.eval.harness.BOOTSTRAPS", BOOTSTRAPS)


def config_of(folder, model, names=NAMES, **options):
    tasks = [str(folder / f"{name}.yaml") for name in names]
    return Evaluate(model=str(model), tasks=tasks, device="cpu", dtype="fp32", **options)


def ours(config, **options):
    from tunesmith.eval.harness import run_tasks
    from tunesmith.eval.lm import EngineLM
    from tunesmith.eval.tasks import load_tasks

    lm = EngineLM(load_model(config.model), load_tokenizer(config.model), config.model, **options)
    return run_tasks(lm, load_tasks(config.tasks), config), lm


def theirs(config, **options):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=config.model, dtype="float32", device="cpu", batch_size=1, **options)
    return simple_evaluate(
        lm,
        tasks=config.tasks,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        system_instruction=config.system_instruction,
        gen_kwargs=dict(config.gen_kwargs),
        log_samples=True,
        bootstrap_iters=BOOTSTRAPS,
        task_manager=TaskManager(include_defaults=False),
    )


def assert_same(ours, theirs):
    assert ours["results"].keys() == theirs["results"].keys()
    for name, wanted in theirs["results"].items():
        assert ours["results"][name].keys() == wanted.keys()
        for metric, value in wanted.items():
            assert ours["results"][name][metric] == (
                pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            )
    for name, samples in theirs["samples"].items():
        own = {(sample["doc_id"], sample["filter"]): sample for sample in ours["samples"][name]}
        for sample in samples:
            mine = own[sample["doc_id"], sample["filter"]]
            assert [tuple(one) for one in mine["arguments"]] == [tuple(one) for one in sample["arguments"]]
            for own_part, part in zip(flat(mine["resps"]), flat(sample["resps"]), strict=True):
                assert own_part == (pytest.approx(part, abs=1e-4, rel=1e-6) if isinstance(part, float) else part)
            assert mine["prompt_hash"] == sample["prompt_hash"]
    for key in ("configs", "versions", "n-shot", "higher_is_better", "n-samples"):
        assert ours[key] == theirs[key]


def flat(value):
    """What nested lists hold."""
    return [one for part in value for one in flat(part)] if isinstance(value, list | tuple) else [value]


CASES = {
    "plain": {},
    "few-shot": {"num_fewshot": 2},
    "system": {"system_instruction": "Be brief.", "num_fewshot": 1},
    "other arguments": {"gen_kwargs": {"max_gen_toks": 5, "until": ["the"]}, "limit": 5},
    "chat": {"apply_chat_template": True},
    "chat of several turns": {"apply_chat_template": True, "num_fewshot": 2, "system_instruction": "Be brief."},
    "chat in one message": {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": False},
}


QUICK = ("plain", "other arguments", "chat of several turns")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_same_as_the_harness_on_a_random_model(task_folder, tiny_model, case):
    config = config_of(task_folder, tiny_model, **CASES[case])
    assert_same(ours(config)[0], theirs(config))


@pytest.mark.parametrize("case", ["plain", "few-shot"])
def test_same_as_the_harness_on_a_real_model(task_folder, assets, case):
    config = config_of(task_folder, assets / "models" / "stories260K", **CASES[case])
    assert_same(ours(config)[0], theirs(config))


def test_long_contexts_lose_their_beginning(task_folder, tiny_model):
    config = config_of(task_folder, tiny_model, num_fewshot=3)
    found, lm = ours(config, max_length=40)
    assert_same(found, theirs(config, max_length=40))
    assert lm.num_truncated > 0 and found["truncated_requests"] == lm.num_truncated
    assert ours(dataclasses.replace(config, num_fewshot=0), max_length=400)[1].num_truncated == 0


def test_small_batches_give_the_same(task_folder, tiny_model):
    config = config_of(task_folder, tiny_model)
    assert_same(ours(config, batch_tokens=16, batch_size=2)[0], ours(config)[0])


def test_what_does_not_fit_is_told(task_folder, tiny_model):
    with pytest.raises(UserError, match="asks for up to 12 new tokens, but .* can read 12 in all"):
        ours(config_of(task_folder, tiny_model, ["answers"]), max_length=12)
    with pytest.raises(UserError, match="an answer of .* tokens is longer than the 2 that"):
        ours(config_of(task_folder, tiny_model, ["choices"]), max_length=2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_beams": 4}, "`num_beams` is not understood"),
        ({"temperature": -1, "do_sample": True}, "`temperature` must be a number that is not negative"),
    ],
)
def test_impossible_generation_arguments_are_told(task_folder, tiny_model, arguments, message):
    with pytest.raises(UserError, match=message):
        ours(config_of(task_folder, tiny_model, ["answers"], gen_kwargs=arguments))


REAL_TASKS = {
    "hellaswag": """
        dataset_kwargs: {data_files: {validation: DATA/hellaswag/val_500.jsonl}}
        output_type: multiple_choice
        validation_split: validation
        doc_to_text: "{{query}}"
        doc_to_target: "{{gold}}"
        doc_to_choice: choices
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "gsm8k": """
        dataset_kwargs: {data_files: {train: DATA/gsm8k/train_2000.jsonl, test: DATA/gsm8k/test.jsonl}}
        output_type: generate_until
        training_split: train
        fewshot_split: train
        test_split: test
        doc_to_text: "Question: {{question}}\\nAnswer:"
        doc_to_target: "{{answer}}"
        num_fewshot: 1
        generation_kwargs: {until: ["Question:", "</s>"], do_sample: false, max_gen_toks: 24}
        metric_list: [{metric: exact_match, regexes_to_ignore: [",", "(?s).*#### "]}]
        filter_list: [{name: flexible, filter: [{function: regex, group_select: -1, regex_pattern: "(-?[0-9.,]{2,})|(-?[0-9]+)"}, {function: take_first}]}]
    """,
    "humaneval": """
        dataset_kwargs: {data_files: {test: DATA/humaneval/HumanEval.jsonl.gz}}
        output_type: generate_until
        test_split: test
        doc_to_text: "{{prompt}}"
        doc_to_target: "{{canonical_solution}}"
        generation_kwargs: {until: ["\\nclass", "\\ndef", "\\nprint"], do_sample: false, max_gen_toks: 24}
        metric_list: [{metric: exact_match}]
    """,
    "wikitext": """
        dataset_kwargs: {data_files: {test: DATA/wikitext-2/test.txt}}
        output_type: loglikelihood_rolling
        test_split: test
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity}]
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_TASKS)
def test_real_data_give_the_same_as_the_harness(assets, tmp_path, name):
    lines = [line[8:] for line in REAL_TASKS[name].replace("DATA", str(assets / "data")).strip("\n").splitlines()]
    kind = "text" if name == "wikitext" else "json"
    (tmp_path / f"{name}.yaml").write_text("\n".join([f"task: {name}_local", f"dataset_path: {kind}", *lines]))
    config = config_of(tmp_path, assets / "models" / "stories260K", [name], limit=25)
    assert_same(ours(config)[0], theirs(config))


def test_long_evaluations_are_computed_in_parts_that_keep_questions_whole():
    from tunesmith.eval.lm import _parts

    contexts = [[1], [1], [1], [1, 2], [3], [3], [4]]
    order = list(range(7))
    assert _parts(order, contexts, [5] * 7, least=1) == [[0, 1, 2], [3], [4, 5], [6]]
    assert _parts(order, contexts, [5] * 7, least=20) == [[0, 1, 2, 3], [4, 5, 6]]
    assert _parts(order, contexts, [5] * 7, least=1000) == [order]
    assert _parts([], contexts, [], least=1) == _parts([], contexts, [], least=0) == []
