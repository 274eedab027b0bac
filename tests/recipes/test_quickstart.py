"""The model and the instruction set that ship, and the parts of the quickstart around the run itself."""

import fcntl
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import tunesmith
from tunesmith.recipes import quickstart

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((quickstart.BASE / "config.json").read_text())


def test_the_model_is_small_and_of_sizes_that_every_quantizer_and_layout_can_use(config):
    weights = quickstart.BASE / "model.safetensors"
    assert weights.stat().st_size <= 4_000_000
    with safe_open(weights, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        types = {file.get_slice(name).get_dtype() for name in file.keys()}
    assert types == {"BF16"}
    assert "lm_head.weight" not in shapes and config["tie_word_embeddings"]
    assert all(config[size] % 128 == 0 for size in ("hidden_size", "intermediate_size", "vocab_size"))
    assert all(config[heads] % 2 == 0 for heads in ("num_attention_heads", "num_key_value_heads"))
    assert config["num_hidden_layers"] >= 4
    assert sum(math.prod(shape) for shape in shapes.values()) <= 2_000_000


def test_transformers_computes_the_same_logits():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(quickstart.BASE, dtype=torch.float32).eval()
    ours = tunesmith.load_model(quickstart.BASE, dtype="float32")
    ids = torch.randint(0, ours.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_and_its_chat_template_are_those_that_transformers_reads():
    transformers = pytest.importorskip("transformers")
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(quickstart.BASE),
        tunesmith.load_tokenizer(quickstart.BASE),
    )
    text = "Words: river  stone\n12 + 7 = 19, naïve 字 🙂<|end|>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    assert ours.vocab_size == theirs.vocab_size == 1024
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "content": "5"},
    ]
    wanted = "<|system|> Be brief.<|end|><|user|> What is 2 + 3?<|end|><|assistant|>"
    assert ours.render_chat(messages[:2], add_generation_prompt=True) == wanted
    assert ours.render_chat(messages) == theirs.apply_chat_template(messages, tokenize=False) == wanted + " 5<|end|>"
    ids, mask = ours.encode_chat(messages)
    assert ours.decode([i for i, trained in zip(ids, mask) if trained], skip_special_tokens=False) == " 5<|end|>"
    assert ours.eos_id in ours.stop_ids


def test_no_held_out_prompt_or_fact_or_word_of_a_list_is_trained_on():
    train, test = quickstart.read_questions(quickstart.TRAIN), quickstart.read_questions(quickstart.TEST)
    assert len(train) > 1000 and len(test) >= 200
    assert not {question.prompt for question in train} & {question.prompt for question in test}
    assert len({question.prompt for question in test}) == len(test)
    assert {question.task for question in train} == {question.task for question in test}
    for task in ("backwards", "list"):  # their answers hold every word of the row
        words = [
            {word.strip(",") for q in part if q.task == task for word in q.answer.split()} - {"and"}
            for part in (train, test)
        ]
        assert not words[0] & words[1], task
    for task in ("past tense", "capital"):  # one answer for one fact
        assert not {q.answer for q in train if q.task == task} & {q.answer for q in test if q.task == task}, task


def test_the_instruction_set_is_what_its_script_writes(tmp_path, monkeypatch):
    code = (
        "import sys, pathlib; sys.path.insert(0, 'scripts'); import make_tiny_model as make;"
        f"make.ASSETS = pathlib.Path({str(tmp_path)!r}); make.write_instructions()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
    for path in (quickstart.TRAIN, quickstart.TEST):
        assert (tmp_path / "quickstart" / path.name).read_text() == path.read_text()


def test_a_second_quickstart_replaces_the_first_and_leaves_other_folders_alone(tmp_path):
    wanted = tmp_path / "quickstart"
    assert quickstart.fresh_folder(wanted) == wanted
    wanted.mkdir()
    (wanted / "config.yaml").write_text(f"dataset:\n  source: {quickstart.TRAIN}\n")
    (wanted / "model").mkdir()
    assert quickstart.fresh_folder(wanted) == wanted and not wanted.exists()
    wanted.mkdir()
    with (wanted / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a run does that goes on now
        assert quickstart.fresh_folder(wanted) == tmp_path / "quickstart-2"
    (wanted / "thesis.txt").write_text("years of work")
    assert quickstart.fresh_folder(wanted) == tmp_path / "quickstart-2"
    assert (wanted / "thesis.txt").exists()


def test_the_score_is_exact_match():
    questions = [quickstart.Question("sum", "What is 1 + 1?", "2"), quickstart.Question("sum", "What is 1 + 2?", "3")]
    assert quickstart.score(questions, ["2", "3."]) == 1


def test_the_config_of_the_run_is_valid():
    words = ["sft", "+lora", f"model={quickstart.BASE}", f"dataset.source={quickstart.TRAIN}", *quickstart.SETTINGS]
    assert tunesmith.load_config(*words).weights.type == "lora"


def test_the_base_model_knows_hardly_an_answer_in_the_chat_format():
    questions = quickstart.read_questions(quickstart.TEST)[::8]
    assert quickstart.score(questions, quickstart.answers(quickstart.BASE, questions)) <= len(questions) * 0.15
