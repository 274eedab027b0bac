"""Tensor parallelism: every matrix cut over the ranks of an axis, as a family's plan of words says (models/family.py lists them).

Parameters become plain tensors of their local shape, so kernels, quantizers and adapters work on them as they are; which
part of the whole a rank holds is written down for loading and saving. Between the two halves of a layer every rank holds
its part of the tokens (sequence parallelism, arXiv 2205.05198) or, without it, all of them.

B batch, T tokens, D hidden, H heads, R rank of an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.configs.layout import split_block
from tunesmith.errors import UserError
from tunesmith.nn.attention import Sight
from tunesmith.nn.collectives import Group, copied, gathered, largest, scattered_sum, shared_sum, summed
from tunesmith.nn.fake_quantize import FakeQuantizedLayer, FakeQuantizedLinear
from tunesmith.nn.head import Head, VocabularyShard
from tunesmith.nn.linear import linear
from tunesmith.nn.lora import LoRALayer
from tunesmith.nn.norm import RMSNorm
from tunesmith.nn.part import Part, Range
from tunesmith.nn.quantize import BLOCK_SIZE, NF4Linear
from tunesmith.parallel.mesh import Mesh

_SEQUENCE = 1  # the dim of tokens in (B, T, D)
_OUTPUTS = ("colwise", "fused_qkv", "fused_pair")
"""Words for matrices whose output features are cut."""


def apply_tensor_parallel(
    model: nn.Module, plan: dict[str, str], mesh: Mesh, sequence_parallel: bool, asynchronous: bool = False
) -> None:
    """Cut the modules of `model` (on the meta device) that `plan` names, in place.

    asynchronous: whether the compiler will let messages and products overlap.
    Leaves on the model: `tensor_parts`, {parameter: part that this rank holds}, and `summed_over_tp`, the names of the
    parameters that are whole on every rank and of whose gradient each rank has a summand.
    """
    if mesh.size("tp") == 1:
        return
    group = mesh.group("tp")
    split = _Split(group, sequence_parallel, asynchronous)
    words = {name: word for name, _ in model.named_modules() if (word := _word(plan, name))}
    parts: dict[str, Part] = {}
    summands: set[str] = set()
    for name, word in words.items():
        module, owner = model.get_submodule(name), cast(Any, model.get_submodule(name.rpartition(".")[0]))
        if word == "fused_qkv":
            heads = (owner.num_heads, owner.num_key_value_heads, owner.num_key_value_heads)
            pieces = tuple(count * owner.head_dim for count in heads)
        else:
            pieces = (1, 1) if word == "fused_pair" else (1,)
        own = _cut(module, word, pieces, group)
        parts |= {f"{name}.{leaf}": part for leaf, part in own.items()}
        summands |= {f"{name}.{leaf}" for leaf in _partial(module, word)}
        _rewire(module, word, split, own)
    for name in {name.rpartition(".")[0] for name, word in words.items() if word in _OUTPUTS}:
        split.wrap_input(model.get_submodule(name))
    for decoder in [stage.decoder for stage in model.pipeline.stages] if model.pipeline else [model.model]:  # type: ignore[union-attr]
        split.wrap_decoder(decoder)  # type: ignore[arg-type]
    model.config = _local_config(model.config, group)  # type: ignore[arg-type, assignment]
    if sequence_parallel:  # what is whole sees some of the tokens, but for a head, which sees all
        head = f"{model.head_name}."
        summands |= {name for name, _ in model.named_parameters() if name not in parts and not name.startswith(head)}
    model.tensor_parts, model.summed_over_tp = parts, summands  # type: ignore[assignment]


def _local_config(config: Any, group: Group) -> Any:
    """The model's numbers as this rank computes with them: a cache holds its heads alone."""
    heads, key_value_heads = config.num_attention_heads // group.size(), config.num_key_value_heads // group.size()
    return replace(config, num_attention_heads=heads, num_key_value_heads=key_value_heads)


def _word(plan: dict[str, str], name: str) -> str | None:
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    return plan.get(generic)


# --- which part a rank holds -------------------------------------------------------------------------


