"""The sft and pretrain recipes as a user runs them: same numbers for every cut and weight type, exact resume, run folder, stops."""

import errno
import json
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from other_process import train_in_process
from safetensors.torch import load_file, save_file

from tunesmith.config import load_config, run
from tunesmith.errors import UserError

WEIGHTS = {
    "full": [],
    "lora": ["+lora"],
    "dora": ["+dora"],
    "qlora": ["+qlora"],
}
NEW_TOKENS = f"[{','.join(f'<new{i}>' for i in range(80))}]"  # more than the spare rows of the embedding
VARYING = {"tokens_per_second", "tflops_per_device", "step_seconds", "data_seconds", "peak_memory_gib"}


def words(folder, tiny_model, chat_file, *more, recipe="sft"):
    return [
        recipe,
        f"model={tiny_model}",
        f"dataset.source={chat_file}",
        f"output_dir={folder}",
        "device=cpu",
        "dtype=fp32",
        "batch_size=4",
        "optimizer.lr=1e-3",
        "clip_grad_norm=1.0",
        "max_steps=6",
        *more,
    ]


def train(*args, **kwargs):
    run(load_config(*words(*args, **kwargs)))
    return Path(args[0])


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in VARYING} for row in rows]


def latest(folder):
    return folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()


def weights(folder):
    tensors = {}
    for file in sorted(latest(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_same_losses_for_every_cut_of_the_batch(tmp_path, tiny_model, chat_file, kind):
    curves = []
    for index, cut in enumerate(
        (["batch_size=4"], ["batch_size=2", "gradient_accumulation_steps=2"], ["batch_size=1", "global_batch_size=4"])
    ):
        folder = train(tmp_path / str(index), tiny_model, chat_file, *WEIGHTS[kind], *cut, "max_steps=4")
        curves.append([(row["loss"], row["grad_norm"]) for row in metrics(folder)])
    assert len(curves[0]) == 4 and curves[0][0] != curves[0][1]
    for curve in curves[1:]:
        assert [x for pair in curve for x in pair] == pytest.approx([x for pair in curves[0] for x in pair], rel=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["+lora", "weights.dropout=0.1"],
        ["+dora"],
        ["+qlora"],
        ["dataset.packed=true", "tokenizer.max_seq_len=64", "batch_size=1"],
        ["dtype=bf16", "optimizer_in_bwd=true", "~clip_grad_norm"],
        ["enable_async_checkpointing=true", "keep_last_n_checkpoints=1"],
        ["dataset.streaming=true"],
        ["optimizer.type=tests.training.test_optim.Nests"],
        [f"tokenizer.add_tokens={NEW_TOKENS}"],
    ],
    ids=lambda more: "-".join(more).replace("=", "_")[:50] or "plain",
)
def test_stop_and_resume_equals_never_stopped(tmp_path, tiny_model, chat_file, more):
    more = ["save_every_n_steps=3", *more]
    whole = train(tmp_path / "whole", tiny_model, chat_file, *more)
    part = _stopped_at(3, tmp_path / "part", tiny_model, chat_file, more)
    train(part, tiny_model, chat_file, *more, "resume_from_checkpoint=true")
    assert_same_run(whole, part)
    reports = [json.loads((folder / "data_report.json").read_text()) for folder in (whole, part)]
    for report in reports:
        report["sources"][0].pop("from_cache")
    assert reports[0] == reports[1]


def _stopped_at(step, folder, tiny_model, chat_file, more):
    """A run that gets SIGTERM while it computes `step`: it must save after that step and end with 143."""
    assert (
        train_in_process(words(folder, tiny_model, chat_file, *more), stop_at=step, with_signal=signal.SIGTERM) == 143
    )
    assert latest(folder).name == f"step-{step:08d}"
    return folder


def test_interrupt_saves_and_exits_with_130(tmp_path, tiny_model, chat_file):
    code = train_in_process(words(tmp_path / "run", tiny_model, chat_file), stop_at=2, with_signal=signal.SIGINT)
    assert code == 130
    assert latest(tmp_path / "run").name == "step-00000002"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_killed_at_any_moment_and_resumed_equals_never_stopped(tmp_path, tiny_model, chat_file, kind):
    """SIGKILL at the n-th opening, renaming or syncing of a file in the run folder, for n spread over the whole run, saves included."""
    more = [*WEIGHTS[kind], "save_every_n_steps=2", "keep_last_n_checkpoints=2"]
    whole = train(tmp_path / "whole", tiny_model, chat_file, *more)
    folder = tmp_path / "killed"

    resume = words(folder, tiny_model, chat_file, *more, "resume_from_checkpoint=true")
    random.seed(kind)
    kills = 0
    for _ in range(5):
        code = train_in_process(resume, kill_at=random.randint(10, 80), folder=folder)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    else:
        assert train_in_process(resume) == 0
    assert kills
    assert_same_run(whole, folder)
    assert not list((folder / "checkpoints").glob(".*partial"))
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2


def test_the_run_folder_is_complete(tmp_path, tiny_model, chat_file):
    folder = train(
        tmp_path / "run",
        tiny_model,
        chat_file,
        "sample_prompts=[the quick]",
        "save_every_n_steps=4",
        f"dataset_val.source={chat_file}",
        "run_val_every_n_steps=3",
    )
    assert {p.name for p in folder.iterdir()} >= {"config.yaml", "metrics.jsonl", "checkpoints", "report.html"}
    assert [p.name for p in sorted((folder / "checkpoints").glob("step-*"))] == ["step-00000004", "step-00000006"]
    rows = metrics(folder)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    assert {"loss", "grad_norm", "lr", "num_tokens"} <= rows[0].keys()
    again = load_config(str(folder / "config.yaml"), f"output_dir={tmp_path / 'again'}")
    run(again)
    assert metrics(tmp_path / "again") == rows


def test_every_checkpoint_is_a_repository_that_transformers_loads(tmp_path, tiny_model, chat_file):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import tunesmith

    folder = latest(train(tmp_path / "run", tiny_model, chat_file))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    theirs = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(tunesmith.load_model(folder).logits(ids), theirs, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).encode("the quick") == tunesmith.load_tokenizer(folder).encode(
        "the quick"
    )


def test_adapter_checkpoints_load_in_peft(tmp_path, tiny_model, chat_file):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import tunesmith

    for kind in ("lora", "dora"):
        folder = latest(train(tmp_path / kind, tiny_model, chat_file, *WEIGHTS[kind]))
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        theirs = PeftModel.from_pretrained(base, folder)(ids).logits
        torch.testing.assert_close(tunesmith.load_model(folder).logits(ids), theirs, rtol=1e-5, atol=1e-5)


def test_training_goes_on_from_a_peft_adapter(tmp_path, tiny_model, chat_file):
    first = train(tmp_path / "first", tiny_model, chat_file, "+lora", "weights.rank=4")
    second = train(tmp_path / "second", tiny_model, chat_file, "+lora", f"weights.adapter={latest(first)}")
    assert metrics(second)[0]["loss"] < metrics(first)[0]["loss"]
    assert weights(second)[next(n for n in weights(second) if "lora_A" in n)].shape[0] == 4


def test_a_used_folder_and_a_changed_run_are_refused(tmp_path, tiny_model, chat_file):
    folder = train(tmp_path / "run", tiny_model, chat_file, "max_steps=2")
    with pytest.raises(UserError, match="not empty"):
        train(folder, tiny_model, chat_file)
    with pytest.raises(UserError, match="can't be resumed"):
        train(folder, tiny_model, chat_file, "resume_from_checkpoint=true", "seed=7")


def test_a_corrupt_checkpoint_is_refused_and_named(tmp_path, tiny_model, chat_file):
    folder = train(tmp_path / "run", tiny_model, chat_file, "max_steps=2")
    file = next(latest(folder).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=file.name):
        train(folder, tiny_model, chat_file, "resume_from_checkpoint=true")


def test_two_runs_can_not_write_into_one_folder(tmp_path, tiny_model, chat_file):
    from tunesmith.training.start import start_run

    resume = words(tmp_path / "run", tiny_model, chat_file, "resume_from_checkpoint=true")
    with start_run(load_config(*resume), "sft"), pytest.raises(UserError, match="another run is writing"):
        run(load_config(*resume))


@pytest.mark.parametrize("more", [[], ["from_scratch=false"]])
def test_pretrain_lowers_the_loss_of_text(tmp_path, tiny_model, more):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    config = load_config(
        "pretrain", f"model={tiny_model}", f"dataset.source={text}", f"output_dir={tmp_path / 'run'}", "device=cpu",
        "dtype=fp32", "tokenizer.max_seq_len=32", "batch_size=8", "max_steps=8", "optimizer.lr=1e-2", "lr_scheduler.type=constant", *more,
    )  # fmt: skip
    run(config)
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] * 0.8


