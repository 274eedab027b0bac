"""Options of `tune run preference`."""

from dataclasses import field
from typing import ClassVar, Literal

from tunesmith.configs._rules import Checked, below, outside
from tunesmith.configs._section import section
from tunesmith.configs.data import PreferenceData
from tunesmith.configs.shared import TrainSettings


@section(kw_only=True)
class _PreferenceLoss(Checked):
    needs_pairs: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    sft_weight: float = 0.0
    """Weight of a further term, the negative log-likelihood of the preferred answers' tokens; 0: none."""
    chunk_size: int = 1024
    """Tokens whose logits exist at one time; 0 computes all at once (more memory, the same numbers)."""

    def problems(self):
        yield from below(0, self, "chunk_size", "sft_weight")
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if getattr(self, name, 1.0) <= 0:
                yield f"`{name}` must be above 0, got {getattr(self, name)}"
        if hasattr(self, "label_smoothing"):
            yield from outside(0, 0.499, self, "label_smoothing")


@section(kw_only=True)
class _AgainstReference(_PreferenceLoss):
    needs_reference: ClassVar[bool] = True
    beta: float = 0.1
    """How closely the model is held to the reference; larger is closer."""


@section(kw_only=True)
class _Normalised(_AgainstReference):
    length_normalised: bool = False
    """Divide the log-ratio of an answer by its number of tokens, so that long answers weigh no more."""


@section(kw_only=True)
class DPO(_Normalised):
    """Direct preference optimization (arXiv 2305.18290)."""

    type: ClassVar[str] = "dpo"
    label_smoothing: float = 0.0
    """Share of pairs taken to be labelled the wrong way round (conservative DPO)."""


@section(kw_only=True)
class Robust(_Normalised):
    """DPO made unbiased under wrongly labelled pairs (arXiv 2403.00409)."""

    type: ClassVar[str] = "robust"
    label_smoothing: float = 0.1
    """Share of pairs taken to be labelled the wrong way round."""


@section(kw_only=True)
class IPO(_AgainstReference):
    """A squared loss that does not push the margin beyond 1 / (2 beta) (arXiv 2310.12036)."""

    type: ClassVar[str] = "ipo"


@section(kw_only=True)
class Hinge(_Normalised):
    """The hinge loss of SLiC and RSO (arXiv 2309.06657)."""

    type: ClassVar[str] = "hinge"


@section(kw_only=True)
class APOZero(_AgainstReference):
    """Anchored preference optimization for answers better than the model's own (arXiv 2408.06266)."""

    type: ClassVar[str] = "apo_zero"


@section(kw_only=True)
class APODown(_AgainstReference):
    """Anchored preference optimization for a model better than the answers (arXiv 2408.06266)."""

    type: ClassVar[str] = "apo_down"


@section(kw_only=True)
class SimPO(_PreferenceLoss):
    """Length-averaged log-likelihoods with a target margin, no reference (arXiv 2405.14734)."""

    type: ClassVar[str] = "simpo"
    beta: float = 2.0
    """Scale of the difference of average log-likelihoods."""
    gamma: float = 1.0
    """Margin by which the preferred answer shall win."""


@section(kw_only=True)
class CPO(_PreferenceLoss):
    """DPO's loss without a reference, beside the likelihood of the preferred answer (arXiv 2401.08417)."""

    type: ClassVar[str] = "cpo"
    beta: float = 0.1
    """Scale of the difference of log-likelihoods."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be labelled the wrong way round."""
    sft_weight: float = 1.0
    """Weight of the negative log-likelihood of the preferred answers' tokens."""


@section(kw_only=True)
class ORPO(_PreferenceLoss):
    """Fine-tuning with an odds-ratio penalty, no reference (arXiv 2403.07691)."""

    type: ClassVar[str] = "orpo"
    beta: float = 0.1
    """Weight of the odds-ratio term."""
    sft_weight: float = 1.0
    """Weight of the negative log-likelihood of the preferred answers' tokens."""


@section(kw_only=True)
class KTO(_AgainstReference):
    """Kahneman–Tversky optimization: answers marked good or bad, no pairs (arXiv 2402.01306)."""

    type: ClassVar[str] = "kto"
    needs_pairs: ClassVar[bool] = False
    desirable_weight: float = 1.0
    """Weight of the answers marked good."""
    undesirable_weight: float = 1.0
    """Weight of the answers marked bad."""


@section(kw_only=True)
class BCO(_AgainstReference):
    """Binary classifier optimization: answers marked good or bad, no pairs (arXiv 2404.04656)."""

    type: ClassVar[str] = "bco"
    needs_pairs: ClassVar[bool] = False


PreferenceLoss = DPO | Robust | IPO | Hinge | APOZero | APODown | SimPO | CPO | ORPO | KTO | BCO


@section
class Reference(Checked):
    """The model that the trained one is compared with, where the loss asks for one."""

    model: str | None = None
    """Folder or Hub id; default: the model that training starts from, which for adapters is the model with them switched off."""
    quantize: Literal["nf4"] | None = None
    """Hold the matrices of a second model in 4 bits; it is an approximation then."""
    precompute: bool = False
    """Compute its log-probabilities once, before training, and keep them on disk: no second model while training."""


@section(kw_only=True)
class Preference(TrainSettings):
    """Preference tuning: raise preferred answers over rejected ones (DPO and its kin)."""

    model: str
    """Folder with config.json and safetensors, or a Hub id."""
    dataset: PreferenceData | list[PreferenceData]
    """Preferred and rejected answers to train on: one source, or a list drawn by weight."""
    dataset_val: PreferenceData | list[PreferenceData] | None = None
    """The same for validation: loss, rewards, margins and accuracy."""
    loss: PreferenceLoss = field(default_factory=DPO)  # type: ignore[assignment]
    """The method, and its numbers."""
    reference: Reference = field(default_factory=Reference)
    """What the loss compares with."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts that the model answers before and after training; shown in report.html."""

    def problems(self):
        yield from super().problems()
        if not self.loss.needs_reference and self.reference != Reference():
            yield f"`reference` has no effect with `loss.type: {self.loss.type}`, which compares with no reference"
        if self.reference.quantize and not self.reference.model and self.weights.type == "lora":
            yield (
                "`reference.quantize` has no effect with adapters: the reference is the model itself with them switched off; "
                "quantize that with `weights.quantize_base`, or name another `reference.model`"
            )
        for option in ("dataset", "dataset_val"):
            given = getattr(self, option)
            sources = given if isinstance(given, list) else [given] if given else []
            if self.reference.precompute and any(source.streaming for source in sources):
                yield f"`reference.precompute` needs all rows beforehand, which `{option}.streaming` does not have; turn one of them off"
