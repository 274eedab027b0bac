"""The decoder-only language model in Llama's shape; families that differ by degree need nothing else.

B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.models.family import DecoderConfig, Family
from tunesmith.models.weights import Drop, Operator
from tunesmith.nn.attention import Attention, Sight
from tunesmith.nn.head import Head
from tunesmith.nn.kernels import block_mask, causal_mask, chunk_mask
from tunesmith.nn.kv_cache import KVCache, Pass
from tunesmith.nn.mlp import GatedMLP
from tunesmith.nn.norm import RMSNorm
from tunesmith.nn.rope import Rotary
from tunesmith.nn.sequence_shards import SequenceShards


class Block(nn.Module):
    """One layer: attention and feed-forward, each on the normed stream and added to it."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.add_halves(config, layer)
        self.add_norms(config)

    def add_halves(self, config: DecoderConfig, layer: int) -> None:
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias)

    def add_norms(self, config: DecoderConfig) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm)

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), sight)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm: token ids (B, T) -> hidden (B, T, D).

    A stage of a pipeline has some of the layers: if it isn't first it is given hidden states, if it isn't last it doesn't norm them.
    """

    is_first = is_last = True
    computes_in: torch.dtype | None = None
    computes_on: torch.device | None = None

    def __init__(self, config: DecoderConfig, block: type[nn.Module]):
        super().__init__()
        self.config = config
        # Given its memory, or drawing normal numbers for it on the meta device would import torch._dynamo: more than a second.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        self.layers = nn.ModuleDict({str(layer): block(config, layer) for layer in range(config.num_hidden_layers)})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm)
        self.rotary = {False: Rotary(config.rope, config.head_dim)}
        if config.local_rope is not None:
            self.rotary[True] = Rotary(config.local_rope, config.head_dim)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Number type of hidden states: the weights' own, unless `computes_in` was set because they are cast on use."""
        return self.computes_in or self.weight_dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """Number type in which weights are kept, but for quantized ones."""
        return next(module.weight.dtype for module in self.modules() if isinstance(module, RMSNorm))

    @property
    def device(self) -> torch.device:
        """Where it computes: where its weights are, unless `computes_on` was set because they wait in host memory."""
        return self.computes_on or next(self.parameters()).device

    def stage(self, layers: Iterable[int], is_first: bool, is_last: bool) -> Decoder:
        """A decoder of some of the layers, the same modules, under the same names."""
        part: Any = Decoder.__new__(Decoder)
        nn.Module.__init__(part)
        part.config, part.rotary, part.is_first, part.is_last = self.config, self.rotary, is_first, is_last
        part.embed_tokens = self.embed_tokens if is_first else None
        part.layers = nn.ModuleDict({str(layer): self.layers[str(layer)] for layer in layers})
        part.norm = self.norm if is_last else None
        return part

    def forward(self, inputs: Tensor, sight: Sight) -> Tensor:
        x = self.embed(inputs) if self.is_first else inputs
        for layer in self.layers.values():
            x = layer(x, sight)
        return self.norm(x) if self.is_last else x

    def embed(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        if self.config.embedding_scale is None:
            return x
        # Rounded to the model's dtype first, as the families that scale were trained with.
        return x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)


