"""What can't work on several ranks is refused at start, by every rank with the same sentence."""

import json
import platform
import shutil
from pathlib import Path

import pytest
from distributed import run_distributed

from tunesmith.config import load_config
from tunesmith.configs.layout import QUANTIZED_BLOCK, Layout
from tunesmith.errors import ConfigError, UserError
from tunesmith.nn.config import DecoderConfig
from tunesmith.training import preflight

SHAPE = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=384, num_hidden_layers=6, head_dim=32)


def shape(**changes) -> DecoderConfig:
    from types import SimpleNamespace

    return SimpleNamespace(**{**SHAPE, **changes})  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(tp=3), ["`tensor_parallel_dim: 3` does not divide the model's 4 attention heads", "2 key-value heads"]),
        (Layout(tp=4), ["`tensor_parallel_dim: 4` does not divide the model's 2 key-value heads: take 1 or 2"]),
        (Layout(tp=2, pp=6), []),
    ],
)
def test_what_a_layout_cannot_cut(layout, said):
    problems = list(layout.problems(shape()))
    assert len(problems) == len(said) and all(part in problem for part, problem in zip(said, problems))


def test_blocks_of_quantized_weights_stay_whole():
    assert not list(Layout(tp=2).problems(shape(), quantized=True))
    (problem,) = Layout(tp=2).problems(shape(intermediate_size=192), quantized=True)
    assert "`quantize_base`" in problem and "`tensor_parallel_dim: 2`" in problem and str(QUANTIZED_BLOCK) in problem


@pytest.mark.parametrize(
    ("layout", "length", "sequence_parallel", "multiple"),
    [
        (Layout(cp=2), 64, True, None),
        (Layout(cp=2), None, True, None),
        (Layout(cp=2), 66, True, 4),
        (Layout(cp=2, tp=2), 68, True, 8),
        (Layout(cp=2, tp=2), 68, False, None),
        (Layout(tp=2), 65, True, None),  # rows of another length are padded: no one asked for more than one chunk
    ],
)
def test_rows_are_shared_evenly(layout, length, sequence_parallel, multiple):
    problem = layout.length_problem(length, sequence_parallel)
    assert problem is None if multiple is None else f"multiple of {multiple} " in str(problem)


def test_told_before_anything_starts(tmp_path, monkeypatch):
    """By `tune validate` and `tune run` alike, from the model's config.json."""
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text('{"text": "ab"}')
    tiny = Path(preflight.__file__).parents[2] / "assets" / "tiny"
    words = ["sft", f"model={tiny}", "dataset.source=chats.jsonl", "tensor_parallel_dim=4", "context_parallel_dim=2"]
    config = load_config(*words, "tokenizer.max_seq_len=50", "pipeline_parallel_dim=8", "gradient_accumulation_steps=8")
    with pytest.raises(ConfigError) as error:
        preflight.check(config, processes=2)
    said = str(error.value).splitlines()
    assert len(said) == 4, said
    for part in (
        "2 key-value heads",
        "more than the model's 6 layers",
        "must be a multiple of 16",
        "needs a multiple of 64",
    ):
        assert any(part in line for line in said), part


def _said(function) -> str:
    try:
        function()
    except UserError as error:
        return str(error)
    return "nothing"


def _words(tmp_path, tiny_model, chat_file) -> list[str]:
    run = f"output_dir={tmp_path / 'run'}"
    return ["sft", f"model={tiny_model}", f"dataset.source={chat_file}", "dtype=fp32", run]


def _other_config(words: list[str], changes: list[str], version: str | None) -> str:
    import os

    import tunesmith
    from tunesmith.training.start import start_run

    rank = int(os.environ["RANK"])
    if version and rank:
        tunesmith.__version__ = version
    config = load_config(*words, *(changes if rank else []))

    def begin():
        with start_run(config, "sft"):
            pass

    return _said(begin)


@pytest.mark.parametrize(
    ("changes", "version", "said"),
    [
        (["optimizer.lr=0.5"], None, "has another config than rank 0 (on HOST): `lr: 0.5` instead of `lr: 2.0e-5`"),
        (["tensor_parallel_dim=2"], None, "`tensor_parallel_dim: 2` instead of `tensor_parallel_dim: 1`"),
        ([], "0.0.1", "has another version of tunesmith than rank 0 (on HOST): 0.0.1 instead of"),
    ],
)
def test_a_rank_with_another_config_or_version(tmp_path, tiny_model, chat_file, changes, version, said):
    words = _words(tmp_path, tiny_model, chat_file)
    told = run_distributed(_other_config, 2, words, changes, version, timeout=30)
    assert told[0] == told[1] and said.replace("HOST", platform.node()) in told[0]
    assert not (tmp_path / "run").exists()


def test_a_device_without_asynchronous_tensor_parallelism(tmp_path, tiny_model, chat_file):
    options = ["tensor_parallel_dim=2", "compile=true", "enable_async_tensor_parallel=true"]
    words = [*_words(tmp_path, tiny_model, chat_file), *options]
    told = run_distributed(_other_config, 2, words, [], None)
    assert told[0] == told[1] and "`enable_async_tensor_parallel` needs GPUs that read each other's memory" in told[0]
    assert not (tmp_path / "run").exists()


