"""Which weights are trained, and how: whole, beside adapters, for a model that will be quantized."""

from typing import ClassVar, Literal

from tunesmith.configs._rules import Checked, below
from tunesmith.configs._section import section


@section
class FullWeights:
    """Every parameter is trained."""

    type: ClassVar[str] = "full"


@section
class LoRAWeights(Checked):
    """Small adapters are trained beside the frozen weights (LoRA, arXiv 2106.09685)."""

    type: ClassVar[str] = "lora"
    rank: int = 8
    """Rank of the update; the adapter's size grows with it."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)."""
    dropout: float = 0.0
    """Probability of dropping an adapter input during training."""
    target_modules: str | list[str] = "all-linear"
    """Names of the linear layers that get adapters, such as [q_proj, v_proj], or all-linear (all but the output layer)."""
    use_dora: bool = False
    """Learn magnitude and direction apart (DoRA, arXiv 2402.09353)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), so that large ranks keep learning (rsLoRA, arXiv 2312.03732)."""
    quantize_base: Literal["nf4"] | None = None
    """Hold the frozen matrices in 4-bit NormalFloat: QLoRA (arXiv 2305.14314)."""
    adapter: str | None = None
    """Folder or Hub id of a PEFT adapter to go on training from."""

    def problems(self):
        yield from below(1, self, "rank")
        if not 0 <= self.dropout < 1:
            yield f"`dropout` must be at least 0 and below 1, got {self.dropout}"
        if self.alpha <= 0:
            yield f"`alpha` must be above 0, got {self.alpha}"
        if self.target_modules == []:
            yield "`target_modules` names no layer; all-linear chooses every linear layer but the output layer"


@section
class QAT(Checked):
    """Quantization-aware training: the model computes with rounded numbers, so that it learns to do without the digits that quantization takes."""

    type: Literal["int8_dynamic_int4", "int4_weight_only", "float8", "float8_weight_only"] = "int8_dynamic_int4"
    """What is rounded: int8_dynamic_int4 (8da4w), weights to 4 bits in groups and each token's inputs to 8; int4_weight_only, the weights alone; float8, both to 8-bit floating point (any device but mps); float8_weight_only, the weights alone."""
    group_size: int = 32
    """Neighbouring weights that share a scale; of no effect on float8, where all weights of an output do."""
    fake_quant_after_n_steps: int = 0
    """Steps that compute with plain numbers first."""
    skip_indivisible: bool = False
    """Leave layers as they are whose inputs are no whole groups, instead of refusing the model."""

    def problems(self):
        yield from below(2, self, "group_size")
        yield from below(0, self, "fake_quant_after_n_steps")
