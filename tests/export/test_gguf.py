"""GGUF files: every family, number type and kind of tokenizer, read by the `gguf` package and, where it is installed, llama.cpp."""

import json

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from tests.export.conftest import ROWS, SENTENCES, byte_level, repository, run, sentencepiece_bpe, split
from tests.models.conftest import CASES
from tests.recipes.test_export import make_adapter
from tunesmith.configs.export import GGUFFile
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.data.tokenizer_files import LLAMA3_PATTERN, QWEN_PATTERN
from tunesmith.errors import UserError
from tunesmith.export.gguf.architecture import ARCHITECTURES
from tunesmith.export.gguf.consumer import ask
from tunesmith.export.gguf.consumer import model_of as model_from
from tunesmith.export.gguf.tensors import place, read_file
from tunesmith.export.gguf.tokenizer import TEKKEN_PATTERN, add_tokenizer, read_vocabulary
from tunesmith.export.source import find_source
from tunesmith.generation.completions import generate_completions
from tunesmith.generation.sampling import Sampling
from tunesmith.nn.scheme import Scheme
from tunesmith.training.load import load_model

REFUSED = {
    "qwen3 tied biased windows": "biases on the attention's output",
    "gemma mqa untied": "its output layer has weights of its own",
    "gemma2": "its `query_pre_attn_scalar` is 24, there it is always 16",
    "gemma2 no caps": "biases on the attention's output",
    "gemma3_text": "its `query_pre_attn_scalar` is 24, there it is always 16",
    "olmo2 mha biased tied": "biases on the attention's output",
}
"""What llama.cpp would compute otherwise."""
SHORTER = {"mistral window": 7, "qwen2 tied windows": 6, "phi3": 9, "llama dynamic": 64, "llama dynamic beyond": 24}
"""How many tokens it computes as we do, where that is fewer than the model takes."""
EXTRA = {
    "gemma2 wide window": dict(query_pre_attn_scalar=16),
    "gemma3_text stretched": dict(query_pre_attn_scalar=16),
    "gemma2 as published": dict(query_pre_attn_scalar=16),
    "gemma2 without caps": dict(query_pre_attn_scalar=16, attention_bias=False),
    "gemma3_text as published": dict(query_pre_attn_scalar=16),
    "olmo2 tied": dict(tie_word_embeddings=True),
    "phi3 longrope short": dict(max_position_embeddings=2048, original_max_position_embeddings=1024),
}
ALIASES = {
    "gemma2 as published": "gemma2",
    "gemma2 without caps": "gemma2 no caps",
    "gemma3_text as published": "gemma3_text",
    "olmo2 tied": "olmo2",
}
TAKEN = [case for case in [*CASES, *ALIASES] if case not in REFUSED]
QUICK = ("llama mqa tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2 as published", "gemma3_text as published",
         "phi3 partial tied", "olmo2")  # fmt: skip


def model_of(folder, case):
    return repository(folder, ALIASES.get(case, case), **EXTRA.get(case, {}))