def _look_at_checkpoint(folders: list[Path]) -> str:
    import os

    import torch

    from tunesmith.parallel.mesh import start_mesh
    from tunesmith.training.agreement import check_seen_everywhere

    ranks = start_mesh(torch.device("cpu")).ranks
    return _said(lambda: check_seen_everywhere(folders[int(os.environ["RANK"])], ranks))


@pytest.mark.parametrize("damage", ["none", "file", "size", "all"])
def test_a_checkpoint_that_is_partly_there(tmp_path, damage):
    """On one node: rank 1 sees another folder, as it would without a shared file system."""
    (tmp_path / "a" / "resume").mkdir(parents=True)
    for name in ("model.safetensors", "resume/state.json"):
        (tmp_path / "a" / name).write_text("whole")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    if damage == "file":
        (tmp_path / "b" / "resume" / "state.json").unlink()
    elif damage == "size":
        (tmp_path / "b" / "resume" / "state.json").write_text("cut")
    elif damage == "all":
        shutil.rmtree(tmp_path / "b")
    one, other = run_distributed(_look_at_checkpoint, 2, [tmp_path / "a", tmp_path / "b"], timeout=30)
    assert one == other.replace(f"{tmp_path / 'b'} ", f"{tmp_path / 'a'} ")
    said = {"none": "nothing", "all": "(rank 1) is absent"}.get(
        damage, "resume/state.json is absent or of another size"
    )
    assert said in one


def _claim_folders(folders: list[Path], url: str | None = None) -> str:
    import os

    import torch

    from tunesmith.parallel.mesh import start_mesh
    from tunesmith.training.folder import check_shared, claim

    mesh = start_mesh(torch.device("cpu"))
    folder = folders[int(os.environ["RANK"])]
    if mesh.is_main:
        claim(folder, False)
    return _said(lambda: check_shared(folder, mesh.ranks, url, patience=0.5))


def test_an_output_dir_that_nodes_do_not_share(tmp_path):
    told = run_distributed(_claim_folders, 2, [tmp_path / "a", tmp_path / "b"], timeout=30)
    assert told[0] == told[1] and "name one that all nodes share" in told[0]
    assert run_distributed(_claim_folders, 2, [tmp_path / "c", tmp_path / "c"], timeout=30) == ["nothing", "nothing"]
    told = run_distributed(_claim_folders, 2, [tmp_path / "d", tmp_path / "e"], "s3://ours/run", timeout=30)
    assert told[0] == told[1] and "for s3://ours/run are put together there: set TUNESMITH_CACHE to a folder" in told[0]


class TestTwoRuns:
    """Two runs that would write into one folder."""

    @pytest.fixture(autouse=True)
    def fast(self, monkeypatch):
        from tunesmith.training import folder

        monkeypatch.setattr(folder, "BEAT_SECONDS", 0.2)

    def test_on_one_machine(self, tmp_path):
        from tunesmith.training.folder import claim

        held = claim(tmp_path, False)
        assert "another run is writing" in _said(lambda: claim(tmp_path, True))
        held.release(clean=True)
        claim(tmp_path, False).release(clean=True)

    def test_on_two_nodes_whose_locks_do_not_meet(self, tmp_path, monkeypatch):
        from tunesmith.training import folder

        monkeypatch.setattr(folder, "_lock", lambda descriptor: True)
        monkeypatch.setattr(platform, "node", lambda: "node1")
        held = folder.claim(tmp_path, False)
        monkeypatch.setattr(platform, "node", lambda: "node2")
        # The first node's record still names it: its thread was started before. What it writes now would say node2.
        monkeypatch.setattr(folder, "claimed_by", _claimed_by(folder.claimed_by, "node1"))
        assert "another run is writing" in _said(lambda: folder.claim(tmp_path, True))
        held.release(clean=False)
        folder.claim(tmp_path, True).release(clean=True)  # it was killed: its record is not renewed

    def test_a_restart_of_the_same_launch_goes_on(self, tmp_path, monkeypatch):
        from tunesmith.training.folder import claim

        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
        held = claim(tmp_path, False)
        (tmp_path / "metrics.jsonl").touch()
        held.release(clean=False)
        again = claim(tmp_path, False)
        assert again.resumes
        again.release(clean=False)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
        assert "is not empty" in _said(lambda: claim(tmp_path, False))


def _claimed_by(read, host: str):
    return lambda folder: {**record, "host": host} if (record := read(folder)) else {}


def test_the_lock_is_a_small_record(tmp_path):
    from tunesmith.training.folder import claim, claimed_by

    held = claim(tmp_path, False)
    assert claimed_by(tmp_path)["host"] == platform.node() and json.loads((tmp_path / ".lock").read_text())
    held.release(clean=True)
    assert claimed_by(tmp_path) == {}