def test_a_restart_by_torchrun_resumes_by_itself(tmp_path, tiny_model, chat_file, monkeypatch):
    whole = train(tmp_path / "whole", tiny_model, chat_file, "save_every_n_steps=3")
    part = _stopped_at(3, tmp_path / "part", tiny_model, chat_file, ["save_every_n_steps=3"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(part, tiny_model, chat_file, "save_every_n_steps=3")
    assert_same_run(whole, part)


def test_a_drawn_seed_is_kept_by_a_resume(tmp_path, tiny_model, chat_file):
    part = _stopped_at(3, tmp_path / "part", tiny_model, chat_file, ["seed=null"])
    seed = load_config(str(part / "config.yaml")).seed
    train(part, tiny_model, chat_file, "seed=null", "resume_from_checkpoint=true")
    whole = train(tmp_path / "whole", tiny_model, chat_file, f"seed={seed}")
    assert_same_run(whole, part)


@pytest.mark.parametrize(
    ("change", "named"),
    [("seed=7", "seed"), ("+lora", "weights"), ("global_batch_size=8", "global_batch_size"), ("dtype=bf16", "dtype")],
)
def test_a_refused_resume_names_the_change_and_leaves_the_folder_as_it_was(
    tmp_path, tiny_model, chat_file, change, named
):
    folder = train(tmp_path / "run", tiny_model, chat_file, "max_steps=2")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"can't be resumed.* {named} was"):
        train(folder, tiny_model, chat_file, "resume_from_checkpoint=true", change)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_refused_resume_lets_go_of_the_folder(tmp_path, tiny_model, chat_file):
    folder = train(tmp_path / "run", tiny_model, chat_file, "max_steps=2")
    state = latest(folder) / "resume" / "state.json"
    whole = state.read_text()
    state.write_text(whole[:-20])
    with pytest.raises(UserError, match="state.json"):
        train(folder, tiny_model, chat_file, "max_steps=3", "resume_from_checkpoint=true")
    state.write_text(whole)
    train(folder, tiny_model, chat_file, "max_steps=3", "resume_from_checkpoint=true")
    assert latest(folder).name == "step-00000003"


def test_pretrain_refuses_to_resume_with_other_numbers_of_the_model(tmp_path, tiny_model):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    more = (
        "pretrain", f"model={tiny_model}", f"dataset.source={text}", f"output_dir={tmp_path / 'run'}", "device=cpu",
        "dtype=fp32", "tokenizer.max_seq_len=32", "batch_size=4", "resume_from_checkpoint=true",
    )  # fmt: skip
    run(load_config(*more, "max_steps=2"))
    with pytest.raises(UserError, match="can't be resumed.* model changed"):
        run(load_config(*more, "max_steps=3", "model_args={rope_theta: 500.0}"))


def test_a_longer_schedule_is_told(tmp_path, tiny_model, chat_file, capsys):
    folder = train(tmp_path / "run", tiny_model, chat_file, "max_steps=2")
    capsys.readouterr()
    train(folder, tiny_model, chat_file, "max_steps=4", "resume_from_checkpoint=true")
    assert "planned for 2 steps and is now for 4" in capsys.readouterr().out
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(tmp_path, tiny_model, chat_file):
    more = ["+lora", "sample_prompts=[the quick]", f"dataset_val.source={chat_file}", "max_steps=2"]
    folder = train(tmp_path / "run", tiny_model, chat_file, *more)
    rows, samples = metrics(folder), (folder / "samples.jsonl").read_text()
    train(folder, tiny_model, chat_file, *more, "resume_from_checkpoint=true")
    assert metrics(folder) == rows and (folder / "samples.jsonl").read_text() == samples


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_ends_the_run_with_a_sentence_and_leaves_earlier_checkpoints_whole(
    tmp_path, tiny_model, chat_file, monkeypatch, background
):
    from tunesmith.checkpoint import resume

    more = ["save_every_n_steps=2", "keep_last_n_checkpoints=1", f"enable_async_checkpointing={background}"]
    whole = train(tmp_path / "whole", tiny_model, chat_file, *more)
    folder, write = tmp_path / "run", resume.write_tensors

    def full(tensors, place, *args, **kwargs):
        if "step-00000004" in str(place):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(tensors, place, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "write_tensors", full)
        with pytest.raises(UserError, match="no space left.*step-00000004"):
            train(folder, tiny_model, chat_file, *more)
    assert latest(folder).name == "step-00000002"
    assert not list((folder / "checkpoints").glob(".*"))
    train(folder, tiny_model, chat_file, *more, "resume_from_checkpoint=true")
    assert_same_run(whole, folder)


def test_a_signal_during_the_last_background_save_loses_nothing(tmp_path, tiny_model, chat_file, monkeypatch):
    """The last checkpoint is still being written when the loop is over: SIGTERM must wait for it."""
    from tunesmith.checkpoint.resume import Checkpoints

    write = Checkpoints._write

    def slowly(self, *args):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        write(self, *args)

    monkeypatch.setattr(Checkpoints, "_write", slowly)
    before = signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("nobody waits for the checkpoint"))
    try:
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path / "run", tiny_model, chat_file, "max_steps=1", "enable_async_checkpointing=true")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert latest(tmp_path / "run").name == "step-00000001"


