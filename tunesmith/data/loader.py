"""The batches of a run: which rows each step sees, cut into the micro-batches of this rank.

A step's rows depend on (seed, data, step) alone; the number of ranks and the size of a micro-batch say only how they
are cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

from tunesmith.configs.data import DataSection
from tunesmith.configs.layout import rows_problem
from tunesmith.configs.shared import TrainSettings
from tunesmith.data.batch import Batch
from tunesmith.data.collate import TokenRow, collate
from tunesmith.data.documents import reading_code
from tunesmith.data.indexed import IndexedOrder
from tunesmith.data.report import DataReport
from tunesmith.data.streamed import StreamedOrder
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.units import PREFERENCE_UNITS, REWARD_UNITS, Units
from tunesmith.errors import UserError
from tunesmith.parallel.mesh import Mesh

DEFAULT_MAX_SEQ_LEN = 2048
_AHEAD = 2


def chat_batches(
    config: TrainSettings, tokenizer: Tokenizer, mesh: Mesh, max_seq_len: int | None = None, with_index: bool = False
) -> Batches:
    """The batches of `config.dataset`, conversations.

    max_seq_len: longest row in tokens, default 2048. with_index: give batches extra["index"], and Batches.num_indexed.
    Raises UserError when the data can't be read or none can be used.
    """
    return _batches(config, "dataset", tokenizer, mesh, max_seq_len, with_index=with_index)


text_batches = chat_batches
"""The same of plain text: the sections of `config.dataset` say which."""


def preference_batches(
    config: TrainSettings,
    tokenizer: Tokenizer,
    mesh: Mesh,
    max_seq_len: int | None = None,
    units: str = "pairs",
    with_index: bool = False,
) -> Batches:
    """The batches of `config.dataset`, preference data: whole units, each document of at most max_seq_len tokens.

    units: "pairs" (chosen and rejected answers in turn), "answers" (single ones), or "answers and mismatched" (each
    followed by its prompt with the answer to another). Documents of a row are always marked; extra["values"] says which
    answers are desirable, or the margin of a pair.
    """
    return _batches(
        config, "dataset", tokenizer, mesh, max_seq_len, units=PREFERENCE_UNITS[units], with_index=with_index
    )


def reward_batches(
    config: TrainSettings, tokenizer: Tokenizer, mesh: Mesh, max_seq_len: int | None = None, task: str = "preference"
) -> Batches:
    """The batches of `config.dataset` for a model that scores: labels say at which tokens a score is read, and what it is to be.

    task: "preference" (0 at the last token of each document of a pair), "classification" (the class at the last token), or
    "process" (0 or 1 at the last token of every step). All tokens are inputs.
    """
    return _batches(config, "dataset", tokenizer, mesh, max_seq_len, units=REWARD_UNITS[task])


def validation_batches(
    config: TrainSettings,
    tokenizer: Tokenizer,
    mesh: Mesh,
    max_seq_len: int | None = None,
    units: str | None = None,
    task: str | None = None,
    with_index: bool = False,
) -> Batches | None:
    """The batches of `config.dataset_val`, of whichever kind; None where there is none.

    units, task: of preference data and for models that score, as for training.
    """
    if getattr(config, "dataset_val", None) is None:
        return None
    wanted = PREFERENCE_UNITS[units] if units else REWARD_UNITS[task] if task else None
    return _batches(config, "dataset_val", tokenizer, mesh, max_seq_len, units=wanted, with_index=with_index)


def _batches(
    config: TrainSettings,
    name: str,
    tokenizer: Tokenizer,
    mesh: Mesh,
    max_seq_len: int | None,
    units: Units | None = None,
    with_index: bool = False,
) -> Batches:
    """`name`: the option that holds the sources."""
    validation = name == "dataset_val"
    section = getattr(config, name)
    sources: list[DataSection] = section if isinstance(section, list) else [section]
    if not sources:
        raise UserError(f"`{name}` is an empty list; name at least one source")
    rows_per_step, batch_size = global_batch(config, mesh, validation)
    seed = None if validation or not config.shuffle else (config.seed or 0,)
    kind = StreamedOrder if any(source.streaming for source in sources) else IndexedOrder
    length = max_seq_len or DEFAULT_MAX_SEQ_LEN
    order = mesh.node_first(lambda: kind(sources, tokenizer, length, seed, rows_per_step, units, with_index))
    return Batches(order, config, mesh, tokenizer.pad_id, rows_per_step, batch_size, validation, units)


def global_batch(config: TrainSettings, mesh: Mesh, validation: bool = False) -> tuple[int, int]:
    """(rows of a step over all ranks, rows of a micro-batch)."""
    if validation:
        batch_size = config.batch_size_val or config.batch_size
        return batch_size * mesh.dp_size, batch_size
    if config.global_batch_size is None:
        return config.batch_size * mesh.dp_size * (config.gradient_accumulation_steps or 1), config.batch_size
    if problem := rows_problem(config, mesh.dp_size):
        raise UserError(problem)
    return config.global_batch_size, config.batch_size


class Order(Protocol):
    """Which rows each step sees."""

    steps_per_epoch: int | None
    fingerprint: list[Any]
    row_capacity: int
    """Tokens that a row holds at most."""
    num_indexed: int
    """Tokens of all sources, where rows have an index; else 0."""
    width: int | None
    """Of every batch; None: as wide as its longest row."""
    packed: bool
    """Whether rows hold several documents that must not see each other."""

    def report(self, state: dict[str, Any]) -> DataReport:
        """What became of the rows: of a stream those that were needed up to `state`, else all."""
        ...

    def unweighted(self) -> Order:
        """The order in which one epoch has each row once."""
        ...

    def rows(self, epoch: int, step: int, rank: int, ranks: int, most: int | None = None) -> list[TokenRow]:
        """This rank's rows, as many as every rank's; `most`: where a step is cut short, rows over all ranks."""
        ...

    def state(self, steps: int) -> dict[str, Any]: ...

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state of all ranks together, of what each of them returns as its own after the same step."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Batches:
    """The micro-batches of every step. Steps count from 1; steps ahead are made in the background."""

    def __init__(
        self,
        order: Order,
        config: TrainSettings,
        mesh: Mesh,
        pad_id: int,
        rows_per_step: int,
        batch_size: int,
        validation: bool,
        units: Units | None = None,
    ):
        self.order, self.mesh, self.pad_id, self.units = order, mesh, pad_id, units
        self._config = config
        self.num_indexed = order.num_indexed
        """extra["index"] is below this; 0 where batches have none: it was not asked for, or the data is streamed."""
        self.rows_per_step, self.batch_size = rows_per_step, batch_size
        """Rows over all ranks, and of a micro-batch."""
        limit = None if validation else config.max_steps_per_epoch
        per_epoch = order.steps_per_epoch
        self.steps_per_epoch: int | None = per_epoch if limit is None else min(limit, per_epoch or limit)
        """None for a stream: it has no end."""
        self._most_rows = config.max_val_steps * batch_size if validation and config.max_val_steps is not None else None
        """Of all steps and ranks together: as many as one rank would read in so many micro-batches."""
        self.total_steps = (
            _validation_steps(self.steps_per_epoch, self._most_rows, rows_per_step)
            if validation
            else _total_steps(config, self.steps_per_epoch)
        )
        self._pin = mesh.device.type in ("cuda", "xpu")
        self._done = 0
        self._ahead: dict[int, Future[list[Batch]]] = {}
        self._worker: ThreadPoolExecutor | None = None
        parts = [*order.fingerprint, rows_per_step, config.shuffle, config.max_steps_per_epoch]
        parts += [units.name] if units else []
        self.fingerprint = hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
        """Changes with anything that would change the rows of a step, but for the seed."""

    @property
    def index_fingerprint(self) -> str:
        """Changes with what stands at the places that extra["index"] names, how much of it is read, and by which code."""
        return repr([[entry[:2] for entry in self.order.fingerprint], reading_code()])

    def each_row_once(self) -> Batches:
        """The same rows (of indexed data), each in one step whatever its source's weight, and no more often."""
        config = replace(self._config, max_val_steps=None)
        order = self.order.unweighted()
        rows = (config, self.mesh, self.pad_id, self.rows_per_step, self.batch_size)
        return Batches(order, *rows, validation=True, units=self.units)

    @property
    def report(self) -> DataReport:
        """What became of the rows that this rank read."""
        return self.report_at(self.state())

    def report_at(self, state: dict[str, Any]) -> DataReport:
        """What became of the rows up to `state`; of all ranks' rows where it is merged."""
        return self.order.report(state)

    def __len__(self) -> int:
        return self.total_steps

    def __iter__(self) -> Iterator[list[Batch]]:
        """All steps from the first, as validation takes them."""
        for number in range(1, self.total_steps + 1):
            yield self.step(number)

    def step(self, number: int) -> list[Batch]:
        """This rank's micro-batches of step `number`: as many on every rank, each of at most `batch_size` rows.

        Any step of indexed data is there at once; a stream is read up to it, and from its start if that is passed.
        """
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "data")
        if number not in self._ahead:
            self._forget()
        for ahead in range(number, min(number + _AHEAD, self.total_steps) + 1):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._worker.submit(self._make, ahead)
        batches = self._ahead.pop(number).result()
        self._done = number
        return batches

    def state(self) -> dict[str, Any]:
        """Where this rank stands after the last step that was taken; json can hold it."""
        return {"step": self._done, **self.order.state(self._done)}

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Where the run stands, of what `state` returned on each rank: on a stream each reads parts of its own."""
        return {"step": states[0]["step"], **self.order.merged(states)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on after the step of `state`."""
        self._forget()
        self._done = state["step"]
        self.order.load_state(state)

    def close(self) -> None:
        """Stop the background thread; the next step() starts it again."""
        self._forget()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def _forget(self) -> None:
        """Drop the steps made ahead; one being made is waited for."""
        for future in self._ahead.values():
            if not future.cancel():
                future.exception()
        self._ahead.clear()

    def _make(self, number: int) -> list[Batch]:
        order, size = self.order, self.batch_size
        epoch, step = (
            divmod(number - 1, self.steps_per_epoch)
            if order.steps_per_epoch and self.steps_per_epoch
            else (0, number - 1)
        )
        most = None if self._most_rows is None else self._most_rows - step * self.rows_per_step
        rows = order.rows(epoch, step, self.mesh.dp_rank, self.mesh.dp_size, most)
        return [self._collate(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _collate(self, rows: list[TokenRow]) -> Batch:
        order = self.order
        return collate(
            rows,
            self.pad_id,
            order.packed,
            order.row_capacity,
            order.width,
            self._pin,
            self.units,
            with_index=order.num_indexed > 0,
        )


def _total_steps(config: TrainSettings, steps_per_epoch: int | None) -> int:
    limits = [steps_per_epoch and config.epochs * steps_per_epoch, config.max_steps]
    return _least(limits, "`dataset.streaming: true` needs `max_steps`")


def _validation_steps(steps_per_epoch: int | None, most_rows: int | None, rows_per_step: int) -> int:
    limits = [steps_per_epoch, most_rows if most_rows is None else -(-most_rows // rows_per_step)]
    return _least(limits, "`dataset_val.streaming: true` needs `max_val_steps`")


def _least(limits: list[int | None], missing: str) -> int:
    known = [limit for limit in limits if limit is not None]
    if not known:
        raise UserError(f"{missing}: how long a stream is can't be known beforehand")
    return min(known)
