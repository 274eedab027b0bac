"""Runs whose output_dir is a URL: killed, failing, going on elsewhere. What is there is always whole, and nothing is lost."""

import json
import random
import re
import shutil
import signal
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from safetensors.torch import load_file

from tests.distributed import run_distributed
from tests.other_process import train_in_process
from tests.recipes.test_layouts import run_recipe
from tunesmith import hub, remote
from tunesmith.config import load_config, run
from tunesmith.errors import UserError
from tunesmith.training import preflight


class Bucket(MemoryFileSystem):
    """bucket://name/…: a store in memory of which a test may see, and spoil, every operation."""

    protocol = "bucket"
    store = {}
    pseudo_dirs = [""]
    cachable = False
    before = staticmethod(lambda operation, path: None)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("bucket://").strip("/")

    def put_file(self, lpath, rpath, **options):
        type(self).before("put", rpath)
        super().put_file(lpath, rpath, **options)

    def pipe_file(self, path, value, **options):
        type(self).before("put", path)
        super().pipe_file(path, value, **options)

    def rm_file(self, path):
        type(self).before("remove", path)
        super().rm_file(path)

    def get_file(self, rpath, lpath, **options):
        type(self).before("get", rpath)
        super().get_file(rpath, lpath, **options)


URL = "bucket://ours/run"


@pytest.fixture
def bucket(monkeypatch):
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    monkeypatch.setattr(remote, "_PAUSES", (0.0,))
    return monkeypatch


