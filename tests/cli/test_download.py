"""`tune download` against a stand-in for the Hub on the loopback."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.cli.main import main

spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
assert spec is not None and spec.loader is not None
hub_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub_server)


@pytest.fixture(scope="module")
def hub():
    with hub_server.serve() as server:
        yield server


def download(hub, home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings |= {
        "HF_ENDPOINT": hub[0],
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    hub[1].clear()
    command = [sys.executable, "-m", "tunesmith", "download", *words]
    return subprocess.run(command, env=settings | environment, capture_output=True, text=True, timeout=60)


def names(folder: Path) -> set[str]:
    return {
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and ".cache" not in file.parts
    }


def fetched(hub) -> set[str]:
    return {
        path.partition(hub_server.COMMIT + "/")[2] for verb, path, _ in hub[1] if verb == "GET" and "/resolve/" in path
    }


def test_into_a_folder_and_only_once(hub, tmp_path):
    words = ["tiny/open", "--output-dir", str(tmp_path / "out"), "--ignore-patterns", "original/consolidated.00.pth"]
    result = download(hub, tmp_path, *words)
    assert (result.returncode, result.stdout) == (0, f"tiny/open is in {tmp_path / 'out'}\n"), result.stderr
    wanted = set(hub_server.FILES) - {"original/consolidated.00.pth"}
    assert names(tmp_path / "out") == wanted == fetched(hub)
    assert (tmp_path / "out/model.safetensors").read_bytes() == hub_server.FILES["model.safetensors"]
    (tmp_path / "out/model.safetensors").unlink()
    assert download(hub, tmp_path, *words).returncode == 0
    assert fetched(hub) == {"model.safetensors"}, "what is there is not fetched again"


def test_into_the_cache_which_serves_offline(hub, tmp_path):
    result = download(hub, tmp_path, "tiny/open")
    assert (
        result.returncode == 0 and f"{tmp_path}/hub/models--tiny--open/snapshots/{hub_server.COMMIT}" in result.stdout
    )
    offline = download(hub, tmp_path, "tiny/open", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, result.stdout) and not hub[1]


def test_tokenizer_only(hub, tmp_path):
    assert (
        download(hub, tmp_path, "tiny/open", "--tokenizer-only", "--output-dir", str(tmp_path / "out")).returncode == 0
    )
    assert names(tmp_path / "out") == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_broken_transfer_goes_on_where_it_stopped(hub, tmp_path):
    hub[2].add("model.safetensors")
    result = download(hub, tmp_path, "some/large", "--output-dir", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/model.safetensors").read_bytes() == hub_server.LARGE["model.safetensors"]
    ranges = [asked for verb, path, asked in hub[1] if verb == "GET" and path.endswith("model.safetensors")]
    assert len(ranges) == 2 and ranges[1] is not None and int(ranges[1].removeprefix("bytes=").partition("-")[0]) > 0


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["tiny/gated"], {}, "tiny/gated (model) is gated: accept its terms at {hub}/tiny/gated, and give a token"),
        (["tiny/absent"], {}, "there is no repository tiny/absent (model) at {hub}, or it is private"),
        (
            ["tiny/private"],
            {"HF_TOKEN": "hf_wrong"},
            "{hub} refuses the token for tiny/private (model): check HF_TOKEN",
        ),
        (["tiny/open", "--revision", "v9"], {}, "tiny/open (model) has no revision v9"),
        (
            ["tiny/open"],
            {"HF_HUB_OFFLINE": "1"},
            "tiny/open (model) is not in the Hub cache, and HF_HUB_OFFLINE forbids to fetch it",
        ),
        (
            ["tiny/open"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "tiny/open (model) can't be fetched: http://127.0.0.1:9 does not answer",
        ),
        (["a/b/c"], {}, "a/b/c (model) can't be a repository's name"),
    ],
)
def test_what_goes_wrong_is_one_sentence(hub, tmp_path, words, environment, said):
    result = download(hub, tmp_path, *words, **environment)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(said.format(hub=hub[0])) and result.stderr.count("\n") == 1, result.stderr


def test_tokens(hub, tmp_path):
    assert download(hub, tmp_path, "tiny/gated", "--hf-token", hub_server.TOKEN).returncode == 0
    assert download(hub, tmp_path, "tiny/private", HF_TOKEN=hub_server.TOKEN).returncode == 0


def test_kaggle(monkeypatch, capsys, tmp_path):
    import types

    calls = []
    stand_in = types.SimpleNamespace(model_download=lambda handle: calls.append(handle) or str(tmp_path))
    monkeypatch.setitem(sys.modules, "kagglehub", stand_in)
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)
    monkeypatch.delenv("KAGGLE_KEY", raising=False)
    words = [
        "download",
        "metaresearch/llama-3.2/pytorch/1b",
        "--source",
        "kaggle",
        "--kaggle-username",
        "me",
        "--kaggle-api-key",
        "key",
    ]
    assert main(words) == 0 and calls == ["metaresearch/llama-3.2/pytorch/1b"]
    assert (
        capsys.readouterr().out == f"metaresearch/llama-3.2/pytorch/1b is in {tmp_path}\n"
        and os.environ["KAGGLE_USERNAME"] == "me"
    )
    assert main([*words, "--output-dir", "x"]) == 2 and "--output-dir can't be combined" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    assert main(words) == 2 and "pip install 'tunesmith[kaggle]'" in capsys.readouterr().err