def export(model, output, type="f32", **options):
    """The file, and what it says about itself."""
    run(model, output, format="gguf", gguf=GGUFFile(type), **options)
    [path] = output.iterdir()
    return path, {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def greedy(path, prompt, count, n_ctx=64):
    """The tokens with which llama.cpp continues, and the logits before each."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=n_ctx, n_threads=1, logits_all=True, type_k=0, type_v=0, verbose=False)
    ids, logits = list(prompt), []
    model.eval(ids)
    for _ in range(count):
        logits.append(np.array(model.scores[len(ids) - 1]))
        ids.append(int(logits[-1].argmax()))
        model.eval(ids[-1:])
    return ids[len(prompt) :], logits


def our_greedy(folder, prompt, count):
    tokenizer = load_tokenizer(folder)
    sampling = Sampling(max_new_tokens=count, temperature=0, stop_ids=())
    return generate_completions(load_model(folder), tokenizer, [prompt], sampling)[0].ids


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in TAKEN]
)
def test_families(case, tmp_path, capsys):
    folder = model_of(tmp_path / "model", case)
    path, said = export(folder, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "read back by the gguf package (F32): largest difference of the weights" in printed
    name = said["general.architecture"]
    context = SHORTER.get(case)
    assert context is None or said[f"{name}.context_length"] == context
    assert ("beyond them it would compute something else" in printed) == (context is not None)
    assert {tensor.kind.name for tensor in read_file(path).values()} == {"F32"}
    pytest.importorskip("llama_cpp")
    assert "read back by llama.cpp: largest difference of the logits" in printed
    prompt = [1, 70, 33, 80] * (5 if case == "phi3 longrope long" else 1)  # it stretches short texts, too
    count = 24 if context is None else min(24, context - len(prompt))
    assert greedy(path, prompt, count)[0] == our_greedy(folder, prompt, count)


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(case, tmp_path):
    folder = model_of(tmp_path / "model", case)
    with pytest.raises(UserError, match=REFUSED[case]):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
@pytest.mark.parametrize("case", ["llama mqa tied", pytest.param("gemma3_text as published", marks=pytest.mark.slow)])
def test_number_types(case, type, tmp_path, capsys):
    """Rounded weights are near the model's; llama.cpp continues as our engine does with the very weights that are in the file."""
    folder = model_of(tmp_path / "model", case)
    path, said = export(folder, tmp_path / "out", type)
    assert f"read back by the gguf package ({type.upper()})" in capsys.readouterr().out
    kinds = {name: tensor.kind.name for name, tensor in read_file(path).items()}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {type.upper()}
    assert said["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{type.upper()}"]
    pytest.importorskip("llama_cpp")
    source = find_source(str(folder), None)
    placed = list(place({name: tuple(tensor.shape) for name, tensor in load_model(folder).named_parameters()},
                        ARCHITECTURES[source.family.name], source.config))  # fmt: skip
    tokens, theirs = greedy(path, [1, 70, 33, 80], 24)
    with torch.no_grad():
        ours = model_from(source, placed, read_file(path)).logits(torch.tensor([[1, 70, 33, 80, *tokens]]))[0, 3:-1]
    for own, other, token in zip(ours, theirs, tokens, strict=True):
        assert (own - torch.from_numpy(other)).abs().max() < 0.1 * own.abs().max()
        assert own.max() - own[token] < 0.1 * own.abs().max()  # rounding of inputs decides between two as likely


def test_rows_that_are_no_whole_blocks(tmp_path, capsys):
    folder = repository(tmp_path / "model", "llama", intermediate_size=80)
    path, _ = export(folder, tmp_path / "out", "q8_0")
    kinds = {name: tensor.kind.name for name, tensor in read_file(path).items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"
    said = capsys.readouterr().out
    assert (
        "2 matrices are in f16, their rows are no whole blocks of q8_0: blk.0.ffn_down.weight, blk.1.ffn_down.weight"
        in said
    )


TOKENIZERS = {
    "gpt-2": lambda folder: byte_level(folder, [pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "qwen2": lambda folder: byte_level(folder, split(QWEN_PATTERN)),
    "llama-bpe": lambda folder: byte_level(folder, split(LLAMA3_PATTERN), ignore_merges=True),
    "dbrx": lambda folder: byte_level(folder, split(LLAMA3_PATTERN)),
    "smollm": lambda folder: byte_level(
        folder, [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "tekken": lambda folder: byte_level(folder, split(TEKKEN_PATTERN), ignore_merges=True),
    "default": sentencepiece_bpe,
}


@pytest.mark.parametrize("rule", TOKENIZERS)
def test_tokenizers(rule, tmp_path):
    folder = repository(tmp_path / "model", "llama", TOKENIZERS[rule])
    path, said = export(folder, tmp_path / "out")
    tokenizer = load_tokenizer(folder)
    assert said["tokenizer.ggml.pre"] == rule
    assert len(said["tokenizer.ggml.tokens"]) == ROWS == len(said["tokenizer.ggml.token_type"])
    assert (
        said["tokenizer.ggml.bos_token_id"] == tokenizer.bos_id
        and said["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    )
    if rule != "default":
        assert said["tokenizer.chat_template"] == tokenizer.chat_template
        assert said["tokenizer.ggml.token_type"][tokenizer.token_to_id("<|im_end|>")] == 3
        assert said["tokenizer.ggml.token_type"][tokenizer.token_to_id("<think>")] == 4
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    texts = [*SENTENCES, "<|im_start|>user\nhi<|im_end|>\n<think>well</think>", "a", "don't 1 22 333 4444 \n \n x"]
    for text in texts:
        ours = tokenizer.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == ours, text
        plain = tokenizer.encode(text, add_special_tokens=False)
        if plain:
            back = theirs.detokenize(plain, special=True).decode().removeprefix(" " if rule == "default" else "")
            assert back == tokenizer.decode(plain, skip_special_tokens=False)
    assert theirs.token_eos() == tokenizer.eos_id


@pytest.mark.parametrize(
    ("file", "rule"),
    [("llama2/tokenizer.model", "default"), ("mistral/tokenizer.model.v1", "default"), ("mistral/tokenizer.model.v3", "default"),
     ("llama3/tokenizer.model", "llama-bpe"), ("qwen2.5", "qwen2"), ("gpt2", "gpt-2")],
)  # fmt: skip
def test_published_tokenizers(assets, tmp_path, file, rule):
    """Their vocabularies alone, in files without weights."""
    tokenizer = load_tokenizer(assets / "tokenizers" / file)
    vocabulary = read_vocabulary(tokenizer, tokenizer.vocab_size + 8)
    assert vocabulary.pre == rule
    llama_cpp = pytest.importorskip("llama_cpp")
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    add_tokenizer(writer, tokenizer, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    theirs = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
    lines = (assets / "data" / "tinyshakespeare" / "input.txt").read_text()[:4000].split("\n\n")
    for text in [*SENTENCES, *lines]:
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.encode(text), text


def test_chats_that_llama_cpp_cuts_otherwise(tmp_path, capsys):
    """It puts a space behind every special token, where sentencepiece models put one in front of the text alone."""
    folder = repository(
        tmp_path / "model", "mistral", lambda folder: sentencepiece_bpe(folder, user_defined_symbols="[INST],[/INST]")
    )
    template = "{{ bos_token }}{% for message in messages %}[INST]{{ message.content }}[/INST]{% endfor %}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    _, said = export(folder, tmp_path / "out")
    assert said["tokenizer.chat_template"] == template
    pytest.importorskip("llama_cpp")
    printed = capsys.readouterr().out
    assert (
        "cuts 4 texts into the same tokens" in printed and "cuts a chat into other tokens than the tokenizer" in printed
    )


def test_adapters_are_merged(tmp_path):
    folder = repository(tmp_path / "model", "llama")
    adapter = make_adapter(folder, tmp_path / "adapter", use_dora=True)
    path, _ = export(adapter, tmp_path / "out")
    merged = load_model(adapter).get_submodule("model.layers.0.mlp.up_proj").merged_weight()
    stored = read_file(path)["blk.0.ffn_up.weight"]
    torch.testing.assert_close(stored.dense(), merged, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [dict(), dict(use_rslora=True, alpha=7.0), dict(target_modules=["q_proj", "lm_head"])])
@pytest.mark.parametrize("case", ["llama", "phi3 partial tied"])
def test_adapters_alone(tmp_path, case, kind):
    """llama.cpp with base and adapter computes what our engine does with both."""
    if case != "llama" and kind.get("target_modules"):
        kind = dict(target_modules=["qkv_proj", "down_proj"])
    folder = repository(tmp_path / "model", case)
    adapter = make_adapter(folder, tmp_path / "adapter", rank=4, **kind)
    base, _ = export(folder, tmp_path / "base")
    run(adapter, tmp_path / "lora", format="gguf", gguf=GGUFFile("f32", lora=True))
    [lora] = (tmp_path / "lora").iterdir()
    pytest.importorskip("llama_cpp")
    ids = [1, 70, 33, 80, 5, 9]
    _, theirs = ask(base, [], ids, ROWS, lora=lora)
    ours, plain = load_model(adapter).logits(torch.tensor([ids]))[0], load_model(folder).logits(torch.tensor([ids]))[0]
    assert (ours - plain).abs().max() > 0.05 * ours.abs().max()
    torch.testing.assert_close(theirs, ours.float(), rtol=0, atol=1e-4 * ours.abs().max().item())


def test_adapters_that_llama_cpp_has_no_place_for(tmp_path):
    folder = repository(tmp_path / "model", "llama mqa tied")
    options = dict(format="gguf", gguf=GGUFFile("f16", lora=True))
    with pytest.raises(UserError, match="`gguf.lora` writes an adapter, and .* is none"):
        run(folder, tmp_path / "out", **options)
    with pytest.raises(UserError, match="no place for DoRA's magnitudes"):
        run(make_adapter(folder, tmp_path / "dora", use_dora=True), tmp_path / "out", **options)
    adapter = make_adapter(folder, tmp_path / "head", target_modules=["lm_head", "q_proj"])
    with pytest.raises(UserError, match="the adapter is also on lm_head, which is the embedding in llama.cpp"):
        run(adapter, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="an adapter is not rounded to q8_0"):
        run(adapter, tmp_path / "out", format="gguf", gguf=GGUFFile("q8_0", lora=True))
    assert not (tmp_path / "out").exists()
    export(adapter, tmp_path / "out")  # merged, the output layer is one of its own


def test_mistakes(tmp_path, monkeypatch):
    folder = repository(tmp_path / "model", "llama")
    with pytest.raises(UserError, match="the weights differ from the model's by .* of the largest, more than 1e-05"):
        export(folder, tmp_path / "out", "q8_0", tolerance=1e-5)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "b"}
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is of the kind WordLevel"):
        export(folder, tmp_path / "out")
    byte_level(folder, split(r"[a-z]+|[^a-z]+"))
    with pytest.raises(UserError, match=r"cuts words by a rule that llama.cpp has no name for that we know: \[a-z\]"):
        export(folder, tmp_path / "out")
    sentencepiece_bpe(folder, 400)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="but the model's embedding only 384 rows"):
        export(folder, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(UserError, match="is a reward model or classifier"):
        export(folder, tmp_path / "out")
    quantized = {"architectures": ["LlamaForCausalLM"], "quantization_config": Scheme("int4_weight_only").to_config([])}
    (folder / "config.json").write_text(json.dumps(config | quantized))
    with pytest.raises(UserError, match="is quantized and can't be exported as GGUF"):
        export(folder, tmp_path / "out")
    monkeypatch.delitem(ARCHITECTURES, "llama")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="GGUF has no architecture for llama"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial"))


def test_without_llama_cpp(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    export(repository(tmp_path / "model", "llama"), tmp_path / "out")
    assert (
        "llama.cpp's binding is not installed, so the file was not run: pip install 'tunesmith[llama]'"
        in capsys.readouterr().out
    )


def test_real_model(assets, tmp_path, capsys):
    path, _ = export(assets / "models" / "stories260K", tmp_path / "out")
    assert "read back by the gguf package (F32): largest difference of the weights 0.0e+00" in capsys.readouterr().out
    pytest.importorskip("llama_cpp")
    assert greedy(path, [1], 200, n_ctx=512)[0] == our_greedy(assets / "models" / "stories260K", [1], 200)
