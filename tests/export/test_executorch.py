"""ExecuTorch programs: its runtime says what the engine says, and so does its own runner of language models."""

import pytest
import torch

from tests.export.greedy import FAMILIES, expected_tokens, export_to, program_tokens, save_model
from tunesmith.checkpoint.quantized import write_quantized
from tunesmith.configs.export import ProgramFile
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import UserError
from tunesmith.export.quiet import quietly
from tunesmith.nn.scheme import Scheme
from tunesmith.training.load import load_model

runtime = pytest.importorskip("executorch.runtime")
ROOM = {"max_length": 32, "max_chunk": 8}


class Runtime:
    """A program loaded by ExecuTorch's runtime, without tunesmith."""

    def __init__(self, path):
        with quietly():
            self.program = runtime.Runtime.get().load_program(path)
            self.forward = self.program.load_method("forward")

    def __call__(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        return self.forward.execute([tokens, torch.tensor([position])])[0].flatten(0, -2)

    def constants(self) -> dict:
        names = self.program.method_names - {"forward"}
        return {name: self.program.load_method(name).execute([]) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES)
def test_greedy_tokens_are_the_engines(case, tmp_path):
    model = save_model(case, tmp_path / "model")
    export_to(tmp_path / "out", model, "executorch", program=ProgramFile(**ROOM))
    assert program_tokens(Runtime(tmp_path / "out" / "model.pte")) == expected_tokens(model)


@pytest.mark.parametrize("case", ["llama"])
def test_portable_operators_and_what_the_runner_asks(case, tmp_path):
    model = save_model(case, tmp_path / "model", num_hidden_layers=1)
    export_to(tmp_path / "out", model, "executorch", program=ProgramFile(**ROOM, backend="portable"))
    program = Runtime(tmp_path / "out" / "model.pte")
    assert program_tokens(program) == expected_tokens(model)
    assert program.constants() == {
        "get_bos_id": [1], "get_eos_ids": [2], "get_vocab_size": [101], "get_n_layers": [1], "get_max_seq_len": [8],
        "get_max_context_len": [32], "use_kv_cache": [True], "use_sdpa_with_kv_cache": [False], "enable_dynamic_shape": [True],
    }  # fmt: skip
    assert all(program.program.metadata(name) for name in ("forward",))


@pytest.mark.slow
@pytest.mark.parametrize("dtype, backend", [("bf16", "portable"), ("fp16", "xnnpack")])
def test_half_precision(tmp_path, dtype, backend):
    model = save_model("gemma2", tmp_path / "model", num_hidden_layers=1)
    options = ProgramFile(**ROOM, backend=backend)
    facts = export_to(tmp_path / "out", model, "executorch", dtype=dtype, program=options)
    assert facts["outputs"][0]["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_four_bit_weights(tmp_path, capsys, dtype):
    """Scales saved in bfloat16 are XNNPACK's, and so are the tokens; others are rounded, which is told."""
    scheme, number_type = Scheme("int8_dynamic_int4", 32), {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    write_quantized(load_model(save_model("llama", tmp_path / "model")), tmp_path / "int4", scheme, number_type)
    export_to(tmp_path / "out", tmp_path / "int4", "executorch", program=ProgramFile(**ROOM))
    assert ("scales of 4-bit weights" in capsys.readouterr().out) == (dtype == "fp32")
    if dtype == "bf16":
        assert program_tokens(Runtime(tmp_path / "out" / "model.pte")) == expected_tokens(tmp_path / "int4")


def test_quantized_models_that_are_refused(tmp_path):
    model = load_model(save_model("llama", tmp_path / "model"))
    write_quantized(model, tmp_path / "4", Scheme("int4_weight_only", 32), torch.float32)
    write_quantized(model, tmp_path / "8da4w", Scheme("int8_dynamic_int4", 32), torch.float32)
    with pytest.raises(UserError, match="quantized in a way that ExecuTorch doesn't compute with"):
        export_to(tmp_path / "out", tmp_path / "4", "executorch")
    for options in ({"program": ProgramFile(backend="portable")}, {"dtype": "fp16"}):
        with pytest.raises(UserError, match="leave `.*` out"):
            export_to(tmp_path / "out", tmp_path / "8da4w", "executorch", **options)
    for format in ("torch_export", "onnx"):
        with pytest.raises(UserError, match=f"is quantized and can't be exported as {format}"):
            export_to(tmp_path / "out", tmp_path / "8da4w", format)


@pytest.mark.slow
def test_their_runner_tells_the_engines_story(assets, tmp_path):
    """ExecuTorch's C++ runner, from tokenizer and program alone: a prompt longer than a call takes, read in several.

    Its tokenizer leaves out this model's spaces, so words are compared."""
    runner = pytest.importorskip("executorch.extension.llm.runner")
    model = assets / "models" / "stories260K"
    export_to(tmp_path / "out", model, "executorch", program=ProgramFile(max_length=128, max_chunk=4))
    found: list[str] = []
    with quietly():
        one = runner.TextLLMRunner(str(tmp_path / "out" / "model.pte"), str(model / "tokenizer.json"))
        settings = runner.GenerationConfig(echo=False, temperature=0.0, seq_len=80, num_bos=1)
        one.generate("Once upon a time", settings, found.append)
    tokenizer = load_tokenizer(model)
    prompt = tokenizer.encode("Once upon a time")
    expected = tokenizer.decode([*prompt, *expected_tokens(model, prompt, 90)])
    assert "".join(expected.split()).startswith("".join("".join(["Once upon a time", *found]).split()))
    assert len(found) > 50
