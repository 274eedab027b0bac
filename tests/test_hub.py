"""hub.py without a network: folders as they are, and JSON files that are not what they should be."""

import pytest

from tunesmith.errors import UserError
from tunesmith.hub import read_json, resolve


def test_a_folder_is_itself(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path and resolve(tmp_path) == tmp_path


def test_latest_is_the_checkpoint_it_names(tmp_path):
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "latest").write_text("step-00000003\n")
    assert resolve(tmp_path / "latest") == tmp_path / "step-00000003"


@pytest.mark.parametrize("name", ["./absent", "absent", "a/b/c", "/absent/x", "~/absent", "absent/"])
def test_what_can_be_neither_folder_nor_hub_id(name):
    with pytest.raises(UserError, match="there is no folder .* and a Hub id has the form owner/name"):
        resolve(name, "adapter")


def test_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"no-such-owner/x \(tokenizer\) is not in the Hub cache"):
        resolve("no-such-owner/x", "tokenizer")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"{", "not valid JSON"),
        (b"[1]", "holds no JSON object"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_read_json(tmp_path, content, said):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_json(file)
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}
