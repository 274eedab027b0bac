"""tune run evaluate: scores, perplexities, comparisons; files and mistakes."""

import io
import json
import math
import os
import re
import subprocess
import sys

import pytest

from tests.distributed import run_distributed
from tests.eval.conftest import rows, write_tasks
from tunesmith.configs.evaluate import Evaluate
from tunesmith.errors import ConfigError, UserError
from tunesmith.recipes.evaluate import main

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the harness


@pytest.fixture(autouse=True)
def few_bootstraps(monkeypatch):
    monkeypatch.setattr("tunesmith.eval.harness.BOOTSTRAPS", 100)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module", autouse=True)
def offline_data(tmp_path_factory):
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text of many blocks, and the same as rows."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [row["text"] for row in rows(80) if row["text"]]
    (folder / "book.txt").write_text("\n".join(lines))
    (folder / "book.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def config_of(model, **options):
    return Evaluate(**{"model": str(model), "device": "cpu", "dtype": "fp32", **options})


def changed(folder, by: float, into):
    """A copy of a model whose weights differ a little."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, into)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(into / "model.safetensors")
    noisy = {name: tensor + by * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    save_file(noisy, into / "model.safetensors", metadata={"format": "pt"})
    return into


def results_in(folder):
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())


def test_tasks_give_a_table_and_the_harness_files(capsys, tiny_model, task_folder, tmp_path):
    names = ["choices", str(task_folder / "answers.yaml")]
    options = {"tasks": names, "include_path": str(task_folder), "num_fewshot": 1, "log_samples": True}
    main(config_of(tiny_model, output_dir=str(tmp_path / "out"), **options))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    results = results_in(tmp_path / "out")
    assert ["choices", "none", "1", "acc", "↑", f"{results['results']['choices']['acc,none']:.4f}"] in [
        line[:6] for line in lines
    ]
    assert results["model_source"] == "tunesmith" and results["model_name"] == str(tiny_model)
    assert set(results["task_hashes"]) == {"choices", "answers"} and results["n-shot"] == {"answers": 1, "choices": 1}
    assert results["config"]["model_args"] == {"pretrained": str(tiny_model), "dtype": "fp32"}
    samples = {file.name.split("_2")[0]: file for file in tmp_path.rglob("samples_*.jsonl")}
    row = json.loads(samples["samples_choices"].read_text().splitlines()[0])
    assert row["arguments"]["gen_args_0"]["arg_0"].count("the") and {"acc", "acc_norm", "doc_hash"} <= row.keys()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Examples of answers" in page and "acc_norm" in page and "recipe: evaluate" in page


def test_in_a_pipe_there_are_no_bars_and_the_table_stands_alone(tiny_model, task_folder, tmp_path):
    words = [
        f"model={tiny_model}",
        "device=cpu",
        "dtype=fp32",
        "output_dir=null",
        f"tasks=[{task_folder}/last_word.yaml]",
    ]
    command = [sys.executable, "-W", "ignore", "-m", "tunesmith", "run", "evaluate", *words]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "it/s" not in ran.stderr and "examples/s" not in ran.stderr and "\r" not in ran.stderr
    assert "perplexity" in ran.stdout and "bootstrapping" not in ran.stdout


def test_a_seed_that_is_drawn_is_told(tiny_model, task_folder, tmp_path):
    main(config_of(tiny_model, tasks=[str(task_folder / "answers.yaml")], limit=1, seed=None, output_dir=str(tmp_path)))
    seed = results_in(tmp_path)["config"]["numpy_seed"]
    assert isinstance(seed, int) and f"seed: {seed}" in (tmp_path / "report.html").read_text()


def test_a_folder_stands_for_its_tasks(capsys, tiny_model, task_folder):
    main(config_of(tiny_model, tasks=[str(task_folder)], limit=2, output_dir=None))
    out = capsys.readouterr().out
    assert all(name in out for name in ("choices", "answers", "last_word", "word_perplexity"))


def test_a_group_is_compared_over_all_its_examples(capsys, tiny_model, task_folder, tmp_path):
    (task_folder / "both.yaml").write_text(
        "group: both\ntask: [choices, last_word]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    other = changed(tiny_model, 0.1, tmp_path / "other")
    options = {"tasks": ["both"], "include_path": str(task_folder), "output_dir": str(tmp_path / "out")}
    main(config_of(tiny_model, compare=str(other), **options))
    (task_folder / "both.yaml").unlink()
    differences = {
        (row["task"], row["metric"]): row for row in json.loads((tmp_path / "out/comparison.json").read_text())
    }
    assert differences["both", "acc"]["samples"] == 24
    assert differences["both", "acc"]["method"] == "paired standard error"
    assert differences["last_word", "perplexity"]["method"] == "paired bootstrap"


def test_perplexity_of_files_needs_no_harness(capsys, tiny_model, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    files = [str(texts / "book.txt"), str(texts / "book.jsonl")]
    main(config_of(tiny_model, perplexity=files, output_dir=str(tmp_path)))
    ((name, (book, by_rows)),) = json.loads((tmp_path / "perplexity.json").read_text()).items()
    assert name == str(tiny_model) and book["words"] == by_rows["words"]
    for row in (book, by_rows):
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"] / row["tokens"]))
        assert row["word_perplexity"] == pytest.approx(math.exp(row["nll"] / row["words"]))
        assert row["bits_per_byte"] == pytest.approx(row["nll"] / row["bytes"] / math.log(2))
        assert f"{row['perplexity']:.4f}" in capsys.readouterr().out or row is by_rows
    assert not (tmp_path / "comparison.json").exists()


def test_two_models_side_by_side(capsys, tiny_model, texts, task_folder, tmp_path):
    near, far = changed(tiny_model, 1e-7, tmp_path / "near"), changed(tiny_model, 0.3, tmp_path / "far")
    options = {"tasks": [str(task_folder / "choices.yaml")], "perplexity": str(texts / "book.txt")}
    main(config_of(tiny_model, compare=[str(near), str(far)], output_dir=str(tmp_path / "out"), **options))
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())
    found = {(row["other"], row["metric"]): row for row in rows}
    assert found[str(near), "acc"]["verdict"] == "no significant difference"
    assert found[str(far), "bits_per_byte"]["verdict"] == "significantly worse"
    assert found[str(far), "bits_per_byte"]["samples"] >= 10
    out = capsys.readouterr().out
    assert f"{far} (other) against {tiny_model} (first)" in out and "significantly worse" in out
    assert len(list((tmp_path / "out").rglob("results_*.json"))) == 3


def test_the_newest_checkpoint_of_a_run_is_compared(capsys, tiny_model, texts, tmp_path):
    changed(tiny_model, 0.1, tmp_path / "checkpoints" / "step-00000002")
    (tmp_path / "checkpoints" / "latest").write_text("step-00000002\n")
    latest = str(tmp_path / "checkpoints" / "latest")
    main(config_of(tiny_model, compare=latest, perplexity=str(texts / "book.txt"), output_dir=None))
    assert f"{latest} (other) against" in capsys.readouterr().out


def test_an_adapter_is_compared_with_its_base(capsys, tiny_model, texts, tmp_path):
    from tunesmith.checkpoint.adapter import save_adapter
    from tunesmith.nn.lora import apply_lora, reset_adapters
    from tunesmith.training.load import load_model

    model = load_model(tiny_model)
    apply_lora(model, rank=4, alpha=64.0, dropout=0.0, target_modules="all-linear")
    reset_adapters(model, 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    save_adapter(model, tmp_path / "adapter", str(tiny_model))
    options = {"adapter": str(tmp_path / "adapter"), "compare": str(tiny_model), "perplexity": str(texts / "book.txt")}
    main(config_of(tiny_model, output_dir=str(tmp_path / "out"), **options))
    told = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    adapted, base = told[f"{tiny_model} with {tmp_path / 'adapter'}"], told[str(tiny_model)]
    assert adapted[0]["nll"] > 1.01 * base[0]["nll"]


def on_rank(arguments, cache):
    import datasets

    import tunesmith.eval.harness
    from tunesmith.recipes.evaluate import main

    datasets.config.HF_DATASETS_CACHE = cache
    tunesmith.eval.harness.BOOTSTRAPS = 100
    main(Evaluate(**arguments))


def answers_in(folder):
    """{task: what the model said to each question, or how likely answers are, in the questions' order}"""
    files = {file.name.split("_2")[0]: file for file in folder.rglob("samples_*.jsonl")}
    return {name: [json.loads(line)["resps"] for line in file.read_text().splitlines()] for name, file in files.items()}


def as_numbers(value):
    """What nested lists hold; log-likelihoods are written as text."""
    if isinstance(value, list):
        return [one for part in value for one in as_numbers(part)]
    return [{"True": 1.0, "False": 0.0}[value] if value in ("True", "False") else float(value)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, together",
    [
        pytest.param(2, 1, id="dp2"),
        pytest.param(2, 2, id="tp2"),
        pytest.param(4, 2, id="dp2 x tp2"),
    ],
)
def test_several_processes_give_the_same_as_one(processes, together, tiny_model, task_folder, texts, tmp_path):
    options = {
        "model": str(tiny_model),
        "device": "cpu",
        "dtype": "fp32",
        "tasks": [str(task_folder / f"{name}.yaml") for name in ("choices", "answers", "last_word", "text")],
        "perplexity": str(texts / "book.jsonl"),
        "num_fewshot": 1,
        "log_samples": True,
        "gen_kwargs": {"do_sample": True, "temperature": 1.0},
    }
    main(Evaluate(**options, output_dir=str(tmp_path / "one")))
    several = {**options, "tensor_parallel_dim": together, "output_dir": str(tmp_path / "several")}
    run_distributed(on_rank, processes, several, str(tmp_path / "cache"))
    one, found = (results_in(tmp_path / name) for name in ("one", "several"))
    for key in ("task_hashes", "n-samples", "truncated_requests"):
        assert found[key] == one[key]
    assert found["config"]["model_num_parameters"] == one["config"]["model_num_parameters"]
    for name, wanted in one["results"].items():
        assert found["results"][name] == {
            metric: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            for metric, value in wanted.items()
        }
    own, wanted = answers_in(tmp_path / "several"), answers_in(tmp_path / "one")
    assert own["samples_answers"] == wanted["samples_answers"] and len(set(map(str, own["samples_answers"]))) > 5
    for name in ("choices", "last_word", "text"):
        for mine, others in zip(own[f"samples_{name}"], wanted[f"samples_{name}"], strict=True):
            assert as_numbers(mine) == pytest.approx(as_numbers(others), abs=1e-4, rel=1e-6)
    told = [
        next(iter(json.loads((tmp_path / name / "perplexity.json").read_text()).values()))
        for name in ("one", "several")
    ]
    assert told[1][0]["nll"] == pytest.approx(told[0][0]["nll"], rel=1e-6)


def test_models_that_processes_hold_together_compare_as_on_one(tiny_model, tmp_path):
    other = changed(tiny_model, 0.3, tmp_path / "other")
    (tmp_path / "text.txt").write_text("\n".join(row["text"] for row in rows(24)))
    options = {"model": str(tiny_model), "device": "cpu", "dtype": "fp32", "perplexity": str(tmp_path / "text.txt")}
    options |= {"compare": str(other), "max_length": 64, "stride": 48}
    main(Evaluate(**options, output_dir=str(tmp_path / "one")))
    run_distributed(main, 2, Evaluate(**options, tensor_parallel_dim=2, output_dir=str(tmp_path / "two")))
    one, two = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("one", "two"))
    assert one == [
        {key: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for key, value in row.items()}
        for row in two
    ]


def test_models_that_can_not_be_spread_are_told_before_any_is_loaded(tiny_model, texts, tmp_path):
    """Those beside, too."""
    options = {"perplexity": str(texts / "book.txt"), "output_dir": None, "compare": [str(tmp_path / "other")]}
    other = json.loads((changed(tiny_model, 0.1, tmp_path / "other") / "config.json").read_text())
    for tp, change, message in [
        (2, {}, "`tensor_parallel_dim: 2` needs a multiple of 2 processes, but 1 was started"),
        (4, {}, "`tensor_parallel_dim: 4` does not divide the model's 2 key-value heads: take 1 or 2"),
        (
            2,
            {"intermediate_size": 129},
            f"{tmp_path / 'other'}: `tensor_parallel_dim: 2` does not divide the model's 129",
        ),
        (2, {"quantization_config": NF4}, f"{tmp_path / 'other'} is quantized"),
    ]:
        (tmp_path / "other" / "config.json").write_text(json.dumps({**other, **change}))
        with pytest.raises(UserError, match=re.escape(message)):
            main(config_of(tiny_model, tensor_parallel_dim=tp, **options))


def test_a_terminal_gets_a_drawn_table(tiny_model, texts, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    main(config_of(tiny_model, perplexity=str(texts / "book.txt"), output_dir=None))
    assert "┃" in terminal.getvalue() and "bits/byte" in terminal.getvalue()


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

BROKEN = {
    "syntax.yaml": ("task: [a\n", "syntax.yaml is no YAML"),
    "nothing.yaml": ("description: x\n", "nothing.yaml is no task file: it has neither `task` nor `group`"),
    "include.yaml": ("include: absent.yaml\ntask: x\n", "include.yaml.*absent.yaml"),
    "data.yaml": (
        "task: x\ndataset_path: json\ndataset_kwargs: {data_files: /nowhere/rows.jsonl}\ntest_split: train\n"
        "doc_to_text: a\ndoc_to_target: b\n",
        "/nowhere/rows.jsonl",
    ),
    "key.yaml": ("task: x\ndataset_path: json\nnonsense: 1\n", "nonsense"),
    "metric.yaml": (
        "METRIC accu, aggregation: mean",
        "the metric accu of x is unknown, or can't be fetched; did you mean `acc",
    ),
    "aggregation.yaml": (
        "METRIC acc, aggregation: meen",
        "x aggregates acc in a way that is unknown; there are .*mean",
    ),
    "split.yaml": ("SPLIT tst", "there is no 'tst'; is a split or a field misspelled"),
    "row.yaml": ("ROWS {}", "one of them can't be asked or scored: TypeError"),
    "code.yaml": ("task: dangerous\nunsafe_code: true\n", "dangerous executes the code that the model writes"),
}


def _task(folder, content: str) -> str:
    """A task over two rows with one thing wrong; other contents are as they are."""
    what, _, value = content.partition(" ")
    if what not in ("METRIC", "SPLIT", "ROWS"):
        return content
    given = {"METRIC": "acc, aggregation: mean", "SPLIT": "train", "ROWS": '{"question": "b"}'} | {what: value}
    (folder / "rows.jsonl").write_text('{"question": "a"}\n' + given["ROWS"] + "\n")
    return (
        f"task: x\ndataset_path: json\ndataset_kwargs: {{data_files: {folder / 'rows.jsonl'}}}\ntest_split: {given['SPLIT']}\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question + \"\"}}'\ndoc_to_choice: [a, b]\ndoc_to_target: 0\n"
        f"metric_list: [{{metric: {given['METRIC']}}}]\n"
    )


@pytest.mark.parametrize("name", BROKEN)
def test_broken_task_files_are_told(tiny_model, tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_text(_task(tmp_path, content))
    for spec in (str(tmp_path / name), str(tmp_path)):
        with pytest.raises(UserError, match=message) as raised:
            main(config_of(tiny_model, tasks=[spec], output_dir=None))
        assert "\n" not in str(raised.value)


def test_mistakes_are_told(tiny_model, task_folder, tmp_path):
    answers = {"tasks": [str(task_folder / "answers.yaml")], "limit": 3}
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "rows.jsonl").write_text('{"question": "x"}\n')
    for options, message in [
        ({}, "there is nothing to evaluate"),
        ({"tasks": ["./absent.yaml"]}, "`tasks`: there is no file or folder ./absent.yaml"),
        ({"tasks": [str(tmp_path)]}, "there is no task file"),
        ({"perplexity": "absent.txt"}, "`perplexity`: there is no file absent.txt"),
        ({"perplexity": str(tmp_path / "empty.txt")}, "empty.txt is empty"),
        ({"perplexity": str(tmp_path / "blank.txt")}, "blank.txt holds no text"),
        ({"perplexity": str(tmp_path / "rows.jsonl")}, "rows.jsonl:1: there is no `text`"),
        ({"perplexity": "README.md", "compare": "./absent"}, "`compare`: there is no folder ./absent"),
        (
            {**answers, "num_fewshot": 500},
            "fewer solved examples than are to stand before a question: lower `num_fewshot`",
        ),
        ({**answers, "gen_kwargs": {"temperature": "hot"}}, "generation arguments of a task: .*hot"),
        ({**answers, "gen_kwargs": {"max_gen_toks": None, "top_p": "x"}}, "generation arguments of a task: "),
        ({"perplexity": "README.md", "max_length": 9999}, "can read 512 tokens, not 9999"),
        ({"perplexity": "README.md", "stride": 600}, "`stride` = 600 leaves gaps: .* reads 512 tokens at a time"),
        ({"perplexity": "README.md", "output_dir": "README.md"}, "`output_dir`: README.md is a file"),
        ({"perplexity": "README.md", "output_dir": "README.md/out"}, "`output_dir`: README.md/out can't be written to"),
    ]:
        with pytest.raises(UserError, match=message):
            main(config_of(tiny_model, **{"output_dir": None, **options}))


def test_a_missing_harness_is_told(tiny_model, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else found(name, *more)
    )
    with pytest.raises(ConfigError, match=r"`tasks` needs the package lm_eval.*pip install 'tunesmith\[eval\]'"):
        main(config_of(tiny_model, tasks=["hellaswag"]))
