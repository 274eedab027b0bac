"""Tasks of every kind over small data made here, as files of the harness."""

import json
from pathlib import Path

import pytest

TASKS = {
    "choices": """
        output_type: multiple_choice
        doc_to_text: "{{question}} "
        doc_to_choice: "choices"
        doc_to_target: "{{label}}"
        metric_list:
          - {metric: acc, aggregation: mean, higher_is_better: true}
          - {metric: acc_norm, aggregation: mean, higher_is_better: true}
    """,
    "answers": """
        output_type: generate_until
        doc_to_text: "Question: {{question}}\\nAnswer:"
        doc_to_target: " {{choices[label]}}"
        generation_kwargs: {until: ["\\n", " fox", "<|im_end|>"], max_gen_toks: 12, do_sample: false}
        metric_list:
          - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
        filter_list:
          - {name: first-word, filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]}
          - {name: raw, filter: [{function: take_first}]}
    """,
    "last_word": """
        output_type: loglikelihood
        doc_to_text: "{{question}}"
        doc_to_target: " {{choices[label]}}"
        metric_list:
          - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
          - {metric: acc, aggregation: mean, higher_is_better: true}
    """,
    "text": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list:
          - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
          - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
    """,
}

WORDS = "the quick brown fox jumps over a lazy dog and sleeps".split()


def rows(count: int, shift: int = 0) -> list[dict]:
    """Questions of different lengths, some much longer than others, with three answers."""
    made = []
    for number in range(shift, shift + count):
        question = " ".join(WORDS[(number * 3 + place) % 11] for place in range(3 + number % 7))
        choices = [f"{WORDS[(number + place * 4) % 11]} {WORDS[(number + place) % 11]}" for place in range(3)]
        text = " ".join(WORDS[(number * place) % 11] for place in range(4 + 60 * (number % 4)))
        made.append({"question": question, "choices": choices, "label": number % 3, "text": text})
    return made


def write_tasks(folder: Path) -> Path:
    """Every task of TASKS as a file, with its data beside it."""
    for split, content in (("test", rows(12)), ("train", rows(6, 20))):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    for name, text in TASKS.items():
        lines = [line[8:] for line in text.strip("\n").splitlines()]
        data = f"data_files: {{test: {folder / 'test.jsonl'}, train: {folder / 'train.jsonl'}}}"
        head = [f"task: {name}", "dataset_path: json", f"dataset_kwargs: {{{data}}}", "test_split: test"]
        (folder / f"{name}.yaml").write_text(
            "\n".join([*head, "training_split: train", "fewshot_split: train", *lines])
        )
    return folder


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session", autouse=True)
def offline_data(tmp_path_factory):
    """What the harness reads stays in a folder of the tests, and no network is asked."""
    datasets = pytest.importorskip("datasets")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    yield
    patch.undo()
