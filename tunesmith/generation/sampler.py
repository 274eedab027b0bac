"""The next tokens of many sequences in one pass, each by its own options, and whatever stands beside it.

B sequences, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tunesmith.errors import UserError
from tunesmith.generation.sampling import Sampling

IN_PROMPT = 1 << 20
"""Stands in a row of `seen` for a token of the prompt; added to it is how often the token was generated."""
_FIRST, _FACTOR = 512, 16
"""Candidates that are looked at first where no top-k says how many; and how many times more then, if some are missing."""
_BLOCK = 256
_COLDEST = 1e-30
"""Below it logits divided by the temperature may be infinite: the likeliest token is taken."""


def seen_in(prompt: Sequence[int], vocab_size: int, generated: Sequence[int] = ()) -> Tensor:
    """(V,) int32, the row of `seen` of a sequence; 1 is added for each token that is generated."""
    row = torch.bincount(torch.tensor([*generated], dtype=torch.long), minlength=vocab_size).int()
    row[list(prompt)] += IN_PROMPT
    return row


class Sampler:
    """Chooses for B sequences with the options `samplings`. Steps apply in the order that Sampling names."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device):
        self._device = device
        self._logits = [change for change in (_Penalties(samplings, device), _Bias(samplings, device)) if change.rows]
        rows: dict[type, list[int]] = {}
        for row, one in enumerate(samplings):
            rows.setdefault(_way_of(one), []).append(row)
        self._ways = [(way([samplings[row] for row in of], device), of) for way, of in rows.items()]
        self._rows = [torch.tensor(of, device=device) for _, of in self._ways]

    @property
    def needs_uniforms(self) -> bool:
        return any(not isinstance(way, _Greedy) for way, _ in self._ways)

    @property
    def needs_seen(self) -> bool:
        return any(isinstance(change, _Penalties) for change in self._logits)

    def choose(
        self, logits: Tensor, uniforms: Tensor | None = None, seen: Tensor | None = None, allowed: Tensor | None = None
    ) -> Tensor:
        """The next tokens (B,) for `logits` (B, V) float32, which stay as they are.

        Args:
            uniforms: (B,) random numbers in [0, 1), one a sequence; where needs_uniforms.
            seen: (B, V) int32 as seen_in() begins it; where needs_seen.
            allowed: (B, V) bool, the tokens that a constraint lets come; None: all.
        """
        if self._logits:
            logits = logits.clone()
            for change in self._logits:
                change.apply(logits, seen)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        if len(self._ways) == 1:
            return self._ways[0][0].choose(logits, uniforms)
        tokens = torch.empty(len(logits), dtype=torch.long, device=self._device)
        for (way, _), rows in zip(self._ways, self._rows):
            tokens[rows] = way.choose(logits[rows], None if uniforms is None else uniforms[rows])
        return tokens


# What is done to logits ----------------------------------------------------------------------------------------------


class _Penalties:
    """Makes tokens that occurred less likely."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device):
        self.rows = [row for row, one in enumerate(samplings) if one.is_penalized]
        self._of_rows = torch.tensor(self.rows, device=device)

        def values(name: str) -> Tensor:
            return torch.tensor([getattr(samplings[row], name) for row in self.rows], device=device)

        self._repetition, self._presence = values("repetition_penalty"), values("presence_penalty")
        self._frequency = values("frequency_penalty")

    def apply(self, logits: Tensor, seen: Tensor | None) -> None:
        assert seen is not None
        part = seen if len(self.rows) == len(seen) else seen[self._of_rows]
        row, token = part.nonzero(as_tuple=True)
        made = part[row, token] % IN_PROMPT
        place = (self._of_rows[row], token)
        repetition = self._repetition[row]
        values = logits[place]
        values = torch.where(values < 0, values * repetition, values / repetition)
        logits[place] = values - self._frequency[row] * made - self._presence[row] * (made > 0)


class _Bias:
    """Adds to the logits of some tokens."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device):
        entries = [(row, token, value) for row, one in enumerate(samplings) for token, value in one.logit_bias.items()]
        self.rows = [row for row, _, _ in entries]
        self._highest = max((token for _, token, _ in entries), default=0)
        self._place = tuple(torch.tensor([entry[part] for entry in entries], device=device) for part in (0, 1))
        self._values = torch.tensor([value for _, _, value in entries], dtype=torch.float32, device=device)

    def apply(self, logits: Tensor, seen: Tensor | None) -> None:
        if self._highest >= logits.shape[-1]:
            raise UserError(
                f"`logit_bias` names token {self._highest}, but the model's vocabulary ends at {logits.shape[-1] - 1}"
            )
        logits[self._place] += self._values


# Ways to choose ------------------------------------------------------------------------------------------------------


class _Greedy:
    """Takes the likeliest token."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device):
        pass

    def choose(self, logits: Tensor, uniforms: Tensor | None) -> Tensor:
        return logits.argmax(-1)


class _Whole:
    """Draws from all tokens."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device):
        self._temperature = _column([one.temperature for one in samplings], device)

    def choose(self, logits: Tensor, uniforms: Tensor | None) -> Tensor:
        assert uniforms is not None
        parts = _in_parts(logits, logits, self._temperature, uniforms)
        return torch.cat([draw((values / heat).softmax(-1), numbers) for values, heat, numbers in parts])


