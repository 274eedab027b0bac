"""Names in files and in models."""

import torch

from tests.models.conftest import (
    TINY,
    build_empty,
    config_json,
    make_reference,
    pair,
    relative_error,
    take_weights,
    tokens,
)
from tunesmith.models.weights import Alias, Drop, Rename, file_name, model_name

OPERATORS = (Drop("vision.*"), Alias("old.*", "text.*"), Rename("text.*.w", "model.*.weight"))


def test_both_directions():
    assert model_name(OPERATORS, "text.layers.3.w") == "model.layers.3.weight"
    assert file_name(OPERATORS, "model.layers.3.weight") == "text.layers.3.w"
    assert model_name(OPERATORS, "old.layers.3.w") == "model.layers.3.weight"
    assert model_name(OPERATORS, "vision.layers.3.w") is None
    assert model_name(OPERATORS, "other") == file_name(OPERATORS, "other") == "other"


def test_every_family_writes_the_names_of_transformers(case):
    reference, model = pair(case)
    written = {file_name(model.weights, name) for name in model.state_dict()}
    expected = set(reference.state_dict()) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    assert written == expected


def test_rotary_buffers_and_tied_heads_in_files_are_passed_over():
    reference = make_reference("llama mqa tied")
    model = build_empty(config_json(reference))
    assert "lm_head.weight" in reference.state_dict()
    take_weights(model, {**reference.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert model.lm_head.matrix is model.model.embed_tokens.weight
    assert list(model.lm_head.parameters()) == []


def image_model():
    """A tiny Gemma 3 that sees images."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=8, patch_size=4)
    text = {**TINY, "sliding_window": 6, "num_hidden_layers": 3, "_sliding_window_pattern": 3}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def test_gemma3_with_images_loads_as_its_text_tower():
    reference = image_model()
    model = build_empty(config_json(reference))
    newer = reference.state_dict()
    older = {
        name.replace("model.language_model.", "language_model.model.").removeprefix("model.")
        if "language_model" not in name
        else name.replace("model.language_model.", "language_model.model.")
        if name != "lm_head.weight"
        else "language_model.lm_head.weight": tensor
        for name, tensor in newer.items()
    }
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in older or any(
        name.startswith("vision_tower") for name in older
    )
    ids = tokens(2, 20)
    theirs = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    for state in (newer, older):
        for parameter in model.parameters():
            parameter.data.zero_()
        take_weights(model, state)
        assert relative_error(model.logits(ids), theirs) < 1e-5


def test_gemma3_text_tower_is_a_text_model_for_transformers():
    from transformers import AutoConfig, Gemma3ForCausalLM

    model = build_empty(config_json(image_model()))
    assert model.hf_config["architectures"] == ["Gemma3ForCausalLM"]
    config = AutoConfig.for_model(**{key: value for key, value in model.hf_config.items() if key != "architectures"})
    saved = {file_name(model.weights, name): tensor for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        expected = Gemma3ForCausalLM(config).state_dict()
    assert {name: tensor.shape for name, tensor in expected.items() if name != "lm_head.weight"} == {
        name: tensor.shape for name, tensor in saved.items()
    }
