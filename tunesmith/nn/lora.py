"""Low-rank adapters (LoRA, rsLoRA, DoRA) beside frozen linear layers, dense or NF4.

O outputs, I inputs, R rank.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.nn.head import Head
from tunesmith.nn.linear import Linear, linear
from tunesmith.nn.part import Part, by_shard, local_tensor, parameter_parts, shard_rows, unsharded
from tunesmith.nn.quantize import NF4Linear, quantize_linear_layers
from tunesmith.nn.targets import choose_layers

M = TypeVar("M", bound=nn.Module)
V = TypeVar("V")

ADAPTER_PARAMETERS = ("lora_A", "lora_B", "lora_magnitude")


@dataclass(frozen=True)
class LoRA:
    """The settings of one adapter layer."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """What the update B A is multiplied by: alpha / R (LoRA), alpha / sqrt(R) (rsLoRA, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoRALayer(nn.Module):
    """What adapter layers share: `lora_A` (R, I), `lora_B` (O, R), for DoRA `lora_magnitude` (O,), and the arithmetic on them.

    Subclasses say what the frozen layer computes (`project_base`) and what its weight is (`base_weight`).
    """

    lora: LoRA
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None
    adapter_enabled: bool = True

    @staticmethod
    def over_inputs(lengths: Tensor) -> Tensor:
        """Lengths of whole rows from those of the part that is here; tensor parallelism, which cuts rows, overrides it."""
        return lengths

    def drop(self, x: Tensor) -> Tensor:
        """Dropout on x (…, I). Tensor parallelism, which cuts its features, overrides it."""
        return F.dropout(x, self.lora.dropout)

    def add_adapter(self, lora: LoRA, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> None:
        """Register the adapter's parameters, not yet initialised (see `reset_adapters`)."""
        self.lora, self.adapter_enabled = lora, True
        kind = {"dtype": dtype, "device": device}
        self.lora_A = nn.Parameter(torch.empty(lora.rank, inputs, **kind))
        self.lora_B = nn.Parameter(torch.empty(outputs, lora.rank, **kind))
        self.register_parameter("lora_magnitude", nn.Parameter(torch.empty(outputs, **kind)) if lora.use_dora else None)

    def base_weight(self) -> Tensor:
        """The frozen weight (O, I), dense."""
        raise NotImplementedError

    def project_base(self, x: Tensor) -> Tensor:
        """x (…, I) times the frozen weight: (…, O), without bias."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O): the frozen projection plus the adapter's, without bias.

        LoRA: x Wᵀ + s drop(x) Aᵀ Bᵀ (arXiv 2106.09685). DoRA: the same with every row of W + s B A scaled to length m (arXiv 2402.09353);
        as there (section 4.3) and in PEFT, no gradient flows through the row's own length, and dropout acts on x in both terms of the change.
        """
        base = self.project_base(x)
        if not self.adapter_enabled:
            return base
        drop = self.training and self.lora.dropout > 0
        dropped = self.drop(x) if drop else x
        # The adapter may be held in float32 beside a bfloat16 base: its gradient then arrives in float32.
        update = linear(linear(dropped, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.lora.scaling
        if self.lora_magnitude is None:
            return base + update
        ratio = self.lora_magnitude / self.row_norms()  # close to 1, where bfloat16 is coarse
        changed = self.project_base(dropped) if drop else base
        return base + (ratio - 1).to(x.dtype) * changed + ratio.to(x.dtype) * update

    def adapted_weight(self) -> Tensor:
        """W + s B A (O, I) in float32, for DoRA before rows get their length."""
        return torch.addmm(
            self.base_weight().float(), self.lora_B.float(), self.lora_A.float(), alpha=self.lora.scaling
        )

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Lengths (O,) of the rows of W + s B A, in float32; never differentiated."""
        return self._lengths(self.adapted_weight())

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight (O, I) in float32 that alone does what base and adapter do together."""
        weight = self.adapted_weight()
        if self.lora_magnitude is None:
            return weight
        return weight.mul_((self.lora_magnitude.float() / self._lengths(weight))[:, None])

    def _lengths(self, rows: Tensor) -> Tensor:
        """Of each row; never 0, since they are divided by."""
        return self.over_inputs(torch.linalg.vector_norm(rows, dim=1)).clamp_min_(1e-30)

    def materialize_adapter(self, device: torch.device) -> None:
        """Give the adapter's parameters memory on `device` where they are on meta, without values."""
        for name in ADAPTER_PARAMETERS:
            parameter = getattr(self, name)
            if parameter is not None and parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                setattr(self, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator, device: torch.device, part: Part | None = None) -> None:
        """lora_A uniform in ±1/sqrt(I) (what kaiming_uniform_(a=sqrt 5) gives), lora_B zero: no change yet, once magnitudes are set.

        part: what of lora_A is here, where it is not the whole.
        """
        self.materialize_adapter(device)
        part = part or Part.whole(self.lora_A.shape)
        bound = 1 / math.sqrt(part.shape[1])
        drawn = torch.empty(part.shape).uniform_(-bound, bound, generator=generator)
        local_tensor(self.lora_A).copy_(part.take(drawn))
        local_tensor(self.lora_B).zero_()


class LoRALinear(LoRALayer, Linear):
    """A frozen dense linear layer with an adapter."""

    def base_weight(self) -> Tensor:
        return self.weight

    def project_base(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        output = self.project(input)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.lora}"


class NF4LoRALinear(LoRALinear, NF4Linear):
    """A frozen NF4 linear layer with an adapter (QLoRA, arXiv 2305.14314; with use_dora: QDoRA)."""

    def base_weight(self) -> Tensor:
        return self.dense_weight(torch.float32)

    def project_base(self, x: Tensor) -> Tensor:
        return self.project_quantized(x)


class LoRAHead(LoRALayer, Head):
    """The output layer with an adapter. Where the head is tied, the adapter changes the logits alone, not the embedding."""

    def base_weight(self) -> Tensor:
        return self.matrix

    def project_base(self, x: Tensor) -> Tensor:
        return linear(x, self.matrix)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.lora}"


_PLAIN = {LoRALinear: Linear, NF4LoRALinear: NF4Linear, LoRAHead: Head}


def retyped(module: nn.Module, kind: type[M]) -> M:
    """A module of class `kind` with the attributes, parameters and hooks of `module`."""
    copy = kind.__new__(kind)
    copy.__dict__.update(
        {key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()}
    )
    return copy


def _with_adapter(module: nn.Module, lora: LoRA, dtype: torch.dtype | None) -> LoRALayer:
    if isinstance(module, NF4Linear):
        layer, weight_dtype, device = retyped(module, NF4LoRALinear), module.compute_dtype, module.weight_nf4.device
        outputs, inputs = module.weight_shapes()["weight"]
    else:
        weight = module.matrix if isinstance(module, Head) else module.weight
        assert isinstance(weight, Tensor)
        layer, weight_dtype, device = (
            retyped(module, LoRAHead if isinstance(module, Head) else LoRALinear),
            weight.dtype,
            weight.device,
        )
        outputs, inputs = weight.shape
    layer.add_adapter(lora, inputs, outputs, dtype or weight_dtype, device)
    return layer


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every layer that can carry an adapter: linear layers and the output layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Head)) and name}