def even(size: int, group: Group) -> Range:
    """This rank's range of `size` things; the last ranks get fewer where they don't come out even."""
    most = -(-size // group.size())
    start = min(group.rank() * most, size)
    return start, min(start + most, size)


def _cut(module: nn.Module, word: str, pieces: tuple[int, ...], group: Group) -> dict[str, Part]:
    """Give the module parameters of their local shape (on meta); return the part of each that is cut.

    pieces: relative numbers of outputs of what a matrix is fused of; each is cut on its own.
    """
    parts = {}
    if isinstance(module, NF4Linear):
        whole = module.weight_shapes()["weight"]
        if part := _part_of("weight", whole, word, pieces, group):
            parts["weight"] = part
            module.out_features, module.in_features = part.local_shape
            _check_blocks(part, group.size())
            blocks = part.local_shape.numel() // BLOCK_SIZE
            quantized = torch.empty(blocks, module.weight_nf4.shape[1], dtype=torch.uint8, device="meta")
            module.weight_nf4 = nn.Parameter(quantized, requires_grad=False)
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        if leaf != "weight_nf4" and (part := _part_of(leaf, parameter.shape, word, pieces, group)):
            parts[leaf] = part
            local = torch.empty(part.local_shape, dtype=parameter.dtype, device=parameter.device)
            setattr(module, leaf, nn.Parameter(local, requires_grad=parameter.requires_grad))
    if isinstance(module, nn.Linear) and not isinstance(module, NF4Linear):
        module.out_features, module.in_features = module.weight.shape
    return parts


def _part_of(leaf: str, shape: torch.Size, word: str, pieces: tuple[int, ...], group: Group) -> Part | None:
    """The part of parameter `leaf`; None: it is whole on every rank."""
    whole = Part.whole(shape)
    by_rows = word == "all_heads" or (word != "rowwise" and leaf in ("weight", "bias", "lora_B", "lora_magnitude"))
    if word in (*_OUTPUTS, "embedding", "head", "all_heads") and by_rows:
        return Part(whole.shape, tuple(_even_pieces(shape[0], pieces, group)))
    if word == "rowwise" and leaf in ("weight", "lora_A"):
        return Part(whole.shape, whole.rows, even(shape[1], group))
    return None


def _even_pieces(outputs: int, pieces: tuple[int, ...], group: Group) -> Iterator[Range]:
    """This rank's range of each piece, of `outputs` in all."""
    start = 0
    for share in pieces:
        size = outputs * share // sum(pieces)
        first, last = even(size, group)
        yield start + first, start + last
        start += size


def _check_blocks(part: Part, ranks: int) -> None:
    rows, columns = part.local_shape
    aligned = columns if part.columns is not None else rows * columns
    if aligned % BLOCK_SIZE or any(((stop - start) * columns) % BLOCK_SIZE for start, stop in part.rows):
        raise UserError(split_block(ranks, f"{rows} x {columns} numbers of a matrix of {tuple(part.shape)}"))


def _partial(module: nn.Module, word: str) -> list[str]:
    """Parameters that stay whole, and of whose gradient each rank computes a summand."""
    leaves = [leaf for leaf, _ in module.named_parameters(recurse=False)]
    if word in _OUTPUTS or word == "head":
        return [leaf for leaf in leaves if leaf == "lora_A"]
    if word == "rowwise":
        return [leaf for leaf in leaves if leaf in ("lora_B", "lora_magnitude")]
    return leaves if word == "per_head" else []


# --- what a module computes with its part ------------------------------------------------------------


class _Split:
    """How a stream of hidden states (B, T, D) enters and leaves the region where every rank computes its part."""

    def __init__(self, group: Group, sequence_parallel: bool, asynchronous: bool):
        self.group, self.sequence_parallel, self.asynchronous = group, sequence_parallel, asynchronous
        self.cuts = sequence_parallel
        """Whether ranks now hold parts of the tokens: not where these don't come out even, as in decoding one by one."""

    def enter(self, x: Tensor) -> Tensor:
        return gathered(x, _SEQUENCE, self.group, sums=True) if self.cuts else copied(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        return scattered_sum(x, _SEQUENCE, self.group) if self.cuts else summed(x, self.group)

    def wrap_input(self, module: nn.Module) -> None:
        """Attention or feed-forward: its matrices are cut by outputs first, so it sees all tokens."""
        forward = module.forward

        def entered(x: Tensor, *more: Any) -> Tensor:
            return forward(self.enter(x), *more)

        module.forward = entered

    def wrap_decoder(self, decoder: nn.Module) -> None:
        """What comes out of the decoder is whole and the same on all ranks, and so is its gradient."""
        forward = decoder.forward

        def whole(inputs: Tensor, sight: Sight) -> Tensor:
            length = next(iter(sight.cos_sin.values()))[0].shape[1]
            self.cuts = self.sequence_parallel and length % self.group.size() == 0
            hidden = forward(inputs, sight)
            is_stream = decoder.is_last and self.cuts  # type: ignore[attr-defined]
            return gathered(hidden, _SEQUENCE, self.group, sums=False) if is_stream else hidden

        decoder.forward = whole


def _rewire(module: nn.Module, word: str, split: _Split, parts: dict[str, Part]) -> None:
    """Make `module` compute with its parts what the whole would."""
    if word == "rowwise":
        _sum_outputs(module, split)
    elif word in _OUTPUTS and split.asynchronous and not isinstance(module, FakeQuantizedLayer):
        _add_bias_apart(module)
    elif word == "embedding":
        _look_up_own_rows(module, split)  # type: ignore[arg-type]
    elif word == "head":
        assert isinstance(module, Head)
        module.shard = VocabularyShard(*even(module.vocab_size, split.group), split.group)
    elif word == "all_heads":
        _norm_over_all(module, split.group)  # type: ignore[arg-type]
    if isinstance(module, FakeQuantizedLayer) and word == "rowwise":
        module.over_ranks = lambda reach: None if reach is None else largest(reach, split.group)
    if isinstance(module, LoRALayer) and word == "rowwise":
        module.over_inputs = lambda lengths: summed(lengths.square(), split.group).sqrt()
        module.drop = partial(_drop_own_features, parts["lora_A"], module.lora.dropout)


def _sum_outputs(module: Any, split: _Split) -> None:
    def forward(x: Tensor) -> Tensor:
        y = split.leave(_without_bias(module, x))
        return y if module.bias is None else y + module.bias.to(y.dtype)

    module.forward = forward


def _add_bias_apart(module: Any) -> None:
    """The compiler pipelines products alone, not those that add a bias on the way."""
    if module.bias is not None:
        module.forward = lambda x: (y := _without_bias(module, x)) + module.bias.to(y.dtype)


def _without_bias(module: Any, x: Tensor) -> Tensor:
    if isinstance(module, (LoRALayer, FakeQuantizedLinear)):
        return module.project(x)
    return module.project_quantized(x) if isinstance(module, NF4Linear) else linear(x, module.weight)


def _drop_own_features(part: Part, probability: float, x: Tensor) -> Tensor:
    """Dropout on this rank's features. All ranks draw for all of them, from generators in the same state: so parts get
    patterns of their own, generators stay alike for what is whole, and the numbers are those of one rank.
    """
    start, stop = part.columns or (0, part.shape[1])
    drawn = F.dropout(x.new_ones(*x.shape[:-1], part.shape[1]), probability)
    return x * (drawn[..., start:stop] != 0) * (1 / (1 - probability))


def _look_up_own_rows(module: nn.Embedding, split: _Split) -> None:
    start, stop = even(module.num_embeddings, split.group)

    def forward(input: Tensor) -> Tensor:
        is_own = (input >= start) & (input < stop)
        rows = F.embedding(torch.where(is_own, input - start, 0), module.weight)
        return split.leave(rows * is_own[..., None])

    module.forward = forward


def _norm_over_all(norm: RMSNorm, group: Group) -> None:
    """A norm over the features of all ranks: the mean of squares is theirs together."""

    def forward(x: Tensor) -> Tensor:
        wide = x.float()
        mean_square = shared_sum(wide.square().sum(-1, keepdim=True), group) / (x.shape[-1] * group.size())
        return norm.scaled(wide * torch.rsqrt(mean_square + norm.eps), x)

    norm.forward = forward
