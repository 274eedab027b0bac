"""What no program can be made of, told before weights are read."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.export.greedy import export_to
from tests.models.conftest import TINY
from tunesmith.configs.export import Export, ProgramFile
from tunesmith.errors import UserError

PROGRAMS = ("torch_export", "executorch", "onnx")


@pytest.fixture
def model(tmp_path):
    """A folder whose weights aren't those of its model."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {**TINY, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("format", PROGRAMS)
def test_longer_than_the_context(model, tmp_path, format):
    with pytest.raises(UserError, match="`program.max_length` is 65, more than the context of .* \\(64 tokens\\)"):
        export_to(tmp_path / "out", model, format, program=ProgramFile(max_length=65))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("format", ("torch_export", "executorch"))
def test_calls_longer_than_a_sequence(model, tmp_path, format):
    with pytest.raises(UserError, match="`program.max_chunk` is 100, more than the sequence has room for \\(64\\)"):
        export_to(tmp_path / "out", model, format, program=ProgramFile(max_chunk=100))


@pytest.mark.parametrize("format", PROGRAMS)
def test_models_that_score(model, tmp_path, format):
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is a reward model or classifier"):
        export_to(tmp_path / "out", model, format)


@pytest.mark.parametrize("format", ("executorch", "onnx"))
def test_missing_packages(model, tmp_path, format, monkeypatch):
    missing = {"executorch": "executorch.exir", "onnx": "onnxscript"}[format]
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"which is not installed: pip install 'tunesmith\[{format}\]'"):
        export_to(tmp_path / "out", model, format)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"program": {"max_length": 0}}, "`max_length` must be at least 1"),
        ({"program": {"max_chunk": -1}}, "`max_chunk` must be at least 1"),
        ({"program": {"max_length": 8, "max_chunk": 9}}, "`max_chunk` \\(9\\) can't be above `max_length` \\(8\\)"),
        ({"program": {}, "format": "gguf"}, "`program` is for `format: torch_export or executorch or onnx`"),
        ({"program": {"backend": "portable"}, "format": "torch_export"}, "`program.backend` is for"),
        ({"program": {"max_chunk": 8}, "format": "onnx"}, "a call of an ONNX model takes any number of tokens"),
        ({"program": {"all_logits": True}, "format": "onnx"}, "a call of an ONNX model takes any number of tokens"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        given = {"format": "executorch", **options}
        Export(model="m", output_dir="o", **{**given, "program": ProgramFile(**given["program"])})
