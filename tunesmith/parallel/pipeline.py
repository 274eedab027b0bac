"""Forward and backward passes over the micro-batches of a step, on one stage or through a pipeline of them.

A pipeline's micro-batches are those of the step, so accumulating gradients over them needs no rule of its own. Every rank of a
pipeline reads them all: documents, positions and labels need not travel, and what the schedules of torch.distributed.pipelining
are given to pass around besides hidden states is a micro-batch's number.

B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.configs.shared import TrainSettings
from tunesmith.configs.stages import SCHEDULES, filled_up, stage_layers
from tunesmith.nn.part import let_go
from tunesmith.parallel.mesh import Mesh


class MicroBatch(Protocol):
    """What a model needs of some rows (data.batch.Batch)."""

    input_ids: Tensor
    positions: Tensor
    documents: Tensor | None

    def padded_to(self, length: int) -> Any: ...


B = TypeVar("B", bound=MicroBatch)
Context = Callable[[], AbstractContextManager[Any]]


def forward_backward(
    model: nn.Module, batches: Sequence[B], loss_of: Callable[[Tensor, B], Tensor], context: Context
) -> None:
    """Accumulate the gradients of `loss_of(hidden, batch)` over the micro-batches. Forward passes run within `context`."""
    pipeline: Pipeline | None = getattr(model, "pipeline", None)
    if pipeline is not None:
        pipeline.forward_backward(batches, loss_of, context)
        return
    sum_over_copies: Callable[[bool], None] | None = getattr(model, "sum_over_copies", None)
    for number, batch in enumerate(batches, 1):
        if sum_over_copies is not None:
            sum_over_copies(number == len(batches))
        with context():
            loss = loss_of(model(batch.input_ids, batch.positions, batch.documents), batch)
        loss.backward()


def forward(model: nn.Module, batches: Sequence[B], use: Callable[[Tensor, B], None], context: Context) -> None:
    """Call `use(hidden, batch)` for each micro-batch, where hidden states come out."""
    pipeline: Pipeline | None = getattr(model, "pipeline", None)
    if pipeline is not None:
        pipeline.forward(batches, use, context)
        return
    for batch in batches:
        with context():
            use(model(batch.input_ids, batch.positions, batch.documents), batch)
    let_go(model)


def same_width(batches: Sequence[B], mesh: Mesh) -> list[B]:
    """The micro-batches of a step, where a pipeline passes them on all as wide as the widest: its messages have one size."""
    if mesh.size("pp") == 1:
        return list(batches)
    widest = max(batch.input_ids.shape[1] for batch in batches)
    return [batch.padded_to(widest) for batch in batches]


# --- from a model to its stages ----------------------------------------------------------------------


def cut_into_stages(model: nn.Module, mesh: Mesh, config: TrainSettings) -> Pipeline | None:
    """Leave of `model` (on the meta device) what this rank's stages need: names do not change. None without a pipeline.

    The first stage has the embedding, the last one the final norm and the head. A tied head becomes one with a matrix of its
    own, a copy of the embedding (`model.copies`), also where both are on one rank: `fully_shard` gathers each stage apart.
    """
    if mesh.size("pp") == 1:
        return None
    whole: Any = model
    layers = stage_layers(config, whole.config.num_hidden_layers)
    own = _stages_of(
        mesh.index("pp"), mesh.size("pp"), len(layers), SCHEDULES[config.pipeline_parallel_schedule].folded
    )
    if whole.head.tied_to is not None:
        whole.head.untie()
        whole.copies = {"lm_head.weight": "model.embed_tokens.weight"}
    decoder, last = whole.model, len(layers) - 1
    stages = [
        Stage(
            number,
            decoder.stage(layers[number], number == 0, number == last),
            whole.head if number == last else None,
        )
        for number in own
    ]
    whole.elsewhere = tuple(_remove_others(whole, {layer for number in own for layer in layers[number]}, own, last))
    whole.pipeline = Pipeline(whole, stages, len(layers), mesh, config)
    whole.logits = whole.pipeline.logits
    return whole.pipeline


def _stages_of(rank: int, ranks: int, count: int, folded: bool) -> list[int]:
    """Numbers of the stages on `rank`, ascending: round and round, or through the ranks and back."""
    return [rank, 2 * ranks - 1 - rank] if folded else list(range(rank, count, ranks))


def _remove_others(model: Any, layers: set[int], own: list[int], last: int) -> list[str]:
    """Take what belongs to other ranks off the model; return what the names of its parameters start with."""
    decoder, gone = model.model, []
    for name in list(decoder.layers):
        if int(name) not in layers:
            del decoder.layers[name]
            gone.append(f"model.layers.{name}.")
    decoder.is_first, decoder.is_last = 0 in own, last in own
    if not decoder.is_first:
        decoder.embed_tokens = None
        gone.append("model.embed_tokens.")
    if not decoder.is_last:
        decoder.norm = None
        setattr(model, model.head_name, None)
        gone += ["model.norm.", f"{model.head_name}."]
    return gone


class Stage(nn.Module):
    """One stage as torch's schedules call it: hidden states (B, T, D) in, hidden states out. The first one takes nothing.

    Its modules are the model's own; the head is here because a schedule asks a stage for all parameters behind its result.
    """

    def __init__(self, number: int, decoder: Any, head: nn.Module | None):
        super().__init__()
        self.number, self.decoder, self.head = number, decoder, head
        self.micro_batch = 0
        """The one that comes next."""
        self.feed: _Feed | None = None

    def forward(self, *stream: Tensor) -> Tensor:
        assert self.feed is not None
        batch = self.feed.batches[self.micro_batch]
        with self.feed.context():
            hidden = self.decoder(stream[0] if stream else batch.input_ids, self.feed.sight_of(batch))
        if hidden.dtype != self.feed.dtype:  # the next rank would take its bytes for something else
            raise TypeError(f"hidden states of stage {self.number} are {hidden.dtype}, not {self.feed.dtype}")
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # Nothing is trained up to here. The schedules still send a gradient back and differentiate something.
            return hidden.detach().requires_grad_()
        return hidden


@dataclass
class _Feed:
    """What the stages of a rank read in one pass."""

    batches: Sequence[Any]
    sight_of: Callable[[Any], Any]
    context: Context
    dtype: torch.dtype
    """Of hidden states."""


@dataclass
class _Rows:
    input_ids: Tensor
    positions: Tensor | None
    documents: Tensor | None


# --- the pipeline ------------------------------------------------------------------------------------


class Pipeline:
    """The stages of this rank and how they pass hidden states on."""

    def __init__(self, model: Any, stages: list[Stage], count: int, mesh: Mesh, config: TrainSettings):
        self.stages, self.count, self.device = stages, count, mesh.device
        self.group, self.rank, self.ranks = mesh.group("pp"), mesh.index("pp"), mesh.size("pp")
        self.is_main = mesh.is_main
        self._name, self._kind = config.pipeline_parallel_schedule, SCHEDULES[config.pipeline_parallel_schedule]
        self._model, self._config = model, config
        self._shares = mesh.size("tp") if config.sequence_parallel else 1
        """Into how many parts the tokens of the stream between stages are cut."""
        self._schedule: Any = None
        self._schedule_is_for: tuple[int, ...] | None = None
        self._loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def rank_of(self, stage: int) -> int:
        """The rank, along pp, that has a stage."""
        around, place = divmod(stage, self.ranks)
        return self.ranks - 1 - place if self._kind.folded and around else place

    # --- training ------------------------------------------------------------------------------------

    def forward_backward(self, batches: Sequence[B], loss_of: Callable[[Tensor, B], Tensor], context: Context) -> None:
        """As the function of this name. All micro-batches must be of one width."""
        rows = max(len(batch.input_ids) for batch in batches)
        fed = [_with_rows(batch, rows) for batch in batches]
        fed += [fed[-1]] * (filled_up(self._config, len(fed)) - len(fed))
        self._set_feed(fed, self._training_sight, context)

        def loss(hidden: Tensor, number: Tensor) -> Tensor:
            if int(number) >= len(batches):  # only there because the schedule needs so many
                return hidden.float().sum() * 0
            batch = batches[int(number)]
            with context():
                return loss_of(hidden[: len(batch.input_ids)], batch)

        self._loss = loss
        schedule = self._schedule_for(len(fed), rows, batches[0].input_ids.shape[1])
        # On the host: a number on the device would have to be waited for.
        schedule.step(target=torch.arange(len(fed)), return_outputs=False)
        self._loss = self._set_feed(None)

    def _schedule_for(self, count: int, rows: int, width: int) -> Any:
        """The schedule for so many micro-batches of one shape. Another shape needs another: torch's keep their buffers."""
        if self._schedule_is_for != (count, rows, width):
            self._schedule = None  # frees those buffers
            self._schedule = self._build_schedule(count, rows, width)
            self._schedule_is_for = (count, rows, width)
        return self._schedule

    def _build_schedule(self, count: int, rows: int, width: int) -> Any:
        from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

        kind: Any = get_schedule_class(self._name)
        stream, whole = self._stream(rows, width), self._example(rows, width)
        stages = [
            # Told the shapes, stages need not find them out by running: which sends messages, and hangs where it happens on some ranks only.
            _stage_class()(
                stage,
                stage.number,
                self.count,
                self.device,
                input_args=(stream,) if stage.number else (),
                output_args=(whole if stage.number == self.count - 1 else stream,),
                group=self.group,
            )
            for stage in self.stages
        ]
        # Losses are sums divided by the counts of the global batch: gradients are summed, not averaged.
        return kind(
            stages[0] if issubclass(kind, PipelineScheduleSingle) else stages,
            count,
            loss_fn=lambda hidden, number: self._loss(hidden, number),  # type: ignore[misc]
            scale_grads=False,
        )

    def _training_sight(self, batch: MicroBatch) -> Any:
        model = self._model
        return model.sight(batch.input_ids, batch.positions, batch.documents, model.max_seq_len, model.sequence_shards)

    # --- forward only --------------------------------------------------------------------------------

    def forward(self, batches: Sequence[B], use: Callable[[Tensor, B], None], context: Context) -> None:
        """As the function of this name."""
        self._forward(batches, use, context, self._training_sight)

    @torch.no_grad()
    def _forward(
        self, batches: Sequence[Any], use: Callable[[Tensor, Any], Any], context: Context, sight_of: Any
    ) -> None:
        """Each micro-batch through all stages, one after another: messages of two ranks then have the same order on both."""
        self._set_feed(batches, sight_of, context)
        sent = []
        for number, batch in enumerate(batches):
            hidden = torch.empty(0)
            for stage in self.stages:
                stage.micro_batch = number
                if stage.number and self.rank_of(stage.number - 1) != self.rank:
                    hidden = self._received(batch, self.rank_of(stage.number - 1))
                hidden = stage(hidden) if stage.number else stage()
                if stage.number == self.count - 1:
                    with context():
                        use(hidden, batch)
                elif self.rank_of(stage.number + 1) != self.rank:
                    sent.append(self._sent(hidden, self.rank_of(stage.number + 1)))
        for _, message in sent:
            message.wait()
        for stage in self.stages:
            let_go(stage)
        self._set_feed(None)

    def logits(self, input_ids: Tensor, positions: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """As CausalLM's: token ids (B, T), whole rows, -> logits (B, T, V), on every rank of the pipeline."""
        found: list[Tensor] = []
        model, rows = self._model, _Rows(input_ids, positions, documents)

        def sight(_: Any) -> Any:
            return model.sight(input_ids, positions, documents, None)

        self._forward([rows], lambda hidden, _: found.append(model.head.logits(hidden)), nullcontext, sight)
        shape = (*input_ids.shape, model.num_outputs)
        logits = found[0].to(self._dtype).contiguous() if found else self._empty(shape)
        dist.broadcast(logits, group=self.group, group_src=self.rank_of(self.count - 1))
        return logits

    # --- the stream between stages -------------------------------------------------------------------

    def _set_feed(self, batches: Sequence[Any] | None, sight_of: Any = None, context: Context = nullcontext) -> None:
        for stage in self.stages:
            stage.feed = None if batches is None else _Feed(batches, sight_of, context, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return self._model.model.compute_dtype

    def _stream(self, rows: int, width: int) -> Tensor:
        """Hidden states between stages as an example without values: (B, T, D), or of T this rank's part."""
        shares = self._shares if width % self._shares == 0 else 1  # as parallel.tensor has it
        return self._example(rows, width // shares)

    def _example(self, rows: int, width: int) -> Tensor:
        shape = (rows, width, self._model.config.hidden_size)
        return torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=True)

    def _empty(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self.device)

    def _received(self, batch: Any, source: int) -> Tensor:
        hidden = self._empty(self._stream(*batch.input_ids.shape).shape)
        dist.recv(hidden, group=self.group, group_src=source)
        return hidden

    def _sent(self, hidden: Tensor, target: int) -> tuple[Tensor, Any]:
        """What was sent, to be kept until the message is through, and the message."""
        hidden = hidden.contiguous()
        return hidden, dist.isend(hidden, group=self.group, group_dst=target)


def _with_rows(batch: MicroBatch, rows: int) -> _Rows | MicroBatch:
    """The batch with `rows` rows: the last one of an epoch may have fewer, messages all have one size."""
    more = rows - len(batch.input_ids)
    if not more:
        return batch
    documents = None if batch.documents is None else F.pad(batch.documents, (0, 0, 0, more), value=-1)
    return _Rows(F.pad(batch.input_ids, (0, 0, 0, more)), F.pad(batch.positions, (0, 0, 0, more)), documents)


@functools.cache
def _stage_class() -> Any:
    from torch.distributed.pipelining import PipelineStage  # takes a while to import

    class NumberedStage(PipelineStage):
        """Tells its module which micro-batch comes."""

        def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **more: Any) -> Any:
            self.submod.micro_batch = fwd_chunk_id  # type: ignore[assignment]
            return super().forward_one_chunk(fwd_chunk_id, *arguments, **more)

    return NumberedStage
