"""Folders that torch.distributed.checkpoint wrote give the logits of the model that was saved; nothing in them is ever run."""

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from distributed import run_distributed

from tests.checkpoint.test_meta import interleave, make_model
from tunesmith.checkpoint import dcp
from tunesmith.checkpoint.check import probe_ids
from tunesmith.errors import UserError
from tunesmith.training.load import load_model

NAMES = {
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
    "self_attn": "attention", "mlp": "feed_forward", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
}  # fmt: skip
SIZES = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}


def rotations(head_dim=16, length=128, theta=500000.0, factor=1.0):
    """What torchtitan keeps as freqs_cis."""
    angles = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angles[-2:] /= factor
    turns = torch.outer(torch.arange(length).float(), angles)
    return torch.polar(torch.ones_like(turns), turns)


def titan_state(model):
    """The model's tensors as torchtitan names and orders them."""
    state = {"freqs_cis": rotations()}
    for name, tensor in model.state_dict().items():
        for letter, heads in (("q", 4), ("k", 2)):
            if f"{letter}_proj" in name:
                tensor = interleave(tensor, heads)
        name = name.removeprefix("model.").replace("embed_tokens", "tok_embeddings").replace("lm_head", "output")
        state[".".join(NAMES.get(piece, piece) for piece in name.split("."))] = tensor.contiguous()
    return state


