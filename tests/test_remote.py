"""Models in folders that fsspec reaches."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from tunesmith import hub, remote
from tunesmith.errors import MissingExtra, UserError


def test_a_model_at_a_url_is_fetched_once(tmp_path, tiny_model, monkeypatch):
    shutil.copytree(tiny_model, tmp_path / "store")
    (tmp_path / "store" / "pytorch_model.bin").touch()  # the same weights in a form that is not read
    fetched = []
    get = remote._download
    monkeypatch.setattr(remote, "_download", lambda *given: (fetched.append(given), get(*given)))
    url = f"file://{tmp_path / 'store'}"
    threads = [threading.Thread(target=hub.resolve, args=(url,)) for _ in range(3)]  # ranks of a node
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = hub.resolve(url)
    assert len(fetched) == 1
    names = {path.name for path in folder.iterdir()} - {".complete"}
    assert names == {path.name for path in Path(tiny_model).iterdir()}
    (tmp_path / "store" / "config.json").write_text((tiny_model / "config.json").read_text() + "\n")
    assert hub.resolve(url) != folder, "it has changed there"


def test_what_was_cut_off_is_fetched_again(tmp_path, tiny_model, monkeypatch):
    import fsspec

    system = fsspec.filesystem("memory")
    for path in Path(tiny_model).iterdir():
        system.pipe_file(f"/bucket/model/{path.name}", path.read_bytes())
    get, calls = type(system).get_file, []

    def fail(self, path, target, **options):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("the line is cut")
        return get(self, path, target, **options)

    monkeypatch.setattr(type(system), "get_file", fail)
    with pytest.raises(UserError, match="could not be fetched .the line is cut."):
        hub.resolve("memory://bucket/model")
    folder = hub.resolve("memory://bucket/model")
    assert (folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no folder file:///.*absent"):
        hub.resolve(f"file://{tmp_path}/absent")
    with pytest.raises(UserError, match="no protocol nonsense://"):
        hub.resolve("nonsense://bucket/model")
    import fsspec.core

    def lacks(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lacks)
    with pytest.raises(MissingExtra, match=r"needs the package s3fs, .* pip install 'tunesmith\[remote\]'"):
        hub.resolve("s3://bucket/model")


def test_a_run_from_a_url(tmp_path, tiny_model, chat_file, monkeypatch):
    from tunesmith.config import load_config, run
    from tunesmith.training import preflight

    monkeypatch.chdir(tmp_path)
    words = ["sft", f"model=file://{tiny_model}", f"dataset.source={chat_file}", "dtype=fp32", "max_steps=1"]
    assert preflight.check(load_config(*words)) == [f"file://{tiny_model} is fetched when the run starts"]
    run(load_config(*words))
    assert (tmp_path / "run" / "checkpoints" / "step-00000001" / "model.safetensors").is_file()
    assert not os.path.exists("file:")
    with pytest.raises(UserError, match="`output_dir`: s3://bucket/run can't be written to directly"):
        preflight.check(load_config("export", f"model={tiny_model}", "output_dir=s3://bucket/run"))
