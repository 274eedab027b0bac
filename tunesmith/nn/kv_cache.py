"""Keys and values of the tokens seen so far, for decoding one token at a time.

B batch, T new tokens, S slots, H key-value heads, K head size.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from tunesmith.nn.config import DecoderConfig


class KVCache:
    """One slot for each position of each row: the token at position p lies in slot p, and sees slots up to p.

    So rows may have different lengths: whatever lies in slots beyond a row's length is never seen, and overwritten in
    time. One slot more than max_length takes what isn't to be kept (padding).
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        shape = (batch_size, config.num_key_value_heads, max_length + 1, config.head_dim)
        layers = range(config.num_hidden_layers)
        # Zeros, not empty: a slot that is masked out still meets a product with 0, and 0 * nan is nan.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.max_length = max_length
        self.ids = (
            torch.zeros(batch_size, max_length + 1, dtype=torch.int64, device=device)
            if config.depends_on_length
            else None
        )
        """The tokens themselves, where keys and values may have to be computed again."""
        self._length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.end = 0
        """No row is longer than this."""
        self.uniform = True
        """Whether all rows are known to be `end` tokens long."""

    @property
    def length(self) -> Tensor:
        """(B,) tokens in each row."""
        return self._length

    @length.setter
    def length(self, length: int | Tensor) -> None:
        """Shorten rows, such as by the right padding of a batch of prompts."""
        if isinstance(length, Tensor) and length.dim():
            self._length = length.to(self._length)
            self.end = int(self._length.max())
            self.uniform = bool((self._length == self.end).all())
        else:
            self._length = torch.full_like(self._length, int(length))
            self.end, self.uniform = int(length), True

    def end_after(self, tokens: int) -> int:
        """The bound `end` once so many tokens are added to each row."""
        if self.uniform and self.end + tokens > self.max_length:
            raise ValueError(f"a cache of {self.max_length} tokens can't take {tokens} after {self.end}")
        return min(self.end + tokens, self.max_length)

    def advance(self, tokens: int, lengths: Tensor | None) -> None:
        """Note that tokens were written to each row; lengths (B,) if rows are not equally long."""
        self.end, self.uniform = self.end_after(tokens), self.uniform and lengths is None
        self._length = self._length + tokens if lengths is None else lengths

    def part(self, rows: slice) -> KVCache:
        """Some rows as a cache of its own in the same memory: what it takes is here too, but this one's `length` is to be set."""
        part = copy.copy(self)
        part.keys = [keys[rows] for keys in self.keys]
        part.values = [values[rows] for values in self.values]
        part.ids = None if self.ids is None else self.ids[rows]
        part.length = self._length[rows]
        return part

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, (B',) indices."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.ids = None if self.ids is None else self.ids[rows]
        self.length = self._length[rows]

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor | None) -> None:
        """Put the new keys and values (B, T, H, K) into slots (B, T), or behind the rows if they are all equally long."""
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if slots is None:
                store[:, :, self.end : self.end + new.shape[1]] = new.transpose(1, 2)
            else:
                rows = torch.arange(len(slots), device=slots.device)[:, None]
                store[rows, :, slots] = new.to(store.dtype)

    def read(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of slots start..end: views (B, H, end - start, K)."""
        return self.keys[layer][:, :, start:end], self.values[layer][:, :, start:end]