class _Filtered:
    """Draws from the likeliest tokens: looks at some candidates, and at more of them only if these are not all.

    What is kept is found exactly: filters look down the tokens in the order of their logits, of equal ones the higher id
    first, and as soon as one that is no longer kept is among the candidates, so are all that are kept.
    """

    def __init__(self, samplings: Sequence[Sampling], device: torch.device):
        self._temperature = _column([one.temperature for one in samplings], device)
        self._top_k = _column([one.top_k or 0 for one in samplings], device)
        self._top_p = _column([torch.inf if one.top_p in (None, 1) else one.top_p for one in samplings], device)
        self._min_p = _column([one.min_p or 0.0 for one in samplings], device)
        self._needs_total = any(one.top_k is None and one.top_p not in (None, 1) for one in samplings)
        # Beyond top-k stand those that equal its last.
        self._first = max(_FIRST if one.top_k is None else one.top_k * 5 // 4 + 16 for one in samplings)

    def choose(self, logits: Tensor, uniforms: Tensor | None) -> Tensor:
        assert uniforms is not None
        total = _total(logits, self._temperature) if self._needs_total else torch.ones_like(self._temperature)
        tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        rows, size = torch.arange(len(logits), device=logits.device), self._first
        while len(rows):
            part = logits if len(rows) == len(logits) else logits[rows]
            values, ids = _likeliest(part, self._temperature[rows], size)
            weights = self._kept(values, rows, total[rows])
            tokens[rows] = _draw_among(weights, ids, uniforms[rows], logits.shape[-1])
            # Beyond the candidates may stand equals of the lowest.
            may_lack = ((weights > 0) & (values == values[:, -1:])).any(-1) & (ids.shape[-1] < logits.shape[-1])
            rows, size = rows[may_lack], size * _FACTOR
        return tokens

    def _kept(self, values: Tensor, rows: Tensor, total: Tensor) -> Tensor:
        """The weights (B, C) of candidates with logits `values` (B, C) from high to low, 0 where one is not kept.

        total: (B, 1) what all tokens weigh.
        """
        top_k, top_p, min_p = self._top_k[rows], self._top_p[rows], self._min_p[rows]
        weights = (values - values[:, :1]).to(_precise(values)).exp()
        last = values.gather(-1, (top_k - 1).clamp(0, values.shape[-1] - 1))
        weights = weights.where((top_k == 0) | (values >= last), 0)
        cumulative = weights.cumsum(-1)
        total = total.where(top_k == 0, cumulative[:, -1:])
        before = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))
        return weights.where((before < top_p * total) & (weights >= min_p), 0)


def _way_of(sampling: Sampling) -> type[_Greedy] | type[_Whole] | type[_Filtered]:
    if sampling.temperature < _COLDEST:
        return _Greedy
    is_whole = sampling.top_k is None and sampling.top_p in (None, 1) and sampling.min_p is None
    return _Whole if is_whole else _Filtered


# Parts of them -------------------------------------------------------------------------------------------------------


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (B,) drawn by `weights` (B, V) float32, inverting their distribution function at `uniforms` (B,) in [0, 1).

    Goes by blocks of tokens first, so that not all of it has to be added up in float64.
    """
    cumulative = _blocks(weights).cumsum(-1)
    target = uniforms.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, target)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, block)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(-1, ids.clamp(max=weights.shape[-1] - 1)).where(ids < weights.shape[-1], 0)
    return ids.gather(-1, _first_above(inside.to(cumulative.dtype).cumsum(-1), target - before)).squeeze(-1)


def _draw_among(weights: Tensor, ids: Tensor, uniforms: Tensor, vocab_size: int) -> Tensor:
    """The same of candidates with `weights` and `ids` (B, C), in the order of their ids."""
    if ids.shape[-1] == vocab_size:
        return draw(torch.empty_like(weights).scatter_(-1, ids, weights), uniforms)
    ids, order = ids.sort(-1)
    cumulative = weights.gather(-1, order).cumsum(-1)
    target = uniforms.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    return ids.gather(-1, _first_above(cumulative, target)).squeeze(-1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """(B, 1) the first places where `cumulative` (B, N) exceeds `target` (B, 1), but none of the last that add nothing."""
    last_possible = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last_possible)  # rounding reaches the end


def _likeliest(logits: Tensor, temperature: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The highest of `logits` / `temperature` (B, V) and their ids (B, C), at least `size`; of equal ones the higher id first."""
    if size * 4 >= logits.shape[-1]:
        values, ids = (logits / temperature).sort(dim=-1, stable=True)
        return values.flip(-1), ids.flip(-1)
    values, ids = logits.topk(size, sorted=False)
    ids, order = ids.sort(-1, descending=True)
    values, order = (values.gather(-1, order) / temperature).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _total(logits: Tensor, temperature: Tensor) -> Tensor:
    """(B, 1) what all of `logits` / `temperature` (B, V) weigh, if the highest weighs 1."""
    sums = []
    for values, heat in _in_parts(logits, logits, temperature):
        probabilities = (values / heat).softmax(-1)
        sums.append(_blocks(probabilities).cumsum(-1)[:, -1:] / probabilities.amax(-1, keepdim=True))
    return torch.cat(sums)


def _in_parts(logits: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of `tensors` at a time: on a CPU what is made of `logits` (B, V) then stays in its cache."""
    rows = max(1, 2**20 // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    return zip(*(tensor.split(rows) for tensor in tensors))


def _blocks(weights: Tensor) -> Tensor:
    """(B, N) float64 sums of `weights` (B, V) over blocks of tokens, the last of which may be short or empty."""
    whole = weights.shape[-1] // _BLOCK * _BLOCK
    sums = weights[:, :whole].unflatten(-1, (whole // _BLOCK, _BLOCK)).sum(-1)
    return torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], -1).to(_precise(weights))


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None]


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
