"""Which ranks split what."""

import pytest
import torch
from distributed import run_distributed

from tunesmith.configs.layout import Layout
from tunesmith.errors import UserError
from tunesmith.parallel.mesh import start_mesh

LAYOUTS = [  # and which of 4 ranks split the experts, and cut each one's parameters
    (Layout(), [[0], [1], [2], [3]], [[0, 1, 2, 3]]),
    (Layout(ep=2), [[0, 1], [2, 3]], [[0, 2], [1, 3]]),
    (Layout(ep=4), [[0, 1, 2, 3]], [[0], [1], [2], [3]]),
    (Layout(cp=2, ep=4), [[0, 1, 2, 3]], [[0], [1], [2], [3]]),
    (Layout(tp=2, ep=2), [[0, 2], [1, 3]], [[0], [1], [2], [3]]),
    (Layout(dp_replicate=2, ep=2), [[0, 1], [2, 3]], [[0], [1], [2], [3]]),
    (Layout(pp=2, ep=2), [[0, 1], [2, 3]], [[0], [1], [2], [3]]),
]


def _groups() -> list[dict[str, list[int]]]:
    """Of each layout, this rank's neighbours along each of the experts' axes."""
    found = []
    for layout, *_ in LAYOUTS:
        mesh = start_mesh(torch.device("cpu"), layout)
        axes = {axis: mesh.experts.get_group(axis) for axis in ("ep", "expert_shards")}
        found.append({axis: torch.distributed.get_process_group_ranks(group) for axis, group in axes.items()})
        mesh.ranks.barrier()  # rank 0 keeps the store
    return found


def test_experts_are_split_by_neighbours_of_those_that_cut_parameters():
    for rank, of_layouts in enumerate(run_distributed(_groups, 4)):
        for groups, (_, ep, shards) in zip(of_layouts, LAYOUTS):
            assert [groups["ep"]] == [ranks for ranks in ep if rank in ranks]
            assert [groups["expert_shards"]] == [ranks for ranks in shards if rank in ranks]


def test_ranks_that_experts_do_not_divide_are_refused():
    with pytest.raises(UserError, match="`expert_parallel_dim: 3` does not divide the 4 ranks"):
        Layout(ep=3).sizes(4)
    with pytest.raises(UserError, match="`data_parallel_shard_dim: 1` x `context_parallel_dim: 1`"):
        Layout(tp=4, ep=2).sizes(4)
    assert Layout(cp=2, ep=4).sizes(8) == (1, 1, 4, 2, 1)