def save(state, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.save(state, checkpoint_id=str(folder))


def save_on_ranks(folder):
    """Each rank's part of a sharded model, rows over the ranks, as fully_shard cuts it."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from tunesmith.parallel.mesh import start_mesh, stop_mesh

    mesh = start_mesh(torch.device("cpu"))
    devices = mesh.shards
    state = {
        name: tensor if name == "freqs_cis" else distribute_tensor(tensor, devices, [Shard(0)])
        for name, tensor in titan_state(make_model(**SIZES)).items()
    }
    save({"model": state, "train_state": {"step": 3}}, folder)
    stop_mesh()


def assert_same(folder, theirs, **options):
    ids = probe_ids(96)
    with torch.no_grad():
        expected = theirs(ids).logits
        ours = load_model(folder, dtype="float32", **options).logits(ids)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def theirs():
    return make_model(**SIZES)


@pytest.fixture
def saved(tmp_path, theirs) -> Path:
    save(titan_state(theirs), tmp_path / "step-10")
    return tmp_path / "step-10"


def test_logits_and_numbers(saved, theirs):
    assert dcp.is_dcp_folder(saved)
    config = dcp.read_config(saved)
    assert (
        config["rope_theta"] == 500000.0
        and config["num_key_value_heads"] == 2
        and config["max_position_embeddings"] == 128
    )
    assert_same(saved, theirs)


def test_a_whole_training_checkpoint(tmp_path, theirs):
    """The model under a key of its own, and around its names what compile and recomputation put there."""
    state = {
        name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): one
        for name, one in titan_state(theirs).items()
    }
    optimizer = {"state": {"tok_embeddings.weight": {"exp_avg": torch.ones(96, 64)}}, "lr": 0.1}
    save(
        {"model": state, "optimizer": optimizer, "train_state": {"step": 3}, "dataloader": {"dp_rank_0": b"x"}},
        tmp_path,
    )
    assert_same(tmp_path, theirs)


def test_model_and_optimizer_side_by_side(tmp_path, theirs):
    beside = {
        "optimizer.state.output.weight.exp_avg": torch.ones(3),
        "lr_scheduler.last_epoch": 4,
        "train_state": {"step": 3},
    }
    save({**titan_state(theirs), **beside}, tmp_path)
    assert_same(tmp_path, theirs)


def test_saved_by_two_ranks(tmp_path, theirs):
    run_distributed(save_on_ranks, 2, tmp_path)
    assert len(list(tmp_path.glob("*.distcp"))) == 2
    assert_same(tmp_path, theirs)


def test_config_json_beside_is_believed(saved, theirs, tmp_path):
    """Of Hugging Face's names it is needed, of torchtitan's it says what the tensors don't."""
    theirs.config.save_pretrained(saved)
    assert_same(saved, theirs)
    save({"model": theirs.state_dict()}, tmp_path / "hf")
    with pytest.raises(UserError, match="alone don't tell what model they are: put its config.json"):
        load_model(tmp_path / "hf")
    theirs.config.save_pretrained(tmp_path / "hf")
    assert_same(tmp_path / "hf", theirs)


def read_part(folder, name, part):
    import tunesmith.checkpoint.dcp as module

    loaded = []
    load = module._Piece.load
    module._Piece.load = lambda piece, dtype: (loaded.append(piece.offsets[0]), load(piece, dtype))[1]
    stored = dcp.read_weights(folder, dcp.read_config(folder))[name]
    whole = stored.tensor()
    loaded.clear()
    target = torch.empty(part.local_shape)
    stored.read_into(target, part)
    module._Piece.load = load
    assert torch.equal(target, part.take(whole))
    return loaded


def test_a_rank_reads_only_the_pieces_it_needs(tmp_path):
    from tunesmith.nn.part import Part

    run_distributed(save_on_ranks, 2, tmp_path)
    for name, rows, pieces in [("lm_head.weight", (48, 96), [48]), ("model.layers.0.self_attn.q_proj.weight", (0, 20), [0]),
                               ("model.layers.0.self_attn.q_proj.weight", (20, 40), [0, 32])]:  # fmt: skip
        shape = (96, 64) if "head" in name else (64, 64)
        assert read_part(tmp_path, name, Part(shape, (rows,))) == pieces, name


def test_export_and_training_from_it(saved, theirs, tmp_path, tiny_model):
    from transformers import AutoModelForCausalLM

    from tunesmith.config import load_config, run
    from tunesmith.configs.export import Export
    from tunesmith.recipes import export

    export.main(Export(model=str(saved), output_dir=str(tmp_path / "hf"), device="cpu"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert torch.equal(exported(probe_ids(96)).logits, theirs(probe_ids(96)).logits)

    save(titan_state(make_model(**SIZES, vocab_size=320)), tmp_path / "large")
    (tmp_path / "text.txt").write_text("the quick brown fox " * 200)
    words = [
        f"model={tmp_path / 'large'}",
        "from_scratch=false",
        f"tokenizer.path={tiny_model}",
        f"dataset.source={tmp_path / 'text.txt'}",
    ]
    words += [
        f"output_dir={tmp_path / 'run'}",
        "device=cpu",
        "dtype=fp32",
        "max_steps=2",
        "batch_size=2",
        "tokenizer.max_seq_len=32",
    ]
    run(load_config("pretrain", *words))
    run(load_config("pretrain", *words, "max_steps=3", "resume_from_checkpoint=true"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]


# --- what must not run, and what is broken -------------------------------------------------------


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_the_table_is_not_run(saved, tmp_path):
    table = pickle.loads((saved / ".metadata").read_bytes())  # our own
    table.planner_data = Evil(tmp_path / "ran")
    (saved / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(UserError, match=r"\.metadata names (posix|os)\.system, .* code from a file is never run"):
        load_model(saved)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["getattr", "eval", "__import__", "type"])
def test_builtins_are_not_reached(tmp_path, name):
    (tmp_path / ".metadata").write_bytes(b"cbuiltins\n" + name.encode() + b"\n(S'os'\ntR.")
    with pytest.raises(UserError, match=f"names builtins.{name}"):
        dcp.read_table(tmp_path)


def test_code_in_a_tensors_place_is_not_run(saved, tmp_path):
    table = dcp.read_table(saved)
    piece = table["norm.weight"].pieces[0]
    evil = pickle.dumps(Evil(tmp_path / "ran"), 2)
    content = bytearray(piece.path.read_bytes())
    content[piece.start : piece.start + piece.length] = evil.ljust(piece.length, b"\0")
    piece.path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="__0_0.distcp (holds more than tensors|is damaged)"):
        load_model(saved)
    assert not (tmp_path / "ran").exists()


def test_damage_is_named(saved, tmp_path):
    whole = (saved / ".metadata").read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2], pickle.dumps({"a": 1}), pickle.dumps(3)):
        (saved / ".metadata").write_bytes(content)
        with pytest.raises(UserError, match=".metadata is no table of a distributed checkpoint, or damaged"):
            dcp.read_table(saved)
    (saved / ".metadata").write_bytes(whole)
    file = saved / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="__0_0.distcp is damaged or cut"):
        load_model(saved)
    file.unlink()
    with pytest.raises(UserError, match="lacks __0_0.distcp, which .metadata names"):
        load_model(saved)


def test_files_elsewhere_are_not_opened(saved, tmp_path):
    table = pickle.loads((saved / ".metadata").read_bytes())
    for place in table.storage_data.values():
        place.relative_path = "../secret"
    (saved / ".metadata").write_bytes(pickle.dumps(table))
    (tmp_path / "secret").write_text("x")
    with pytest.raises(UserError, match="names a file outside its folder"):
        load_model(saved)


def test_stretched_positions_need_a_config(tmp_path, theirs):
    save({**titan_state(theirs), "freqs_cis": rotations(factor=8.0)}, tmp_path)
    with pytest.raises(UserError, match="stretched rotary positions"):
        load_model(tmp_path)


def test_another_models_tensors_are_named(tmp_path, theirs):
    save({**titan_state(theirs), "layers.0.moe.router.gate.weight": torch.ones(2, 2)}, tmp_path)
    with pytest.raises(UserError, match="holds layers.0.moe.router.gate.weight"):
        load_model(tmp_path)
