"""Evaluation: wall time against lm-evaluation-harness's own model class (HFLM), on the same questions, and whether the scores agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import material
from measure import Options, Outcome, Table, be_contender, mark, median, now, ratio, run_contender

BATCH_SIZE = 8
KINDS = {
    "choices": "questions of four answers",
    "few_shot": "questions of four answers, five solved ones before each",
    "answers": "answers of up to 64 tokens",
    "text": "texts whole",
}
SIZES = {"choices": 400, "few_shot": 100, "answers": 100, "text": 100}
METHODS = ("loglikelihood", "generate_until", "loglikelihood_rolling")


def measure(folder: Path, options: Options) -> list[Table]:
    model = options.model or str(folder / "model")
    if options.model is None:
        material.write_tokenizer(folder / "model")
        material.write_model(folder / "model", material.SMALL)
    names = ["choices", "answers"] if options.quick else list(KINDS)
    sizes = {name: 20 if options.quick else SIZES[name] for name in names}
    tasks = {name: str(_write_task(folder, name, count)) for name, count in sizes.items()}
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for _ in range(options.rounds):
        for name in tasks:
            for contender in CONTENDERS:
                arguments = {"model": model, "task": tasks[name], "output": str(folder / "out")}
                one = run_contender(__file__, contender, folder, options, **arguments)
                outcomes.setdefault((name, contender), []).append(one)
    rows: list[list[Any]] = []
    for name in tasks:
        both = [outcomes[name, contender] for contender in CONTENDERS]
        same = _agree(*(ones[0].value("scores", "scores") for ones in both))
        for what, seconds in (("the model's part", _requests), ("the whole command", lambda one: one.seconds)):
            ours, theirs = ([seconds(one) for one in ones] for ones in both)
            scores = "yes" if same else "no"
            rows.append(
                [f"{sizes[name]} {KINDS[name]}: {what}", median(ours), median(theirs), ratio(theirs, ours), scores]
            )
    headers = ["seconds", "tunesmith", "lm-eval HFLM", "faster ×", "same scores"]
    raw = {" ".join(key): [vars(one) for one in ones] for key, ones in outcomes.items()}
    of = "" if options.model is None else f"{Path(options.model).name}, "
    return [Table(f"evaluate: {of}fp32, batches of {BATCH_SIZE}", headers, rows, raw)]


def _requests(outcome: Outcome) -> float:
    return sum(one["seconds"] for one in outcome.named("requests"))


def _agree(ours: dict[str, float], theirs: dict[str, float]) -> bool:
    return ours.keys() == theirs.keys() and all(
        abs(ours[key] - theirs[key]) <= 1e-4 * max(1, abs(theirs[key])) for key in theirs
    )


def _write_task(folder: Path, name: str, count: int) -> Path:
    # Equal answers would be a tie, which rounding decides.
    entries = list({text[:80]: (name, line, text) for name, line, text in material.docstrings()}.values())
    rows = []
    for number in range(count + 10):
        (title, line, text), *others = (entries[(number * 37 + step * 11) % len(entries)] for step in range(4))
        choices = [f"{one[:80]}" for one in (text, *(other for _, _, other in others))]
        question = f"`{line}` in {title}. Its documentation begins:"
        rows.append({"question": question, "choices": choices, "label": 0, "text": text[:1500]})
    test = material.write_rows(folder / f"{name}_test.jsonl", rows[:count])
    train = material.write_rows(folder / f"{name}_train.jsonl", rows[count:])
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(test), "train": str(train)}},
        "test_split": "test",
        "fewshot_split": "train",
        "num_fewshot": 5 if name == "few_shot" else 0,
    }
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "{{label}}",
    }
    kinds = {
        "answers": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 64, "do_sample": False},
            "metric_list": [exact],
        },
        "text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(common | kinds.get(name, choice)))  # JSON is YAML
    return path


def _timed(kind: type) -> None:
    """Mark how long the class takes to answer."""

    def timed(method: Any) -> Any:
        def answer(self: Any, requests: list[Any], *more: Any) -> Any:
            started = now()
            answers = method(self, requests, *more)
            mark("requests", seconds=now() - started)
            return answers

        return answer

    for name in METHODS:
        setattr(kind, name, timed(getattr(kind, name)))


def _scores(results: dict[str, Any]) -> dict[str, float]:
    (of_task,) = results["results"].values()
    return {key: value for key, value in of_task.items() if isinstance(value, float)}


def ours(model: str, task: str, output: str) -> None:
    from tunesmith.configs.evaluate import Evaluate
    from tunesmith.eval.lm import EngineLM
    from tunesmith.recipes.evaluate import main

    _timed(EngineLM)
    folder = Path(output)
    before = set(folder.rglob("results_*.json"))
    main(Evaluate(model=model, tasks=[task], dtype="fp32", device="cpu", batch_size=BATCH_SIZE, output_dir=output))
    (file,) = set(folder.rglob("results_*.json")) - before
    mark("scores", scores=_scores(json.loads(file.read_text())))


def theirs(model: str, task: str, output: str) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    _timed(HFLM)
    lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=BATCH_SIZE)
    results = simple_evaluate(lm, tasks=[task])
    assert results is not None
    mark("scores", scores=_scores(dict(results)))


CONTENDERS = {"tunesmith": ours, "lm-eval": theirs}

if __name__ == "__main__":
    be_contender(CONTENDERS)