def test_a_signal_while_a_line_is_written_does_not_break_the_run(tmp_path, tiny_model, chat_file):
    """Printing from a signal handler inside print() fails in Python: the run must save and end all the same."""
    import io

    from tunesmith.training.progress import Progress
    from tunesmith.training.signals import stop_on_signal
    from tunesmith.training.start import start_run

    class Interrupting(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            if not run.stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            return len(data)

    with (
        start_run(load_config(*words(tmp_path / "run", tiny_model, chat_file)), "sft") as run,
        stop_on_signal(run._ask_to_stop),
    ):
        run._progress = Progress(1, stream=io.TextIOWrapper(io.BufferedWriter(Interrupting())))
        run.note("a line")
        assert run.stopped


def test_sigterm_while_a_failed_run_cleans_up_is_no_wish_to_end(tmp_path, tiny_model, chat_file, monkeypatch):
    """torchrun sends it to the ranks that are left when one has died; taken for a wish, the run would not be started again."""
    from tunesmith.training.run import Run
    from tunesmith.training.start import start_run

    close = Run.close

    def close_slowly(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        close(self)

    monkeypatch.setattr(Run, "close", close_slowly)
    before = signal.getsignal(signal.SIGTERM)
    settings = words(tmp_path / "run", tiny_model, chat_file)
    with pytest.raises(ZeroDivisionError), start_run(load_config(*settings), "sft"):
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_outside_the_main_thread_works(tmp_path, tiny_model, chat_file):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train, tmp_path / "run", tiny_model, chat_file, "max_steps=1").result()
    assert latest(tmp_path / "run").name == "step-00000001"


def test_an_error_waits_for_the_save_in_the_background(tmp_path, tiny_model, chat_file, monkeypatch):
    from tunesmith.checkpoint.resume import Checkpoints
    from tunesmith.recipes import sft

    write, step = Checkpoints._write, sft.train_step

    def slowly(self, *args):
        time.sleep(0.3)
        write(self, *args)

    def failing(*args):
        if args[-1] == 2:
            raise UserError("step 2 fails")
        return step(*args)

    monkeypatch.setattr(Checkpoints, "_write", slowly)
    monkeypatch.setattr(sft, "train_step", failing)
    with pytest.raises(UserError, match="step 2 fails"):
        train(tmp_path / "run", tiny_model, chat_file, "save_every_n_steps=1", "enable_async_checkpointing=true")
    assert latest(tmp_path / "run").name == "step-00000001"


def test_files_that_differ_from_memory_are_an_error(tmp_path, tiny_model, chat_file, monkeypatch):
    from tunesmith.checkpoint import write

    make = write.Outgoing.own

    def wrong(self):
        values = make(self)
        return values.flip(0) if values.shape == (64, 128) else values

    monkeypatch.setattr(write.Outgoing, "own", wrong)
    with pytest.raises(UserError, match="other logits"):
        train(tmp_path / "run", tiny_model, chat_file, "max_steps=1")


def test_an_adapter_that_learns_nothing_is_an_error(tmp_path, tiny_model, chat_file):
    with pytest.raises(UserError, match="changes nothing"):
        train(tmp_path / "run", tiny_model, chat_file, "+lora", "max_steps=1", "optimizer.lr=0")


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_grow_the_model_that_is_saved(tmp_path, tiny_model, chat_file, tied):
    import tunesmith

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    if tied:
        numbers = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": True}
        (model / "config.json").write_text(json.dumps(numbers))
        tensors = load_file(model / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, model / "model.safetensors")
    folder = latest(
        train(tmp_path / "run", model, chat_file, f"tokenizer.add_tokens={NEW_TOKENS}", "optimizer_in_bwd=true",
              "~clip_grad_norm", "max_steps=2")
    )  # fmt: skip
    rows = tunesmith.load_tokenizer(folder).vocab_size
    saved = tunesmith.load_model(folder)
    assert rows > 320 and saved.config.vocab_size == rows and saved.model.embed_tokens.weight.shape[0] == rows
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    assert (saved.lm_head.tied_to is saved.model.embed_tokens) is tied


def test_the_report_counts_what_a_stream_gave(tmp_path, tiny_model, chat_file):
    folder = train(tmp_path / "run", tiny_model, chat_file, "dataset.streaming=true", "max_steps=3")
    assert '"rows_used": 0' not in (folder / "data_report.json").read_text()


@pytest.mark.parametrize("recipe", ["sft", "pretrain"])
@pytest.mark.parametrize("mistake", ["targets", "tokenizer", "grown", "adapter", "adapter's shape", "weights", "bf16"])
def test_what_does_not_fit_the_model_is_told_before_the_data_are_read(
    tmp_path, tiny_model, chat_file, monkeypatch, recipe, mistake
):
    """Also where the check before the run can't see it, as for models that come from the Hub."""
    from tunesmith.recipes import pretrain, sft
    from tunesmith.training import build, start

    model, lora = shutil.copytree(tiny_model, tmp_path / "model"), ["+lora"]
    if mistake == "tokenizer":
        change_numbers(model, vocab_size=300)
    if mistake == "weights":
        change_numbers(model, intermediate_size=96)
    if mistake.startswith("adapter"):
        first = train(tmp_path / "first", model, chat_file, "+lora", "max_steps=1")
        lora.append(f"weights.adapter={latest(first)}")
        change_numbers(model, **({"num_hidden_layers": 1} if mistake == "adapter" else {"intermediate_size": 96}))
    more, said = {
        "bf16": (["dtype=bf16"], "cpu has no bf16: use `dtype: fp16` or `dtype: fp32`"),
        "targets": ([*lora, "weights.target_modules=[q_prj]"], "target_modules names 'q_prj'"),
        "tokenizer": ([], "they don't belong together"),
        "grown": ([*lora, f"tokenizer.add_tokens={NEW_TOKENS}"], "an adapter doesn't hold"),
        "adapter": (lora, "doesn't fit this model: it has weights for model.layers.1"),
        "adapter's shape": (lora, "doesn't fit this model: its .* has the shape"),
        "weights": (
            [],
            r"mlp.gate_proj.weight has the shape \(\d+, 64\), but the model, going by its config.json, \(96, 64\): ",
        ),
    }[mistake]
    if mistake == "bf16":
        monkeypatch.setattr(build, "supports_bf16", lambda device: False)
    monkeypatch.setattr(start, "check", lambda config, **options: [])
    for module, reads in ((sft, "chat_batches"), (pretrain, "text_batches")):
        monkeypatch.setattr(module, reads, lambda *args, **kwargs: pytest.fail("the data were read"))
    if recipe == "pretrain":
        more = ["from_scratch=false", *more]
    with pytest.raises(UserError, match=said):
        train(tmp_path / "run", model, chat_file, *more, recipe=recipe)


def change_numbers(model, **numbers):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | numbers))


@pytest.mark.parametrize("length", [512, 513])
def test_rows_longer_than_the_model_is_made_for_are_noted_once(tmp_path, tiny_model, chat_file, capsys, length):
    train(tmp_path / "run", tiny_model, chat_file, f"tokenizer.max_seq_len={length}", "max_steps=1")
    shown = "".join(capsys.readouterr())
    assert shown.count("is more than the 512 tokens that") == (length > 512)
