"""How many ranks share what: the sizes of the mesh's axes, checked against each other, against the model and the number of processes. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import UserError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")

OPTIONS = {
    "pp": "pipeline_parallel_dim",
    "dp_replicate": "data_parallel_replicate_dim",
    "dp_shard": "data_parallel_shard_dim",
    "cp": "context_parallel_dim",
    "tp": "tensor_parallel_dim",
    "ep": "expert_parallel_dim",
}

QUANTIZED_BLOCK = 64
"""Numbers of a 4-bit block, which stay on one rank."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; -1 for dp_shard: all ranks that are left. ep: ranks of dp_shard x cp that split experts among them."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @classmethod
    def of(cls, config: Any) -> Layout:
        """The layout that a recipe's options ask for."""
        return cls(**{axis: getattr(config, option) for axis, option in OPTIONS.items() if hasattr(config, option)})

    def sizes(self, world_size: int) -> tuple[int, ...]:
        """The size of every axis in the order of AXES. Raises UserError where they do not multiply to `world_size`."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if -1 in sizes.values():
            if world_size % fixed:
                raise UserError(
                    f"{self._named(sizes)} needs a multiple of {fixed} processes, but {_started(world_size)}"
                )
            sizes = {axis: world_size // fixed if size == -1 else size for axis, size in sizes.items()}
        elif fixed != world_size:
            raise UserError(
                f"{self._named(sizes)} makes {fixed} processes, but {_started(world_size)}: "
                "change one of them, or let `data_parallel_shard_dim: -1` take what is left"
            )
        if (shards := sizes["dp_shard"] * sizes["cp"]) % self.ep:
            raise UserError(
                f"`{OPTIONS['ep']}: {self.ep}` does not divide the {shards} ranks that parameters are cut over "
                f"(`{OPTIONS['dp_shard']}: {sizes['dp_shard']}` x `{OPTIONS['cp']}: {sizes['cp']}`)"
            )
        return tuple(sizes[axis] for axis in AXES)

    def _named(self, sizes: dict[str, int]) -> str:
        given = [f"`{OPTIONS[axis]}: {size}`" for axis, size in sizes.items() if size not in (1, -1)]
        return " x ".join(given) or "the layout's sizes"

    def length_problem(self, length: int | None, sequence_parallel: bool) -> str | None:
        """What keeps rows of `length` tokens from being shared by the ranks that split a sequence; None if nothing does."""
        shared_by_tp = self.tp if sequence_parallel else 1
        multiple = 2 * self.cp * shared_by_tp
        if self.cp == 1 or length is None or length % multiple == 0:
            return None
        reason = f"2 chunks for each of `context_parallel_dim: {self.cp}` ranks"
        if shared_by_tp > 1:
            reason += f", each cut by `tensor_parallel_dim: {self.tp}` with `sequence_parallel`"
        return (
            f"`tokenizer.max_seq_len: {length}` must be a multiple of {multiple} ({reason}): "
            f"take {length // multiple * multiple or multiple} or {(length // multiple + 1) * multiple}"
        )

    def problems(self, shape: Any, quantized: bool = False) -> Iterator[str]:
        """One sentence for everything of a model's `shape` (a DecoderConfig) that this layout can't cut.

        quantized: whether its matrices are held in blocks of 4-bit numbers, which can't be cut inside a block.
        """
        for what, count in (
            ("attention heads", shape.num_attention_heads),
            ("key-value heads", shape.num_key_value_heads),
            ("feed-forward columns", shape.intermediate_size),
        ):
            if count % self.tp:
                yield (
                    f"`tensor_parallel_dim: {self.tp}` does not divide the model's {count} {what}: take "
                    f"{_divisors(shape, self.tp)}"
                )
        inputs = {
            "attention heads": shape.num_attention_heads * shape.head_dim,
            "feed-forward columns": shape.intermediate_size,
        }
        for what, columns in inputs.items():
            if quantized and self.tp > 1 and columns % self.tp == 0 and columns // self.tp % QUANTIZED_BLOCK:
                yield split_block(self.tp, f"{columns // self.tp} columns of a matrix ({columns} of the {what} in all)")


def rows_problem(config: Any, ranks: int) -> str | None:
    """What keeps `global_batch_size` from being cut into micro-batches of so many data-parallel ranks; None if nothing does."""
    at_once = config.batch_size * ranks
    if config.global_batch_size is None or config.global_batch_size % at_once == 0:
        return None
    times = f" x {ranks} data-parallel ranks" if ranks > 1 else ""
    return (
        f"`global_batch_size` = {config.global_batch_size} is no multiple of `batch_size` = {config.batch_size}{times}; "
        f"take {max(1, round(config.global_batch_size / at_once)) * at_once}, or another `batch_size`"
    )


def async_problems(config: Any) -> Iterator[str]:
    """What the options lack that `enable_async_tensor_parallel` can't do without."""
    is_split = config.tensor_parallel_dim > 1
    needed = {
        "`tensor_parallel_dim` above 1, since ranks that split matrices have the messages": is_split,
        "`compile: true`, since the compiler lets messages and products overlap": config.compile,
        "`sequence_parallel: true`, whose messages are those that can be cut": config.sequence_parallel,
        f"linked GPUs, not `device: {config.device}`": config.device.partition(":")[0] in ("auto", "cuda"),
    }
    for what, is_there in needed.items():
        if not is_there:
            yield f"`enable_async_tensor_parallel` needs {what}; set that, or leave it out"


def split_block(ranks: int, what: str) -> str:
    """The sentence for 4-bit weights whose parts would not end where a block ends."""
    return (
        f"`quantize_base` keeps blocks of {QUANTIZED_BLOCK} numbers together, and `tensor_parallel_dim: {ranks}` would "
        f"cut them: each rank gets {what}; take fewer ranks, or turn one of the two off"
    )


def _divisors(shape: Any, wanted: int) -> str:
    common = math.gcd(shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size)
    fitting = [str(size) for size in range(1, min(common, 64) + 1) if common % size == 0]
    return " or ".join(fitting)


def _started(world_size: int) -> str:
    return f"{world_size} {'was' if world_size == 1 else 'were'} started"
