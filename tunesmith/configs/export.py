"""Options of `tune run export`."""

from typing import ClassVar, Literal

from tunesmith.configs._rules import Checked, below, no_size
from tunesmith.configs._section import section
from tunesmith.configs.shared import RunSettings

PROGRAMS = ("torch_export", "executorch", "onnx")
OPTIONS = {
    "dtype": ("safetensors", "adapter", *PROGRAMS),
    "max_shard_size": ("safetensors",),
    "gguf": ("gguf",),
    "program": PROGRAMS,
}
"""{option: the formats that heed it}; the others refuse it."""


@section
class GGUFFile:
    """How a GGUF file is written."""

    type: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "f16"
    """Number type of the matrices: q8_0 holds 8 bits a weight and a scale for every 32, q4_0 holds 4; norms and biases stay f32."""
    lora: bool = False
    """Write the adapter alone, for llama.cpp's --lora, instead of merging it into its base."""


@section
class ProgramFile(Checked):
    """What a program is made for (torch_export, executorch, onnx)."""

    max_length: int | None = None
    """Tokens of a sequence, prompt included, for which the program has room; default: the model's context, at most 2048."""
    max_chunk: int | None = None
    """Most tokens that one call takes (torch_export, executorch): a longer prompt is read in several; default: 512."""
    all_logits: bool = False
    """Return the logits after every token of a call, not after its last alone (torch_export, executorch; onnx always does)."""
    backend: Literal["xnnpack", "portable"] | None = None
    """What computes (executorch): XNNPACK, fast on ARM and x86, or portable operators alone; default: xnnpack."""

    def problems(self):
        yield from below(1, self, "max_length", "max_chunk")
        if self.max_length is not None and self.max_chunk is not None and self.max_chunk > self.max_length:
            yield f"`max_chunk` ({self.max_chunk}) can't be above `max_length` ({self.max_length})"


@section(kw_only=True)
class Export(RunSettings):
    """Export: a model for other programs: merged, in another number type, as an adapter, as GGUF, as a program."""

    takes_classifiers: ClassVar[bool] = True

    model: str
    """Folder or Hub id of a model or of a PEFT adapter."""
    base: str | None = None
    """Base model of the adapter; default: the one its adapter_config.json names."""
    output_dir: str
    """Where the model goes; must be empty or absent."""
    format: Literal["safetensors", "adapter", "gguf", "torch_export", "executorch", "onnx"] = "safetensors"
    """safetensors: a repository for transformers and vLLM; adapter: a PEFT adapter; gguf: a file for llama.cpp; the others: programs that run without us."""
    dtype: Literal["bf16", "fp32", "fp16"] | None = None
    """Number type of the written weights (safetensors, adapter), or of a program's weights and computation; default: the source's, of programs fp32."""
    max_shard_size: str | None = None
    """Largest safetensors file, such as 500MB; default: 5GB."""
    gguf: GGUFFile | None = None
    """How a GGUF file is written; default: in f16."""
    program: ProgramFile | None = None
    """What a program is made for; default: for the model's context, at most 2048 tokens."""
    tolerance: float | None = None
    """Largest allowed difference of what is read back, relative to the largest number compared; default: by number type."""

    def problems(self):
        yield from super().problems()
        for option, formats in OPTIONS.items():
            if getattr(self, option) is not None and self.format not in formats:
                yield f"`{option}` is for `format: {', '.join(formats)}`, not for {self.format}: leave it out"
        yield from self._program_problems()
        yield from no_size(self, "max_shard_size")
        if self.gguf is not None and self.gguf.lora and self.gguf.type not in ("f32", "f16", "bf16"):
            yield f"`gguf.lora`: an adapter is not rounded to {self.gguf.type}: set `gguf.type` to f32, f16 or bf16"
        if self.tolerance is not None and self.tolerance <= 0:
            yield f"`tolerance` must be above 0, got {self.tolerance}"

    def _program_problems(self):
        if self.program is None:
            return
        if self.format == "onnx" and (self.program.max_chunk is not None or self.program.all_logits):
            yield "`program.max_chunk` and `program.all_logits` are for torch_export and executorch: a call of an ONNX model takes any number of tokens and gives all logits"
        if self.format != "executorch" and self.program.backend is not None:
            yield f"`program.backend` is for `format: executorch`, not for {self.format}: leave it out"
