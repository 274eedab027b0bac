"""Files written by several ranks together, each from the parts that it holds."""

import errno
import math
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tunesmith.checkpoint.tensor_files import read_stem


def whole(name: int) -> torch.Tensor:
    return torch.randn(6 + name, 8, generator=torch.Generator().manual_seed(name))


def write_parts(folder, max_shard_size, fails_on=None):
    """Tensors cut by rows, by columns, in two ranges, held by all, by one, and empty on one rank; {file: sha256}, and what this rank wrote."""
    from tunesmith.checkpoint import write
    from tunesmith.checkpoint.write import Outgoing, write_tensors
    from tunesmith.nn.part import Part
    from tunesmith.parallel.mesh import start_mesh

    mesh = start_mesh(torch.device("cpu"))
    rank = mesh.rank
    write._SMALLEST_SHARED_SHARD = 100  # bytes; in this process alone
    if fails_on == rank:

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        write.os.fsync = full  # in this process alone

    def outgoing(name, part, speaks=True):
        tensor = whole(name)
        own = part.take(tensor)
        return Outgoing(tensor.shape, tensor.dtype, lambda: own, part, speaks)

    tensors = {
        "rows": outgoing(0, Part((6, 8), ((0, 4),) if rank == 0 else ((4, 6),))),
        "columns": outgoing(1, Part((7, 8), ((0, 7),), (0, 3) if rank == 0 else (3, 8))),
        "ranges": outgoing(2, Part((8, 8), ((0, 2), (4, 6)) if rank == 0 else ((2, 4), (6, 8)))),
        "same": outgoing(3, Part.whole((9, 8)), speaks=rank == 0),
        "empty here": outgoing(4, Part((10, 8), ((0, 10),) if rank == 0 else ())),
    }
    if rank == 1:
        tensors["one's"] = whole(5)
    return write_tensors(tensors, Path(folder), "model", max_shard_size, mesh.ranks)


@pytest.mark.parametrize("max_shard_size", [math.inf, 1e9, 300, 700])
def test_parts_of_two_ranks_become_whole_files(tmp_path, max_shard_size):
    first, second = run_distributed(write_parts, 2, tmp_path, max_shard_size)
    assert first == second and set(first) == {path.name for path in tmp_path.iterdir()}
    assert (len(first) == 1) == (max_shard_size == math.inf)  # PEFT reads an adapter from one file alone
    found = read_stem(tmp_path, "model")
    names = ["rows", "columns", "ranges", "same", "empty here", "one's"]
    assert set(found) == set(names)
    for number, name in enumerate(names):
        assert torch.equal(found[name].tensor(), whole(number)), name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_is_an_error_of_all(tmp_path, rank):
    """None may wait for a writer that has given up."""
    results = run_distributed(write_and_catch, 2, tmp_path, rank)
    assert results == [errno.ENOSPC] * 2
    assert not list(tmp_path.glob(".*"))


def write_and_catch(folder, fails_on):
    try:
        write_parts(folder, 300, fails_on)
    except OSError as error:
        return error.errno
    return 0
