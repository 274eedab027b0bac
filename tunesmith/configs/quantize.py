"""Options of `tune run quantize`."""

from dataclasses import field
from typing import ClassVar, Literal

from tunesmith.configs._rules import Checked, below, no_size
from tunesmith.configs._section import section
from tunesmith.configs.shared import RunSettings, TokenizerConfig

GROUPED = ("int4_weight_only", "int8_dynamic_int4")
"""Schemes that always have groups; int8_weight_only may have some."""


@section
class SchemeConfig(Checked):
    """How linear layers are rounded; the output layer is left as it is."""

    type: Literal[
        "int8_weight_only",
        "int8_dynamic",
        "int4_weight_only",
        "int8_dynamic_int4",
        "float8_weight_only",
        "float8_dynamic",
        "nf4",
    ] = "int8_dynamic_int4"
    """Weights in 8 bits (int8, float8), in 4 bits in groups (int4, int8_dynamic_int4 is 8da4w) or in bitsandbytes' 4-bit NormalFloat (nf4); with dynamic, each token's inputs in 8 bits, too."""
    group_size: int | None = None
    """Neighbouring weights of an output that share a scale; default: 32 for the two with int4, all of them for int8_weight_only; the others have no choice."""
    skip_indivisible: bool = False
    """Leave layers as they are whose inputs are no whole groups, instead of refusing the model."""

    def problems(self):
        yield from below(2, self, "group_size")
        if self.group_size is not None and self.type not in (*GROUPED, "int8_weight_only"):
            yield f"`group_size` has no effect with `type: {self.type}`, whose groups are fixed: leave it out"


@section
class Calibration(Checked):
    """Levels chosen so that layers still do on given text what they did."""

    method: Literal["none", "gptq"] = "none"
    """none rounds each weight to nearest; gptq makes good for the error of each with those behind it (arXiv 2210.17323), for whole numbers (int4, int8)."""
    data: str | list[str] | None = None
    """Text files (.txt, or .jsonl, .csv, .parquet with a column `text`) of the kind that the model will meet."""
    num_samples: int = 128
    """Pieces of text, drawn by the seed."""
    max_seq_len: int = 512
    """Tokens of a piece."""

    @property
    def data_files(self) -> list[str]:
        return [self.data] if isinstance(self.data, str) else self.data or []

    def problems(self):
        yield from below(1, self, "num_samples")
        yield from below(2, self, "max_seq_len")
        if self.method != "none" and not self.data:
            yield f"`method: {self.method}` needs text: name files in `data`"


@section
class PerplexityConfig(Checked):
    """What perplexity is measured on, before and after."""

    files: str | list[str] = field(default_factory=list)
    """Text files, as for `calibration.data`; default: the text of the calibration, if there is one, which it flatters."""
    max_seq_len: int | None = None
    """Tokens that the model reads at a time; default: 2048 or its limit, whichever is smaller."""
    max_texts: int | None = None
    """Take only so many texts; null: all."""

    @property
    def text_files(self) -> list[str]:
        return [self.files] if isinstance(self.files, str) else self.files

    def problems(self):
        yield from below(1, self, "max_seq_len", "max_texts")


@section(kw_only=True)
class Quantize(RunSettings):
    """Quantization: round a trained model to 8 or 4 bits, for transformers and tunesmith."""

    takes_classifiers: ClassVar[bool] = True

    model: str
    """Folder or Hub id of a model, or of a PEFT adapter, which is merged first."""
    base: str | None = None
    """Base model of the adapter; default: the one its adapter_config.json names."""
    output_dir: str
    """Where the model goes; must be empty or absent."""
    scheme: SchemeConfig = field(default_factory=SchemeConfig)
    """How linear layers are rounded."""
    calibration: Calibration = field(default_factory=Calibration)
    """Text that the rounding heeds."""
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    """Text on which perplexity is measured, before and after."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer of that text; default: the model's."""
    dtype: Literal["bf16", "fp32", "fp16"] | None = None  # type: ignore[assignment]
    """Number type that the model computes in, and of the weights that are left; default: the source's."""
    max_shard_size: str = "5GB"
    """Largest safetensors file, such as 500MB or 5GB."""
    tolerance: float | None = None
    """Largest allowed difference of the logits read back from those in memory, relative to their size; default: by dtype."""

    def problems(self):
        yield from super().problems()
        yield from no_size(self, "max_shard_size")
        if self.tolerance is not None and self.tolerance <= 0:
            yield f"`tolerance` must be above 0, got {self.tolerance}"
        if self.calibration.method == "gptq" and self.scheme.type.startswith(("float8", "nf4")):
            yield (
                f"`calibration.method: gptq` chooses whole numbers, and `scheme.type: {self.scheme.type}` has none: take one of the "
                "int8 or int4 schemes, or set `calibration.method` to none"
            )
