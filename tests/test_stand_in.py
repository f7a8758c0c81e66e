"""The stand-in for CUDA is worth something: it refuses what a GPU would, and is as late as one."""

import pytest
import torch
from support.devices import HAS_CUDA

from unpadded_kernels import add_layer_norm
from unpadded_kernels.layer_norm import add_layer_norm_triton

pytestmark = pytest.mark.skipif(HAS_CUDA, reason="a GPU needs no stand-in")


@pytest.fixture
def refused():
    from support.stand_in import Misuse  # needs the interpreter, which is off where there is a GPU

    return lambda why: pytest.raises(Misuse, match=why)


def test_a_kernel_runs_on_the_device_of_its_tensors(cuda, refused):
    arguments = [torch.randn(5, 8), torch.randn(5, 8), torch.randn(8), torch.randn(8)]
    there = [one.to(cuda) for one in arguments]
    found = add_layer_norm(*there, 1e-5)
    assert found.device == torch.device(cuda)
    torch.testing.assert_close(found.cpu(), add_layer_norm(*arguments, 1e-5))
    with refused("_add_layer_norm_kernel is launched on cuda:0 with tensors of cuda:1"):
        add_layer_norm_triton(*there, 1e-5)
    with refused("with tensors of cuda:1, cuda:1, cuda:1, cpu"):
        add_layer_norm(*there[:3], arguments[3], 1e-5)


def test_devices_do_not_mix(cuda, refused):
    x = torch.ones(3, device=cuda)
    for other in (torch.ones(3), torch.ones(3, device="cuda:0")):
        with refused("add takes tensors of several devices"):
            x + other
    assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a host's number is none
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.copy_(torch.ones(3), non_blocking=True),  # of memory that is not pinned
        lambda x: x.copy_(torch.ones(3).pin_memory()),
    ],
)
def test_what_waits_is_refused_where_nothing_may(cuda, refused, wait):
    x = torch.ones(3, device=cuda)
    wait(x)
    torch.cuda.set_sync_debug_mode("error")
    x.copy_(torch.ones(3).pin_memory(), non_blocking=True)
    with refused("waits for the device"):
        wait(x)
    torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(torch.cuda.CUDAGraph()), refused("waits for the device|within a capture"):
        wait(x)


def test_a_copy_to_pinned_memory_arrives_with_its_event(cuda):
    x, pinned = torch.ones(3, device=cuda), torch.empty(3, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    x.zero_()
    copied = torch.cuda.Event()
    copied.record()
    assert pinned.isnan().all()
    copied.synchronize()
    assert pinned.tolist() == [1, 1, 1]


def test_a_graph_runs_what_it_captured_over_what_memory_holds(cuda):
    x, count = torch.ones(3, device=cuda), 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.zeros_like(x)
        y += x[1:].sum() * count
        z = torch.arange(3, device=cuda) + y
    assert y.isnan().all(), "a capture runs nothing"
    count = 5  # a number of the host's is baked in
    for value in (1.0, 3.0):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [2 * value] * 3 and z.tolist() == [2 * value + place for place in range(3)]
    assert count == 5


def test_a_replay_overwrites_what_other_graphs_of_its_pool_made(cuda):
    x, pool = torch.ones(3, device=cuda), torch.cuda.graph_pool_handle()
    graphs, made = [torch.cuda.CUDAGraph() for _ in range(3)], []
    for graph, shared in zip(graphs, (pool, pool, None), strict=True):
        with torch.cuda.graph(graph, pool=shared):
            made.append(x + 1)
    for graph in graphs[::-1]:
        graph.replay()
    assert made[0].tolist() == made[2].tolist() == [2, 2, 2]
    assert made[1].isnan().all()