@pytest.fixture
def words(tmp_path, tiny_model, chat_file, monkeypatch):
    """Of a run of 6 steps with 3 checkpoints, in a cache of its own."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "here"))
    found = ["sft", f"model={tiny_model}", f"dataset.source={chat_file}", "dtype=fp32", "seed=1", "max_steps=6"]
    return [*found, "epochs=2", "save_every_n_steps=2", "device=cpu", "lr_scheduler.type=constant"]


def there(*ending):
    """Names of the files in the bucket that end so."""
    return sorted(name.removeprefix("/ours/run/") for name in Bucket.store if name.endswith(ending or ""))


def outcome(folder):
    """Losses, norms and final weights of a run folder that is whole."""
    newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    assert json.loads((newest / "resume" / "state.json").read_text())["digests"].keys() <= {
        str(path.relative_to(newest)) for path in newest.rglob("*")
    }
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tensors = {}
    for file in newest.glob("*.safetensors"):
        tensors |= load_file(file)
    return newest.name, [(row["step"], row["loss"], row["grad_norm"]) for row in rows], tensors


def copied(target):
    """What is in the bucket, as a folder."""
    for name, file in Bucket.store.items():
        path = target / name.removeprefix("/ours/run/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
    return target


def assert_same(found, expected):
    assert found[:2] == expected[:2] and found[2].keys() == expected[2].keys()
    assert all(torch.equal(tensor, expected[2][name]) for name, tensor in found[2].items())


@pytest.fixture
def whole(words, tmp_path):
    run(load_config(*words, f"output_dir={tmp_path / 'whole'}"))
    return outcome(tmp_path / "whole")


@pytest.mark.parametrize("background", ["false", "true"])
def test_everything_gets_there_and_old_checkpoints_go(bucket, words, whole, tmp_path, capfd, background):
    seen = []
    bucket.setattr(Bucket, "before", lambda operation, path: seen.append((operation, path.rpartition("run/")[2])))
    config = load_config(
        *words, f"output_dir={URL}", "keep_last_n_checkpoints=2", f"enable_async_checkpointing={background}"
    )
    [note] = preflight.check(config)
    assert note.startswith(f"{URL} is looked at when the run starts; the run works in {tmp_path / 'here' / 'runs'}")
    run(config)
    assert_same(outcome(copied(tmp_path / "copy")), whole)
    assert there("state.json") == [f"checkpoints/step-0000000{step}/resume/state.json" for step in (4, 6)]
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "report.html", "data_report.json", "environment.json"}
    assert URL in (tmp_path / "copy" / "config.yaml").read_text()
    said = capfd.readouterr().err
    assert f"saved after step 6: {URL}/checkpoints/step-00000006\nreport: {URL}/report.html\na copy of both: " in said
    # The file that makes a checkpoint one comes last, and goes first.
    for step in (2, 4, 6):
        own = [item for item in seen if item[1].startswith(f"checkpoints/step-0000000{step}/")]
        puts, removed = ([path for what, path in own if what == kind] for kind in ("put", "remove"))
        assert puts[-1].endswith("resume/state.json") and puts.count(puts[-1]) == 1
        assert removed[:1] == puts[-1:] if step == 2 else not removed
        latest = seen.index(("put", puts[-1])) + 1
        assert seen[latest] == ("put", "checkpoints/latest")
        assert ("put", "metrics.jsonl") in seen[:latest] and ("put", "report.html") in seen[:latest]
    model = hub.resolve(f"{URL}/checkpoints/latest")
    assert torch.equal(load_file(model / "model.safetensors")["lm_head.weight"], whole[2]["lm_head.weight"])
    assert not (model / "resume").exists()


@pytest.mark.parametrize("background", ["false", "true"])
def test_it_goes_on_elsewhere(bucket, words, whole, tmp_path, background):
    words += [f"output_dir={URL}", f"enable_async_checkpointing={background}", "resume_from_checkpoint=true"]
    for machine, steps in enumerate((2, 3, 6)):
        bucket.setenv("TUNESMITH_CACHE", str(tmp_path / str(machine)))
        run(load_config(*words, f"max_steps={steps}"))
        own = remote.working_folder(URL)
        assert sorted(path.name for path in (own / "checkpoints").glob("step-*"))[-1] == f"step-{steps:08d}"
    assert_same(outcome(copied(tmp_path / "copy")), whole)
    # The first machine has an older one: it takes what is there; nothing is left to do.
    bucket.setenv("TUNESMITH_CACHE", str(tmp_path / "0"))
    run(load_config(*words))
    assert_same(outcome(remote.working_folder(URL)), whole)


def test_refused_where_something_is(bucket, words, tmp_path):
    words += [f"output_dir={URL}"]
    run(load_config(*words, "max_steps=1"))
    for cache in ("here", "elsewhere"):
        bucket.setenv("TUNESMITH_CACHE", str(tmp_path / cache))
        with pytest.raises(UserError, match=f"output_dir {URL} is not empty: set `resume_from_checkpoint=true`"):
            run(load_config(*words))
    # Who removes it there starts afresh, whatever is left here; also with `resume_from_checkpoint`.
    for more in ([], ["resume_from_checkpoint=true"]):
        bucket.setenv("TUNESMITH_CACHE", str(tmp_path / "here"))
        Bucket.store.clear()
        run(load_config(*words, "max_steps=2", *more))
        assert there("state.json") == ["checkpoints/step-00000002/resume/state.json"]
        losses = (remote.working_folder(URL) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in losses] == [1, 2]


def fail(times, error=None):
    left, error = [times], error or OSError("the line is cut")

    def before(operation, path):
        if operation == "put" and "step-00000004" in path:
            left[0] -= 1
            if left[0] >= 0:
                raise error

    return staticmethod(before)


def test_a_line_that_is_cut_for_a_moment_is_no_failure(bucket, words, whole, tmp_path):
    bucket.setattr(Bucket, "before", fail(1))
    run(load_config(*words, f"output_dir={URL}"))
    assert_same(outcome(copied(tmp_path / "copy")), whole)


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_failed_upload_loses_nothing(bucket, words, whole, tmp_path, background):
    words += [f"output_dir={URL}", f"enable_async_checkpointing={background}"]
    bucket.setattr(Bucket, "before", fail(1000))
    with pytest.raises(UserError) as raised:
        run(load_config(*words))
    local = remote.working_folder(URL) / "checkpoints" / "step-00000004"
    assert str(raised.value) == (
        f"{URL} can't be written (the line is cut): check the address, your credentials and the network; "
        f"the checkpoint is whole in {local}, and `resume_from_checkpoint=true` on this machine uploads it and goes on"
    )
    assert (local / "resume" / "state.json").is_file()
    assert there("state.json") == ["checkpoints/step-00000002/resume/state.json"]
    assert Bucket.store["/ours/run/checkpoints/latest"].getvalue() == b"step-00000002\n"
    bucket.setattr(Bucket, "before", lambda operation, path: None)
    resumed = copied_store()
    run(load_config(*words, "resume_from_checkpoint=true"))
    assert_same(outcome(copied(tmp_path / "copy")), whole)
    # Elsewhere the run goes on from what had got there.
    Bucket.store.clear()
    Bucket.store.update(resumed)
    bucket.setenv("TUNESMITH_CACHE", str(tmp_path / "elsewhere"))
    run(load_config(*words, "resume_from_checkpoint=true"))
    shutil.rmtree(tmp_path / "copy")
    assert_same(outcome(copied(tmp_path / "copy")), whole)


def copied_store():
    return {name: type(file)(Bucket(), name, file.getvalue()) for name, file in Bucket.store.items()}


def test_what_never_got_there_is_not_thrown_away(bucket, words):
    words += [f"output_dir={URL}", "save_every_n_steps=4"]
    bucket.setattr(Bucket, "before", fail(1000, PermissionError("Access Denied")))
    with pytest.raises(UserError, match="can't be written .Access Denied.: check the address, your credentials"):
        run(load_config(*words))
    with pytest.raises(UserError, match=f"{URL} is empty, but .*step-00000004 was saved for it and never got there"):
        run(load_config(*words))


def test_mistakes_are_told_before_anything_is_loaded(bucket, words, tmp_path):
    def lacks(operation, path):
        raise FileNotFoundError("The specified bucket does not exist")

    with pytest.raises(UserError, match=r"`output_dir`: no protocol nonsense:// is known to fsspec"):
        preflight.check(load_config(*words, "output_dir=nonsense://a/b"))
    bucket.setitem(known_implementations, "cellar", {"class": "cellarfs.CellarFileSystem"})
    with pytest.raises(
        UserError, match=r"cellar://a/b needs the package cellarfs, which is not installed: pip install"
    ):
        preflight.check(load_config(*words, "output_dir=cellar://a/b"))
    bucket.setattr(Bucket, "before", lacks)
    before = [*(tmp_path / "here").rglob("*.safetensors")]
    with pytest.raises(UserError, match=f"{URL} can't be written .The specified bucket does not exist.: check the"):
        run(load_config(*words, f"output_dir={URL}"))
    assert [*(tmp_path / "here").rglob("*.safetensors")] == before
    assert not list(remote.working_folder(URL).glob("*")), "the next try finds it as it was"


def test_who_comes_later_takes_over(bucket, words, tmp_path):
    """A machine that was given up, and is not dead, writes nothing more."""
    words += [f"output_dir={URL}", "resume_from_checkpoint=true"]
    run(load_config(*words, "max_steps=2"))

    def another(operation, path):
        if path.endswith("metrics.jsonl") and operation == "put":
            record = json.dumps({"host": "node2", "pid": 7, "claim": "another"}).encode()
            MemoryFileSystem.pipe_file(Bucket(), "bucket://ours/run/.lock", record)

    bucket.setattr(Bucket, "before", another)
    with pytest.raises(
        UserError, match=r"another run has taken over .* \(process 7 on node2\), and this one ends; the che"
    ):
        run(load_config(*words, "max_steps=6"))
    assert json.loads(Bucket.store["/ours/run/.lock"].getvalue())["host"] == "node2"


def test_a_damaged_copy_says_where_both_are(bucket, words):
    words += [f"output_dir={URL}"]
    run(load_config(*words, "max_steps=2"))
    shutil.rmtree(remote.working_folder(URL))
    name = "/ours/run/checkpoints/step-00000002/model.safetensors"
    content = Bucket.store[name].getvalue()
    Bucket.store[name] = type(Bucket.store[name])(Bucket(), name, content[:-1] + bytes([content[-1] ^ 1]))
    said = f"is not what was written.*; remove {remote.working_folder(URL)}.*, and it is fetched again; or {URL}/checkp"
    with pytest.raises(UserError, match=said):
        run(load_config(*words, "resume_from_checkpoint=true"))


@pytest.mark.parametrize("background", ["false", "true"])
def test_killed_at_any_operation_and_resumed_here_or_elsewhere(words, whole, tmp_path, monkeypatch, background):
    """SIGKILL at the n-th touch of a file, here or there; each time the next machine may be another one."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "killed" / "0"))
    more = ["resume_from_checkpoint=true", "keep_last_n_checkpoints=2", f"enable_async_checkpointing={background}"]
    url = f"file://{tmp_path}/killed/store/run"
    (tmp_path / "killed").mkdir()
    chance, kills = random.Random(f"{background}"), 0
    for attempt in range(10):
        where, most = chance.choice([("store", 50), ("", 150)])
        code = train_in_process_with_cache(
            [*words, f"output_dir={url}", *more],
            tmp_path / "killed" / str(attempt // 2 if chance.random() < 0.5 else 99),
            kill_at=chance.randint(5, most),
            folder=tmp_path / "killed" / where,
        )
        check_store(Path(url.removeprefix("file://")))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    else:
        assert train_in_process_with_cache([*words, f"output_dir={url}", *more], tmp_path / "killed" / "last") == 0
    assert kills > 1
    assert_same(outcome(Path(url.removeprefix("file://"))), whole)
    found = sorted(path.name for path in (tmp_path / "killed" / "store" / "run" / "checkpoints").glob("step-*"))
    assert found == ["step-00000004", "step-00000006"]


def train_in_process_with_cache(words, cache, **kill):
    return train_in_process(words, **kill, environment={"TUNESMITH_CACHE": str(cache)})


def check_store(folder):
    """What counts as a checkpoint there is whole."""
    for state in folder.glob("checkpoints/*/resume/state.json"):
        try:
            digests = json.loads(state.read_text())["digests"]
        except ValueError:
            continue  # cut off in its last moment
        assert all((state.parents[1] / name).is_file() for name in digests)


def test_two_ranks_share_the_work(words, tmp_path):
    url = f"file://{tmp_path}/store"
    words += ["batch_size=1", "global_batch_size=2"]
    assert run_distributed(run_recipe, 2, words, tmp_path / "whole") == [0, 0]
    for steps in (3, 6):
        shutil.rmtree(tmp_path / "here", ignore_errors=True)
        more = [f"max_steps={steps}", "resume_from_checkpoint=true", "enable_async_checkpointing=true"]
        assert run_distributed(run_recipe, 2, [*words, *more], url) == [0, 0]
    assert_same(outcome(tmp_path / "store"), outcome(tmp_path / "whole"))
    assert not re.search(r"\.partial|\.uploaded", " ".join(map(str, (tmp_path / "store").rglob("*"))))
