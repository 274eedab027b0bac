"""Repositories in and out: transformers is the other side, and every broken file has its sentence."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tunesmith.checkpoint import hf, tensor_files
from tunesmith.checkpoint.check import probe_ids, probe_logits
from tunesmith.checkpoint.hf import check_saved, load_weights, save_model, save_weights, verify, write_repository
from tunesmith.checkpoint.write import write_tensors
from tunesmith.errors import UserError
from tunesmith.models.decoder import build
from tunesmith.nn.lora import adapter_layers, adapter_state, apply_lora, merge_lora, reset_adapters
from tunesmith.nn.quantize import dequantize_nf4, quantize_linear_layers, quantize_nf4


def make_repository(folder: Path, tied: bool = False, dtype=torch.float32, shard="5GB", **changes) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.1, bos_token_id=1, eos_token_id=2, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 3])
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def on_meta(folder: Path, dtype=torch.float32, **changes):
    hf_config, family, _ = hf.read_model_config(folder)
    hf_config |= changes
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return build(hf_config, family, family.read_config(hf_config))
    finally:
        torch.set_default_dtype(torch.float32)


def load(folder: Path, dtype=torch.float32, materialize=False, **changes):
    model = on_meta(folder, dtype, **changes)
    if materialize:
        model.to_empty(device="cpu")
    load_weights(model, folder)
    model.init_buffers("cpu")
    return model.eval()


def reference_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(probe_ids(96)).logits


def assert_close(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, make_repository(folder)


# --- loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_loads_what_transformers_wrote(tmp_path, materialize, tied, shard):
    theirs = make_repository(tmp_path, tied, shard=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "30KB")
    ours = load(tmp_path, materialize=materialize)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys() - ({"lm_head.weight"} if tied else set())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert_close(probe_logits(ours), reference_logits(theirs))


@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_number_type_is_changed_on_arrival(tmp_path, materialize, stored, wanted):
    theirs = make_repository(tmp_path, dtype=stored)
    ours = load(tmp_path, wanted, materialize)
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == wanted and torch.equal(tensor, theirs.state_dict()[name].to(wanted))


def test_changing_weights_leaves_the_files_alone(tmp_path):
    make_repository(tmp_path)
    model = load(tmp_path)
    before = tensor_files.sha256_of(tmp_path / "model.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert tensor_files.sha256_of(tmp_path / "model.safetensors") == before
    assert torch.equal(load(tmp_path).model.norm.weight + 1, model.model.norm.weight)


def test_parameters_keep_whether_they_are_trained(repository):
    model = on_meta(repository[0])
    model.model.norm.weight.requires_grad_(False)
    load_weights(model, repository[0])
    assert not model.model.norm.weight.requires_grad and model.model.embed_tokens.weight.requires_grad


def test_a_second_copy_of_a_tied_head_is_passed_over(tmp_path):
    make_repository(tmp_path, tied=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    assert "lm_head.weight" not in load(tmp_path).state_dict()


def test_old_files_with_rotary_frequencies(repository, tmp_path):
    shutil.copytree(repository[0], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, tmp_path / "model.safetensors"
    )
    load(tmp_path)


def test_bin_files_as_a_fallback(repository, tmp_path):
    shutil.copy(repository[0] / "config.json", tmp_path)
    torch.save(repository[1].state_dict(), tmp_path / "pytorch_model.bin")
    assert_close(probe_logits(load(tmp_path)), reference_logits(repository[1]))
    torch.save(repository[1].state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_close(probe_logits(load(tmp_path)), reference_logits(repository[1]))


class Pest:
    def __reduce__(self):
        return (print, ("this never runs",))


def test_code_in_bin_files_is_never_run(repository, tmp_path):
    shutil.copy(repository[0] / "config.json", tmp_path)
    torch.save({"model.norm.weight": Pest()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin holds more than tensors"):
        load(tmp_path)


@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_new_token_rows_start_at_the_mean(tmp_path, materialize, tied):
    theirs = make_repository(tmp_path, tied)
    model = on_meta(tmp_path, vocab_size=99)
    if materialize:
        model.to_empty(device="cpu")
    load_weights(model, tmp_path, new_rows_from=96)
    for matrix, old in (
        (model.model.embed_tokens.weight, theirs.model.embed_tokens.weight),
        (model.lm_head.matrix, theirs.lm_head.weight),
    ):
        assert matrix.shape == (99, 64)
        assert torch.equal(matrix[:96], old)
        torch.testing.assert_close(matrix[96:], old.mean(0).expand(3, -1), rtol=1e-5, atol=1e-7)


def test_quantized_on_arrival(repository):
    model = on_meta(repository[0])
    names = quantize_linear_layers(model)
    load_weights(model, repository[0])
    assert len(names) == 14
    name = "model.layers.1.mlp.down_proj"
    weight = repository[1].state_dict()[name + ".weight"]
    expected = dequantize_nf4(quantize_nf4(weight), weight.shape, torch.float32)
    assert torch.equal(model.get_submodule(name).weight, expected)
    with pytest.raises(UserError, match="is held in NF4"):
        hf.outgoing_weights(model)


def test_adapters_are_no_part_of_the_base(repository):
    model = on_meta(repository[0])
    apply_lora(model, use_dora=True, quantize_base="nf4")
    load_weights(model, repository[0])
    reset_adapters(model, 0)
    assert not any(parameter.is_meta for parameter in model.parameters())


# --- bad input -------------------------------------------------------------------------------------


@pytest.fixture
def broken(repository, tmp_path):
    shutil.copytree(repository[0], tmp_path / "m")
    return tmp_path / "m"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def fails(folder: Path, *words: str, **changes) -> None:
    for materialize in (False, True):
        with pytest.raises(UserError) as error:
            load(folder, materialize=materialize, **changes)
        for word in words:
            assert word in str(error.value)


def test_no_folder_and_no_weights(repository, broken, tmp_path):
    with pytest.raises(UserError, match="absent is no folder"):
        load_weights(on_meta(repository[0]), tmp_path / "absent")
    (broken / "model.safetensors").unlink()
    fails(broken, str(broken), "holds no weights", "model.safetensors")


def test_missing_shards(tmp_path):
    make_repository(tmp_path, shard="30KB")
    lost = sorted(tmp_path.glob("model-*"))[1]
    lost.unlink()
    fails(tmp_path, f"lacks {lost.name} of", "the download is not complete")


def test_broken_index(tmp_path):
    make_repository(tmp_path, shard="30KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.other.weight"] = first
    path.write_text(json.dumps(index))
    fails(tmp_path, "model.other.weight", first, "which it does not")
    path.write_text("{")
    fails(tmp_path, str(path), "not valid JSON")
    path.write_text('{"weight_map": {"a": 3}}')
    fails(tmp_path, str(path), "no weight_map can be read")


@pytest.mark.parametrize("size", [0, 5, 100, -1, -4000])
def test_truncated_file(broken, size):
    path = broken / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    fails(broken, str(path), "is no whole safetensors file", "download it again")


def test_corrupt_header(broken):
    path = broken / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[20:24] = b"\x00\xff\x00\xff"
    path.write_bytes(content)
    fails(broken, str(path), "header can't be understood")


def test_git_lfs_pointer(broken):
    (broken / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    fails(broken, "Git LFS pointer", "git lfs pull")


def test_missing_unexpected_and_misshapen_tensors(broken):
    rewrite(broken, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    fails(broken, str(broken), "lack model.layers.1.mlp.up_proj.weight")
    rewrite(broken, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(80, 32)}))
    fails(broken, "model.safetensors", "model.layers.1.mlp.up_proj.weight has the shape (80, 32)", "(80, 64)")
    rewrite(
        broken,
        lambda tensors: tensors.update(
            {"model.layers.1.mlp.up_proj.weight": torch.zeros(80, 64), "model.layers.2.norm": torch.ones(1)}
        ),
    )
    fails(broken, "also hold model.layers.2.norm")


def test_a_larger_vocabulary_only_where_asked_for(repository):
    fails(repository[0], "embed_tokens.weight has the shape (96, 64)", "(99, 64)", vocab_size=99)


def test_broken_bin(repository, tmp_path):
    shutil.copy(repository[0] / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 nothing")
    fails(tmp_path, "pytorch_model.bin is no whole PyTorch file")


# --- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", [5e9, 30e3])
def test_transformers_loads_what_we_wrote(tmp_path, tied, max_shard_size):
    make_repository(tmp_path / "source", tied)
    model = load(tmp_path / "source")
    with torch.no_grad():
        model.model.layers["1"].mlp.up_proj.weight.mul_(2)
    digests = write_repository(model, tmp_path / "saved", max_shard_size=max_shard_size, source=tmp_path / "source")
    verify(tmp_path / "saved", digests)
    assert sorted(digests) == sorted(path.name for path in (tmp_path / "saved").iterdir())
    weights = [path for path in (tmp_path / "saved").glob("*.safetensors")]
    if max_shard_size == 30e3:
        assert len(weights) > 3 and all(path.stat().st_size <= 30e3 + 2000 for path in weights)
        index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())
        assert set(index["weight_map"].values()) == {path.name for path in weights}
    else:
        assert [path.name for path in weights] == ["model.safetensors"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(theirs) is LlamaForCausalLM and theirs.config.tie_word_embeddings == tied
    assert theirs.generation_config.eos_token_id == [2, 3]
    assert_close(probe_logits(model), reference_logits(theirs))
    again = load(tmp_path / "saved")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert check_saved(model, tmp_path / "saved") == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_saved_number_type(tmp_path, repository, dtype):
    model = load(repository[0])
    save_model(model, tmp_path, dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name].to(getattr(torch, dtype)))
    assert check_saved(model, tmp_path) < 0.05
    with pytest.raises(UserError, match="can't be saved as int8"):
        save_model(model, tmp_path, dtype="int8")


def test_saving_over_other_shards_leaves_no_stale_file(tmp_path, repository):
    model = load(repository[0])
    save_model(model, tmp_path, max_shard_size=30e3)
    save_model(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_are_folded_in_on_the_way_out(tmp_path, use_dora, tied):
    make_repository(tmp_path / "source", tied)
    model = load(tmp_path / "source")
    apply_lora(model, target_modules=["q_proj", "down_proj", "lm_head"], use_dora=use_dora)
    reset_adapters(model, 0)
    for tensor in adapter_state(model).values():
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    save_model(model, tmp_path / "saved")
    assert len(adapter_layers(model)) == 5
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert not theirs.config.tie_word_embeddings
    assert_close(probe_logits(model), reference_logits(theirs))
    assert check_saved(model, tmp_path / "saved") < 1e-5
    merge_lora(model)
    save_model(model, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (
        tmp_path / "saved" / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "merged" / "config.json").read_bytes() == (tmp_path / "saved" / "config.json").read_bytes()


def test_staged_copies_are_of_the_moment(tmp_path, repository):
    model = load(repository[0])
    before = probe_logits(model)
    write = hf.stage_repository(model, copy=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    write(tmp_path)
    assert torch.equal(probe_logits(load(tmp_path)), before)


def test_verify_finds_any_change(tmp_path, repository):
    digests = save_weights(load(repository[0]), tmp_path)
    verify(tmp_path, digests)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors is not what was written"):
        verify(tmp_path, digests)
    path.unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        verify(tmp_path, digests)


def test_check_saved_finds_other_weights(tmp_path, repository):
    model = load(repository[0])
    save_model(model, tmp_path)
    with torch.no_grad():
        model.model.layers["1"].self_attn.q_proj.weight.mul_(1.5)
    with pytest.raises(UserError, match="gives other logits than the model in memory"):
        check_saved(model, tmp_path)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    save_model(model, tmp_path)
    with pytest.raises(UserError, match="gives other logits"):
        check_saved(model, tmp_path)


def test_full_disk(tmp_path, repository, monkeypatch):
    model = load(repository[0])
    save_model(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.model.norm.weight.mul_(2)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tunesmith.checkpoint.write.os.fsync", full)
    with pytest.raises(UserError, match="No space left for .*; nothing saved before is lost"):
        save_model(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_unwritable_folder(repository, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        save_model(load(repository[0]), tmp_path / "file" / "model")


def test_files_are_what_safetensors_reads(tmp_path):
    tensors = {
        "b": torch.tensor([True, False, True]),
        "w": torch.randn(3, 5).to(torch.bfloat16),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "i": torch.arange(7),
        "é": torch.randn(4, 3).T,
    }
    write_tensors(tensors, tmp_path, "x")
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    stored = tensor_files.read_tensor_file(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype
        assert torch.equal(stored[name].tensor(), tensor)
        target = torch.empty_like(tensor)
        stored[name].read_into(target)
        assert torch.equal(target, tensor)


def test_unaligned_tensors_are_read(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.randn(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" "
    (tmp_path / "y.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    for name, stored in tensor_files.read_tensor_file(tmp_path / "y.safetensors").items():
        assert torch.equal(stored.tensor(), tensors[name])


def test_config_without_number_type_takes_the_files(broken):
    config = json.loads((broken / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (broken / "config.json").write_text(json.dumps(config))
    rewrite(broken, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    assert hf.stated_dtype(hf.read_model_config(broken)[0]) == torch.bfloat16


def test_biases_and_real_model(assets):
    folder = assets / "models" / "stories260K"
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = load(folder)
    with torch.no_grad():
        expected = theirs(probe_ids(512)).logits
    assert_close(probe_logits(ours), expected)
    assert isinstance(ours.lm_head, nn.Module) and "lm_head.weight" not in ours.state_dict()


def test_a_tokenizers_files_in_folders_are_verified_where_they_are(tmp_path):
    class Several:
        def save(self, folder):
            path = Path(folder) / "additional_chat_templates" / "tool_use.jinja"
            path.parent.mkdir()
            path.write_text("template")
            return [path]

    digests = hf.save_tokenizer(Several(), tmp_path)
    assert list(digests) == ["additional_chat_templates/tool_use.jinja"]
    verify(tmp_path, digests)