class CausalLM(nn.Module):
    """A decoder and its head. forward gives hidden states, because losses apply the head themselves, in chunks."""

    block: type[nn.Module] = Block
    head_name = "lm_head"
    """The attribute that holds the output layer, and what the names of its parameters begin with."""
    lm_head: Head

    def __init__(self, config: DecoderConfig, family: Family, hf_config: dict[str, Any]):
        super().__init__()
        self.config, self.family, self.hf_config = config, family, hf_config
        self.model = Decoder(config, self.block)
        setattr(self, self.head_name, self.build_head())
        self.max_seq_len: int | None = None
        self.sequence_shards: SequenceShards | None = None
        """Set where ranks share the rows of a training batch: forward then takes this rank's tokens, with their positions and documents."""
        self.pipeline: Any = None
        """Set where other ranks hold some of the layers (parallel.pipeline.Pipeline): embedding, norm or head may be None then."""
        self.elsewhere: tuple[str, ...] = ()
        """What the names of their parameters start with."""
        self.copies: dict[str, str] = {}
        """{parameter: the one that it is a copy of}, here or on another rank: kept equal, counted once, saved once."""

    def build_head(self) -> Any:
        """The output layer, uninitialised."""
        tied_to = self.model.embed_tokens if self.config.tie_word_embeddings else None
        return Head(self.config.hidden_size, self.config.vocab_size, tied_to, self.config.final_logit_softcap)

    @property
    def head(self) -> Any:
        """The output layer; None on a rank of a pipeline that lacks the last stage."""
        return getattr(self, self.head_name)

    @property
    def num_outputs(self) -> int:
        """What the output layer gives for a token."""
        return self.config.vocab_size

    @property
    def architectures(self) -> tuple[str, ...]:
        """What config.json may call it, the usual name first."""
        return self.family.architectures

    def init_buffers(self, device: torch.device | str | None = None, max_seq_len: int | None = None) -> None:
        """To be called after to_empty. max_seq_len: in training, rotary frequencies that depend on a sequence's length
        are those of this length."""
        self.max_seq_len = max_seq_len

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | Pass | None = None,
    ) -> Tensor:
        """Token ids (B, T) -> hidden states (B, T, D) after the final norm.

        positions: (B, T), position of each token within its document; None: counted from the start of the row, or from
            what the cache holds. Negative: padding (only with a cache).
        documents: (B, T), number of the document that a token belongs to, which must be contiguous, -1 for padding;
            None: each row is one document, padded at the right if at all.
        cache: holds the tokens before these; these are added to it. With documents, only 0 and -1 make sense. A Pass says of
            one line of tokens (1, T) which sequences they belong to, and where they stand.
        """
        return self._hidden(input_ids, positions, documents, cache, self.max_seq_len, self.sequence_shards)

    def logits(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | Pass | None = None,
    ) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V) as transformers computes them: rotary frequencies that depend on the
        length are those of this input's length, whatever max_seq_len is. Takes whole rows, on every layout."""
        return self.head.logits(self._hidden(input_ids, positions, documents, cache, None))

    @property
    def weights(self) -> tuple[Operator, ...]:
        """Between names in files and names in the model, for this very model."""
        tied = (Drop("lm_head.weight"),) if self.config.tie_word_embeddings else ()
        return (*self.family.weights, *tied)

    def _hidden(
        self, input_ids, positions, documents, cache: KVCache | Pass | None, max_seq_len: int | None, shards=None
    ) -> Tensor:
        if cache is None:
            return self.model(input_ids, self.sight(input_ids, positions, documents, max_seq_len, shards))
        if isinstance(cache, Pass):
            return self._hidden_of_line(input_ids, cache)
        return self._hidden_of_rows(input_ids, positions, documents, cache)

    def _hidden_of_line(self, input_ids: Tensor, line: Pass) -> Tensor:
        return self.model(input_ids, Sight({}, self._cos_sin(line.positions, line.lengths), cached=line))

    def _hidden_of_rows(self, input_ids: Tensor, positions, documents, cache: KVCache) -> Tensor:
        where = cache.places(input_ids.shape[1], positions, documents)
        if cache.ids is not None:
            old, new = cache.length, torch.maximum(cache.length, where.amax(-1) + 1)
            rows, places = (where >= 0).nonzero(as_tuple=True)
            cache.ids[rows, where[rows, places]] = input_ids.cpu()[rows, places]
            if any(self.length_matters(*pair) for pair in zip(old.tolist(), new.tolist())):
                return self._hidden_anew(where, new, cache)
        return self._hidden_of_line(input_ids.reshape(1, -1), cache.add(where)).view(*input_ids.shape, -1)

    def _hidden_anew(self, where: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        """Where a row grew into other rotary frequencies, all that the cache holds of it is out of date: compute it again.

        So cached decoding equals decoding without a cache, and a row doesn't depend on the others.
        """
        assert cache.ids is not None
        order = torch.arange(int(lengths.max()))
        everything = torch.where(order < lengths[:, None], order, -1)
        cache.length = 0
        ids = cache.ids[:, : len(order)].to(self.model.device)
        hidden = self._hidden_of_line(ids.reshape(1, -1), cache.add(everything)).view(*ids.shape, -1)
        return hidden.gather(1, where.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]).to(hidden.device))

    def length_matters(self, old: int, new: int) -> bool:
        """Whether what was computed of a sequence of `old` tokens is out of date when it has grown to `new`."""
        return old > 0 and self.length_class(old) != self.length_class(new)

    def length_class(self, length: int) -> tuple[int, ...]:
        """The same for lengths (tokens) whose sequences have the same rotary frequencies."""
        return tuple(rotary.length_class(length) for rotary in self.model.rotary.values())

    def sight(self, input_ids: Tensor, positions, documents, max_seq_len: int | None, shards=None) -> Sight:
        """What every layer needs to know about a forward pass without a cache, built once."""
        if shards is not None:
            return self.shared_sight(shards, input_ids, positions, documents)
        (batch_size, length), device = input_ids.shape, input_ids.device
        longest = length if max_seq_len is None else max_seq_len
        if positions is None:
            positions = torch.arange(length, device=device)[None]
        elif self.config.depends_on_length and max_seq_len is None:
            longest = int(positions.max()) + 1
        cos_sin, windows = self._cos_sin(positions, longest), set(self.config.layer_windows)
        if device.type == "cuda" and (documents is not None or windows != {None} or self.config.attention_softcap):
            blocks = {window: block_mask(length, window, documents, batch_size, device) for window in windows}
            return Sight({}, cos_sin, block_masks=blocks)
        if documents is not None and device.type == "cpu" and not self._is_compiled():
            return Sight({}, cos_sin, segments=segments(documents))
        return Sight({window: causal_mask(length, window, device, documents) for window in windows}, cos_sin)

    def shared_sight(
        self, shards: SequenceShards, input_ids: Tensor, positions: Tensor, documents: Tensor | None
    ) -> Sight:
        """The same where ranks share rows: input_ids, positions and documents are this rank's."""
        (batch_size, own), device = input_ids.shape, input_ids.device
        length = own * shards.ranks
        if documents is not None:
            documents = shards.whole(documents)

        def mask(chunk: tuple[int, int], window: int | None):
            if device.type != "cuda":
                return chunk_mask(chunk, window, device, documents)
            return block_mask(chunk[1], window, documents, batch_size, device, chunk[0])

        masks = {w: [mask(chunk, w) for chunk in shards.ranges(length)] for w in set(self.config.layer_windows)}
        cos_sin = self._cos_sin(positions, length if self.max_seq_len is None else self.max_seq_len)
        return Sight({}, cos_sin, shards=shards, chunk_masks=masks)

    def _cos_sin(self, positions: Tensor, length: int | Tensor | None) -> dict[bool, tuple[Tensor, Tensor]]:
        dtype = torch.float32 if self.config.rope_in_float32 else self.model.compute_dtype
        found = {local: rotary(positions, length) for local, rotary in self.model.rotary.items()}
        return {local: (cos.to(dtype), sin.to(dtype)) for local, (cos, sin) in found.items()}

    def _is_compiled(self) -> bool:
        """Compiled layers take masks: a loop over documents would be traced anew for every batch."""
        layers = self.model.layers.values()
        return torch.compiler.is_compiling() or any(layer._compiled_call_impl is not None for layer in layers)


def segments(documents: Tensor) -> list[tuple[int, bool]]:
    """(tokens, is padding) of each run of one document in (B, T), all rows in one line."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    begins = starts.flatten().nonzero().squeeze(-1)
    padding = documents.flatten()[begins] < 0
    lengths = torch.diff(begins, append=begins.new_tensor([documents.numel()]))
    return list(zip(lengths.tolist(), padding.tolist()))


def build(hf: dict[str, Any], family: Family, config: DecoderConfig) -> CausalLM:
    """The model of a config.json, its parameters uninitialised; call it under torch.device("meta").

    hf: what config.json will hold when the model is saved.
    """
    kinds = [family.model] if family.scores(hf) is None else ["tunesmith.models.score:ScoreModel", family.model]
    return _mixed(*kinds)(config, family, hf)


@functools.cache
def _mixed(*names: str) -> Any:
    """The class that has the classes of these dotted names for bases; a single one itself."""
    classes = [getattr(importlib.import_module(module), name) for module, _, name in (n.partition(":") for n in names)]
    bases = [kind for kind in classes if not any(kind is not other and issubclass(other, kind) for other in classes)]
    return bases[0] if len(bases) == 1 else type("".join(kind.__name__ for kind in bases), tuple(bases), {})
