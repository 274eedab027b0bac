"""How a pipeline is laid out: its schedules, which layers a stage has, what a step's micro-batches must come to. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """What has to be known of a schedule that torch.distributed.pipelining has under the same name."""

    stages_per_rank: int = 1
    """Unless the options say otherwise."""
    several: bool = False
    """Whether a rank may have any number of stages."""
    folded: bool = False
    """Whether the stages run through the ranks and back (the first and the last are on one), instead of round and round."""
    splits_backward: bool = False
    """Whether gradients of activations and of weights are computed at different times."""
    micro_batch_per_stage: bool = False
    """Whether a step needs as many micro-batches as there are stages."""
    whole_rounds: bool = False
    """Whether each round, of a micro-batch a rank or more, must have as many."""


SCHEDULES = {
    "GPipe": Schedule(),
    "1F1B": Schedule(micro_batch_per_stage=True),
    "Interleaved1F1B": Schedule(2, several=True, whole_rounds=True),
    "LoopedBFS": Schedule(2, several=True),
    "InterleavedZeroBubble": Schedule(2, several=True, splits_backward=True, whole_rounds=True),
    "ZBVZeroBubble": Schedule(2, folded=True, splits_backward=True),
    "DualPipeV": Schedule(2, folded=True, splits_backward=True, micro_batch_per_stage=True),
}


def stage_layers(config: Any, num_layers: int) -> list[range]:
    """The layers of every stage of the pipeline that a recipe's options ask for.

    By default stages come out even, where embedding and head weigh one layer each. Raises UserError, naming the options, where
    the model's layers can't be cut like this.
    """
    if config.pipeline_parallel_split_points is not None:
        points = list(config.pipeline_parallel_split_points)
        if points[-1] >= num_layers:
            raise UserError(
                f"`pipeline_parallel_split_points` names layer {points[-1]}, but the model's {num_layers} layers end with {num_layers - 1}"
            )
    elif config.pipeline_parallel_layers_per_stage is not None:
        points = list(
            range(config.pipeline_parallel_layers_per_stage, num_layers, config.pipeline_parallel_layers_per_stage)
        )
    else:
        count = config.pipeline_parallel_dim * SCHEDULES[config.pipeline_parallel_schedule].stages_per_rank
        if count > num_layers:
            raise UserError(_too_many_stages(config, count, num_layers))
        points = _even_points(num_layers, count)
    stages = [range(start, stop) for start, stop in zip([0, *points], [*points, num_layers])]
    if problem := stage_problem(config, len(stages)):
        raise UserError(problem)
    return stages


def _even_points(num_layers: int, count: int) -> list[int]:
    """Where stages begin, but for the first: each layer goes to the stage that weighs least."""
    layers = [1] * count
    for _ in range(num_layers - count):
        weights = [own + (stage == 0) + (stage == count - 1) for stage, own in enumerate(layers)]
        layers[weights.index(min(weights))] += 1
    return [sum(layers[:stage]) for stage in range(1, count)]


def _too_many_stages(config: Any, count: int, num_layers: int) -> str:
    ranks = f"`pipeline_parallel_dim: {config.pipeline_parallel_dim}`"
    if count == config.pipeline_parallel_dim:
        return f"{ranks} is more than the model's {num_layers} layers: every stage needs at least one"
    return (
        f"{ranks} with `pipeline_parallel_schedule: {config.pipeline_parallel_schedule}` makes {count} stages, more than the model's "
        f"{num_layers} layers: take fewer ranks or `1F1B`, which has a stage a rank"
    )


def stage_problem(config: Any, count: int) -> str | None:
    """What is wrong with so many stages, in one sentence; None: nothing."""
    ranks, name = config.pipeline_parallel_dim, config.pipeline_parallel_schedule
    schedule = SCHEDULES[name]
    each = schedule.stages_per_rank
    if count % ranks == 0 and (schedule.several or count // ranks == each):
        return None
    wanted = "a multiple of that" if schedule.several else f"{each * ranks}"
    option = (
        "pipeline_parallel_split_points"
        if config.pipeline_parallel_split_points is not None
        else "pipeline_parallel_layers_per_stage"
    )
    return (
        f"`{option}` makes {count} stages, but `pipeline_parallel_schedule: {name}` with `pipeline_parallel_dim: {ranks}` "
        f"needs {wanted}"
    )


def pipeline_problems(config: Any) -> Iterator[str]:
    """One sentence for everything that can't work whatever the model is."""
    points, layers = config.pipeline_parallel_split_points, config.pipeline_parallel_layers_per_stage
    if points is not None and layers is not None:
        yield "give `pipeline_parallel_split_points` or `pipeline_parallel_layers_per_stage`, not both"
    if layers is not None and layers < 1:
        yield f"`pipeline_parallel_layers_per_stage` must be at least 1, got {layers}"
    if points is not None and (not points or points[0] < 1 or sorted(set(points)) != list(points)):
        yield f"`pipeline_parallel_split_points` must be ascending numbers of layers, none of them 0, got {points}"
    if config.pipeline_parallel_dim < 2:
        return
    name = config.pipeline_parallel_schedule
    if config.compile and SCHEDULES[name].splits_backward:
        yield (
            f"`compile` can't be combined with `pipeline_parallel_schedule: {name}`, which computes the gradients of activations and "
            "of weights at different times; take Interleaved1F1B, or turn `compile` off"
        )
    if SCHEDULES[name].splits_backward and config.fsdp_reshard_after_forward == "always":
        # Torch notes before the backward pass which parameters await a gradient, and would note the parts that stay here.
        yield (
            f"`fsdp_reshard_after_forward: always` can't be combined with `pipeline_parallel_schedule: {name}`, whose backward pass "
            "would not find the weights; take default, or Interleaved1F1B"
        )
    if SCHEDULES[name].splits_backward and config.ac_mode == "selective" and config.ac_option == "op":
        yield (
            f"`ac_option: op` can't be combined with `pipeline_parallel_schedule: {name}`, which goes back through a layer twice; "
            "take another `ac_option`, or Interleaved1F1B"
        )
    if config.global_batch_size is None:
        yield from micro_batch_problems(config, config.gradient_accumulation_steps or 1)


def filled_up(config: Any, count: int) -> int:
    """The smallest number of micro-batches, from `count` on, that the schedule takes: the last step of an epoch may have fewer."""
    while any(micro_batch_problems(config, count)):
        count += 1
    return count


def micro_batch_problems(config: Any, count: int) -> Iterator[str]:
    """What is wrong with `count` micro-batches a step, in one sentence."""
    ranks, name = config.pipeline_parallel_dim, config.pipeline_parallel_schedule
    schedule = SCHEDULES[name]
    asks = f"`pipeline_parallel_schedule: {name}` with `pipeline_parallel_dim: {ranks}` needs"
    given = "`global_batch_size`" if config.global_batch_size is not None else "`gradient_accumulation_steps`"
    has = f"{given} makes {count}"
    if schedule.micro_batch_per_stage and count < ranks * schedule.stages_per_rank:
        yield f"{asks} at least {ranks * schedule.stages_per_rank} micro-batches a step, and {has}"
    if schedule.whole_rounds and count % max(1, count // ranks):
        yield f"{asks} micro-batches that come out even in {count // ranks} rounds, such as {count - count % ranks}, and {has}"