def find_targets(model: nn.Module, target_modules: str | Iterable[str]) -> list[str]:
    """Full names of the layers that `target_modules` means, in the model's order: see `nn.targets.choose_layers`."""
    layers = adaptable_layers(model)
    heads = [name for name, module in layers.items() if isinstance(module, Head)]
    return choose_layers(list(layers), heads, target_modules)


def apply_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: str | Iterable[str] = "all-linear",
    use_dora: bool = False,
    use_rslora: bool = False,
    quantize_base: str | None = None,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Put adapters on the target layers of `model` in place (see `find_targets`) and return the layers' names.

    Works on the meta device and on loaded weights; base parameters keep their names, and all of them should be frozen afterwards
    (`freeze_base`). quantize_base "nf4" also turns every linear layer but the output layer into NF4, adapted or not. The patterns give
    single layers another rank or alpha, as in PEFT: {end of a layer's name, or a regular expression for it: value}. dtype is the adapter's
    number type (default: that of the weight beside it), and that of modules trained whole beside adapters. Then load the weights, and call `reset_adapters`.
    """
    if quantize_base not in (None, "nf4"):
        raise UserError(f"quantize_base can be nf4 or null, not {quantize_base!r}")
    names = find_targets(model, target_modules)
    if quantize_base:
        quantize_linear_layers(model)
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, LoRALayer):
            raise ValueError(f"{name} already has an adapter")
        lora = LoRA(
            rank=_of_pattern(rank_pattern, name, rank),
            alpha=_of_pattern(alpha_pattern, name, alpha),
            dropout=dropout,
            use_dora=use_dora,
            use_rslora=use_rslora,
        )
        replace_module(model, name, _with_adapter(module, lora, dtype))
    for module in filter(_is_trained_whole, model.modules()):
        module.to(dtype)
    return names


def _of_pattern(patterns: dict[str, V] | None, name: str, default: V) -> V:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def adapter_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Name -> module of every layer with an adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def materialize_adapters(model: nn.Module, device: torch.device) -> None:
    """Give all adapters still on meta memory on `device`, to be filled at once."""
    for layer in adapter_layers(model).values():
        layer.materialize_adapter(device)


def reset_adapters(model: nn.Module, seed: int, device: torch.device | str = "cpu") -> None:
    """Initialise all adapters so that they change nothing; the base weights must be loaded.

    Each is drawn from a generator seeded by (seed, its name), so it depends neither on which other layers have one nor on the mesh.
    Adapters still on meta are created on `device`.
    """
    parts = parameter_parts(model)
    for name, layer in adapter_layers(model).items():
        digest = hashlib.sha256(f"{seed} {name}.lora_A".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        layer.reset_adapter(generator, torch.device(device), parts[f"{name}.lora_A"])
    reset_magnitudes(model)


@torch.no_grad()
def reset_magnitudes(model: nn.Module) -> None:
    """Let DoRA's magnitudes be the lengths of the rows as they are, so that they change nothing."""
    for owner, layers in by_shard(model, LoRALayer):
        magnitudes = {name: layer for name, layer in layers.items() if layer.lora_magnitude is not None}
        if not magnitudes:
            continue
        tied = [layer.tied_to for layer in magnitudes.values() if isinstance(layer, Head) and layer.tied_to is not None]
        with ExitStack() as stack:
            for one in (owner, *tied):
                stack.enter_context(unsharded(one))
            lengths = {name: layer.row_norms() for name, layer in magnitudes.items()}
        for name, layer in magnitudes.items():
            assert layer.lora_magnitude is not None
            start, stop = shard_rows(layer.lora_magnitude)
            local_tensor(layer.lora_magnitude).copy_(lengths[name][start:stop])


def is_adapters(model: nn.Module, name: str) -> bool:
    """Whether a parameter is trained with the adapters: one of theirs, or of a module that is trained whole beside them."""
    module, _, leaf = name.rpartition(".")
    return leaf in ADAPTER_PARAMETERS or _is_trained_whole(model.get_submodule(module))


def _is_trained_whole(module: nn.Module) -> bool:
    return getattr(module, "is_trained_beside_adapters", False)


def freeze_base(model: nn.Module) -> list[str]:
    """Let the adapters' parameters alone be trained, and what is trained whole beside them; return their names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapters(model, name))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it the model computes what its base does: the reference of preference and reinforcement methods."""
    layers = list(adapter_layers(model).values())
    before = [layer.adapter_enabled for layer in layers]
    for layer in layers:
        layer.adapter_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapter_enabled = enabled


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """{parameter's name: tensor} of all that `is_adapters`, or what of it is here, detached, not copied."""
    return {
        name: local_tensor(parameter.detach())
        for name, parameter in model.named_parameters()
        if is_adapters(model, name)
    }


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Fold every adapter into its layer's weight (in float32, rounded once) and put plain layers back; return their names.

    A tied head gets a weight of its own. Raises UserError for an NF4 base: merge into the model it was quantized from instead.
    """
    layers = adapter_layers(model)
    for name, layer in layers.items():
        check_mergeable(name, layer)
        weight = layer.base_weight()
        merged = nn.Parameter(layer.merged_weight().to(weight.dtype), requires_grad=weight.requires_grad)
        plain = retyped(layer, next(_PLAIN[kind] for kind in type(layer).__mro__ if kind in _PLAIN))
        for attribute in (*ADAPTER_PARAMETERS, "weight"):
            plain._parameters.pop(attribute, None)
        for attribute in ("lora", "adapter_enabled"):
            plain.__dict__.pop(attribute)
        if isinstance(plain, Head):
            plain._tied_to = (None,)
        plain.weight = merged
        replace_module(model, name, plain)
    return list(layers)


def check_mergeable(name: str, layer: LoRALayer) -> None:
    """Raise UserError where folding the adapter in would lose accuracy: on an NF4 weight."""
    if isinstance(layer, NF4Linear):
        raise UserError(
            f"{name} is held in NF4: an adapter is merged into the unquantized base (load it without quantize_base, or use `tune run export`)"
        )
