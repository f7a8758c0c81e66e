"""The stand-in for CUDA rejects what a GPU rejects, and is as asynchronous."""

import pytest
import torch
from support.devices import HAS_CUDA

from unpadded_kernels import add_layer_norm
from unpadded_kernels.layer_norm import add_layer_norm_triton

pytestmark = pytest.mark.skipif(HAS_CUDA, reason="a GPU needs no stand-in")


@pytest.fixture
def misuse():
    from support.stand_in import Misuse  # needs the interpreter, which is off where there is a GPU

    return lambda message: pytest.raises(Misuse, match=message)


def test_a_kernel_runs_on_the_device_of_its_tensors(cuda, misuse):
    arguments = [torch.randn(5, 8), torch.randn(5, 8), torch.randn(8), torch.randn(8)]
    on_device = [one.to(cuda) for one in arguments]
    actual = add_layer_norm(*on_device, 1e-5)
    assert actual.device == torch.device(cuda)
    torch.testing.assert_close(actual.cpu(), add_layer_norm(*arguments, 1e-5))
    with misuse("_add_layer_norm_kernel is launched on cuda:0 with tensors of cuda:1"):
        add_layer_norm_triton(*on_device, 1e-5)
    with misuse("with tensors of cuda:1, cuda:1, cuda:1, cpu"):
        add_layer_norm(*on_device[:3], arguments[3], 1e-5)


def test_devices_do_not_mix(cuda, misuse):
    x = torch.ones(3, device=cuda)
    for other in (torch.ones(3), torch.ones(3, device="cuda:0")):
        with misuse("add takes tensors of several devices"):
            x + other
    assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a number on the host is allowed
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
        lambda x: x.copy_(torch.ones(3), non_blocking=True),  # from memory that is not pinned
        lambda x: x.copy_(torch.ones(3).pin_memory()),
    ],
)
def test_a_synchronization_raises_in_a_capture_and_in_error_mode(cuda, misuse, wait):
    x = torch.ones(3, device=cuda)
    wait(x)
    torch.cuda.set_sync_debug_mode("error")
    x.copy_(torch.ones(3).pin_memory(), non_blocking=True)
    with misuse("waits for the device"):
        wait(x)
    torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(torch.cuda.CUDAGraph()), misuse("waits for the device|within a capture"):
        wait(x)


def test_a_copy_to_pinned_memory_completes_with_its_event(cuda):
    x, pinned = torch.ones(3, device=cuda), torch.empty(3, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    x.zero_()
    copied = torch.cuda.Event()
    copied.record()
    assert pinned.isnan().all()
    copied.synchronize()
    assert pinned.tolist() == [1, 1, 1]


def test_a_replay_runs_the_captured_steps_on_present_memory(cuda):
    x, count = torch.ones(3, device=cuda), 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.zeros_like(x)
        y += x[1:].sum() * count
        z = torch.arange(3, device=cuda) + y
    assert y.isnan().all(), "a capture runs nothing"
    count = 5  # a number on the host is a constant of the graph
    for value in (1.0, 3.0):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [2 * value] * 3 and z.tolist() == [2 * value + i for i in range(3)]
    assert count == 5


def test_a_replay_overwrites_the_outputs_of_other_graphs_of_its_pool(cuda):
    x, pool = torch.ones(3, device=cuda), torch.cuda.graph_pool_handle()
    graphs, outputs = [torch.cuda.CUDAGraph() for _ in range(3)], []
    for graph, shared in zip(graphs, (pool, pool, None), strict=True):
        with torch.cuda.graph(graph, pool=shared):
            outputs.append(x + 1)
    for graph in graphs[::-1]:
        graph.replay()
    assert outputs[0].tolist() == outputs[2].tolist() == [2, 2, 2]
    assert outputs[1].isnan().all()
