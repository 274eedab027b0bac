"""Models whose weights stay in their files compute and are written like those that are loaded."""

import pytest
import torch

from tests.recipes.test_export import base, make_adapter  # noqa: F401
from tunesmith.checkpoint.check import probe_logits
from tunesmith.checkpoint.hf import outgoing_weights, save_model
from tunesmith.checkpoint.streamed import weights_here
from tunesmith.nn.lora import adapters_off
from tunesmith.training.load import load_model, stream_model


def in_files(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


@pytest.mark.parametrize("kind", [dict(), dict(use_dora=True), dict(target_modules=["q_proj", "lm_head"])])
def test_same_logits_and_weights(base, tmp_path, kind):  # noqa: F811
    adapter = make_adapter(base, tmp_path / "adapter", **kind)
    loaded, streamed = load_model(adapter), stream_model(adapter)
    waiting = in_files(streamed)
    assert waiting == {name for name, _ in loaded.named_parameters() if "lora" not in name}
    assert torch.equal(probe_logits(streamed), probe_logits(loaded))
    with adapters_off(streamed):
        assert torch.equal(probe_logits(streamed), probe_logits(load_model(base)))
    written = outgoing_weights(streamed)
    for name, one in outgoing_weights(loaded).items():
        assert torch.equal(written[name].own(), one.own()), name
    assert in_files(streamed) == waiting


def test_a_tied_head_reads_the_embedding(assets):
    folder = assets / "models" / "stories260K"
    streamed = stream_model(folder)
    assert torch.equal(probe_logits(streamed), probe_logits(load_model(folder)))
    with weights_here(streamed.head):
        assert not streamed.head.matrix.is_meta
    assert streamed.head.matrix.is_meta


def test_files_of_another_number_type(base, tmp_path):  # noqa: F811
    """config.json decides; the files are converted as they are read."""
    save_model(load_model(base), tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("float32", "bfloat16"))
    streamed, loaded = stream_model(tmp_path), load_model(tmp_path)
    assert streamed.model.compute_dtype == torch.bfloat16
    assert torch.equal(probe_logits(streamed), probe_logits(loaded))
