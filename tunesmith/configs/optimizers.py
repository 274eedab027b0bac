"""How gradients become updates: the optimizers."""

from dataclasses import field
from typing import Any, ClassVar, Literal

from tunesmith.configs._rules import Checked, below
from tunesmith.configs._section import section


class _HasRate(Checked):
    def problems(self):
        yield from below(0, self, *(name for name in ("lr", "weight_decay", "eps") if hasattr(self, name)))
        for name in ("betas", "momentum"):
            values = getattr(self, name, ())
            for value in values if isinstance(values, tuple) else (values,):
                if not 0 <= value < 1:
                    yield f"`{name}` must be at least 0 and below 1, got {value}"


@section
class AdamW(_HasRate):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    type: ClassVar[str] = "adamw"
    lr: float = 2e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator for stability."""
    fused: bool = True
    """One kernel for all parameters; the fastest choice on CPU and GPU."""
    state_dtype: Literal["bf16", "fp32"] | None = None
    """Number type in which the running averages are kept, null: the parameter's; bf16 halves their memory over fp32 weights (with betas up to 0.99, smaller changes round away)."""


@section
class AdamW8bit(_HasRate):
    """AdamW with its states in 8 bits (through torchao)."""

    type: ClassVar[str] = "adamw_8bit"
    lr: float = 2e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator for stability."""


@section
class Muon(_HasRate):
    """Orthogonalised momentum for matrices; embeddings, head, norms and biases are trained by AdamW at the same rate."""

    type: ClassVar[str] = "muon"
    lr: float = 1e-3
    """Peak learning rate; the update of a matrix is scaled to the size AdamW's would have."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    momentum: float = 0.95
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Look ahead along the momentum."""


@section
class SGD(_HasRate):
    """Stochastic gradient descent."""

    type: ClassVar[str] = "sgd"
    lr: float = 1e-2
    """Peak learning rate."""
    weight_decay: float = 0.0
    """L2 penalty."""
    momentum: float = 0.0
    """Decay rate of the momentum; 0 keeps no state at all."""


@section
class Adafactor(_HasRate):
    """Adam with factored second moments: almost no state (arXiv 1804.04235)."""

    type: ClassVar[str] = "adafactor"
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""


@section
class ThirdPartyOptimizer(_HasRate):
    """Any optimizer class by its dotted path; keys it alone knows are passed to it."""

    type: str
    """Dotted path of the class, such as bitsandbytes.optim.AdamW8bit."""
    lr: float = 2e-5
    """Peak learning rate."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the class."""


Optimizer = AdamW | AdamW8bit | Muon | SGD | Adafactor | ThirdPartyOptimizer
