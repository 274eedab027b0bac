"""Asynchronous tensor parallelism: the compiler finds the products of our layers and gives each a fused operator.

Symmetric memory is a GPU's. Here PyTorch's own definitions of the fused operators stand in for its kernels, so the graphs and
their numbers are tested, not the overlap.
"""

from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from tests.distributed import run_distributed
from tests.models.conftest import relative_error
from tests.parallel.test_gradients import gradients_on_mesh, write_reference, wrong_gradients
from tunesmith.configs.shared import TrainSettings
from tunesmith.parallel.async_tensor import Place, link_problem

ASYNC = dict(tensor_parallel_dim=2, compile=True, enable_async_tensor_parallel=True)
OPERATORS = (
    "fused_all_gather_matmul",
    "fused_matmul_reduce_scatter",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
)


def pipelined(folders, layout, widths=()):
    """This rank's gradients, and for each graph (a layer's forward, a layer's backward) how often it has each of OPERATORS."""
    import torch
    from torch.distributed import _symmetric_memory as symmetric

    kernels = torch.library.Library("symm_mem", "IMPL")
    kernels.impl("fused_all_gather_matmul", symmetric._fused_all_gather_matmul_fallback, "CPU")
    kernels.impl("fused_matmul_reduce_scatter", symmetric._fused_matmul_reduce_scatter_fallback, "CPU")
    graphs = []
    with looking(lambda graph: graphs.append(counted(graph))):
        return gradients_on_mesh(folders, layout, widths), graphs


def first_graphs(folders, layouts):
    """The same of the first graph alone, for each layout; there the compiler is stopped, before it builds kernels, which takes most of the time."""

    class Stopped(Exception):
        pass

    def stop(graph):
        graphs.append(counted(graph))
        raise Stopped

    graphs = []
    for layout in layouts:
        with looking(stop), pytest.raises(Exception, match="Stopped"):
            gradients_on_mesh(folders, layout)
    return graphs


@contextmanager
def looking(look):
    """`look` sees each graph after the compiler has pipelined what it can; graphs that are looked at come from no cache."""
    from torch._inductor import config

    with patch("torch.distributed.is_nccl_available", lambda: True), config.patch(post_grad_custom_post_pass=look):
        yield


def counted(graph):
    names = Counter(str(node.target).split(".")[1] for node in graph.nodes if "." in str(node.target))
    return tuple(names[name] for name in OPERATORS)


def test_a_forward_pass_is_pipelined(tmp_path):
    """Attention and feed-forward gather, multiply, and scatter the sum of products."""
    references = {"qwen2": write_reference("qwen2", tmp_path)}  # its biases would keep products from being found
    layouts = [ASYNC, {**ASYNC, "enable_async_tensor_parallel": False}]
    assert run_distributed(first_graphs, 2, references, layouts) == [[(2, 2, 0, 0), (0, 0, 2, 2)]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3", "olmo2"])
def test_every_gradient_equals_transformers(tmp_path, case):
    """In the backward pass only products with one matrix (as phi3's, whose matrices are fused) take the sum over ranks with them: of
    several, the sum is added up first."""
    references = {case: write_reference(case, tmp_path)}
    ranks = run_distributed(pipelined, 2, references, ASYNC)
    for _, graphs in ranks:
        assert graphs == [(2, 2, 0, 0), (2, 2, 0, 0) if case == "phi3" else (2, 0, 0, 2)]
    assert not wrong_gradients(references, [gradients for gradients, _ in ranks])


@pytest.mark.slow
def test_rows_of_any_length(tmp_path):
    """From the second length on the compiler leaves it open: one more pair of graphs for all."""
    references = {"llama": write_reference("llama", tmp_path)}
    widths = (40, 32, 24, 36)
    ranks = run_distributed(pipelined, 2, references, ASYNC, widths)
    plain = run_distributed(gradients_on_mesh, 2, references, dict(tensor_parallel_dim=2), widths)
    for (found, graphs), expected in zip(ranks, plain):
        assert sorted(graphs) == [(2, 0, 0, 2)] * 2 + [(2, 2, 0, 0)] * 2
        for name, (_, gradient) in expected["llama"].items():
            assert relative_error(found["llama"][name][1], gradient) < 1e-5, name


@pytest.mark.parametrize(
    ("peer", "said"),
    [
        (Place(1, "a", 1), None),
        (Place(1, "a", 2), "rank 0 (a, GPU 0) and rank 1 (a, GPU 2) are not linked; leave it out"),
        (Place(1, "a", 0), "count GPUs each for itself; let every process see all of its machine's (CUDA_VISIBLE_DEVICES)"),
        (Place(8, "b", 1), "rank 8 (b, GPU 1) are on two machines; take a smaller `tensor_parallel_dim`, or leave it out"),
    ],
)  # fmt: skip
def test_links(peer, said):
    problem = link_problem(Place(0, "a", 0), [peer], lambda index: index == 1)
    assert problem is None if said is None else said in str(problem)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(tensor_parallel_dim=1), "`tensor_parallel_dim` above 1"),
        (dict(compile=False), "`compile: true`"),
        (dict(sequence_parallel=False), "`sequence_parallel: true`"),
        (dict(device="cpu"), "not `device: cpu`"),
    ],
)
def test_what_it_needs(changes, said):
    with pytest.raises(ValueError) as raised:
        TrainSettings(**{**ASYNC, **changes})
    assert str(raised.value).startswith("`enable_async_tensor_parallel` needs") and said in str(raised.value)
    TrainSettings(**{**ASYNC, **changes, "enable_async_tensor_parallel": False})
