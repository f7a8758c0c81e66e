"""The stand-in for CUDA rejects what a GPU rejects, and is as asynchronous."""

from concurrent.futures import ThreadPoolExecutor

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
    with misuse("_norm_kernel is launched on cuda:0 with tensors of cuda:1"):
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
    copied.record(torch.cuda.current_stream(cuda))
    assert pinned.isnan().all()
    copied.synchronize()
    assert pinned.tolist() == [1, 1, 1]


def test_a_replay_runs_the_captured_steps_on_present_memory(cuda):
    x, count = torch.ones(3, device=cuda), 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(cuda)):
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
    x, pool, stream = torch.ones(3, device=cuda), torch.cuda.graph_pool_handle(), torch.cuda.Stream(cuda)
    graphs, outputs = [torch.cuda.CUDAGraph() for _ in range(3)], []
    for graph, shared in zip(graphs, (pool, pool, None), strict=True):
        with torch.cuda.graph(graph, pool=shared, stream=stream):
            outputs.append(x + 1)
    for graph in graphs[::-1]:
        graph.replay()
    assert outputs[0].tolist() == outputs[2].tolist() == [2, 2, 2]
    assert outputs[1].isnan().all()


def test_a_stream_is_the_current_one_of_its_device(cuda):
    stream, default = torch.cuda.Stream(cuda), torch.cuda.current_stream(cuda)
    with torch.cuda.stream(stream):
        assert torch.cuda.current_device() == 1
        assert torch.cuda.current_stream() is stream
        assert torch.cuda.current_stream("cuda:0") is not stream
    assert torch.cuda.current_device() == 0
    assert torch.cuda.current_stream(cuda) is default


@pytest.fixture
def side(cuda):
    return torch.cuda.Stream(cuda)


@pytest.mark.parametrize("wait", ["nothing", "stream", "event", "host"])
def test_work_on_two_streams_needs_an_order(cuda, side, misuse, wait):
    x, default = torch.ones(3, device=cuda), torch.cuda.current_stream(cuda)
    with torch.cuda.stream(side):
        if wait == "nothing":
            with misuse("reads memory, which ones on stream 0 of cuda:1 may still use; nothing waits for that"):
                x + 1
            with misuse("add_ on stream 1 of cuda:1 reads memory, which ones on stream 0"):
                x.add_(1)
        elif wait == "stream":
            side.wait_stream(default)
        elif wait == "event":
            side.wait_event(default.record_event())
        else:
            torch.cuda.synchronize(cuda)
        if wait != "nothing":
            y = x + 1
    if wait != "nothing":
        with misuse("zero_ on stream 0 of cuda:1 writes memory, which add on stream 1"):
            x.zero_()
        with misuse("tolist on stream 0 of cuda:1 reads memory, which add on stream 1"):
            y.tolist()
        assert not side.query()
        side.synchronize()
        assert side.query() and y.tolist() == [2, 2, 2]


@pytest.mark.parametrize("recorded", [False, True])
def test_freed_memory_is_used_again_on_its_stream(cuda, side, misuse, recorded):
    x, default = torch.ones(3, device=cuda), torch.cuda.current_stream(cuda)
    kept = x.value
    side.wait_stream(default)
    with torch.cuda.stream(side):
        x + 1
    if recorded:
        x.record_stream(side)
    del x
    assert kept.isnan().all()
    if recorded:
        torch.ones(3, device=cuda)
        return
    with misuse("an allocation on stream 0 of cuda:1 reuses freed memory, which add on stream 1"):
        torch.ones(3, device=cuda)


def test_pinned_memory_must_not_change_while_a_copy_reads_it(cuda, misuse):
    pinned = torch.empty(3, dtype=torch.int32, pin_memory=True)
    assert pinned.tolist() == [-1, -1, -1]
    for value in (5, 6):
        pinned.numpy()[:] = value
        assert pinned.to(cuda, non_blocking=True).tolist() == [value] * 3
    pinned.to(cuda, non_blocking=True)
    pinned.numpy()[1] = 7
    with misuse("pinned memory was written to while a copy from it was in progress"):
        torch.cuda.synchronize(cuda)


def test_a_capture_takes_work_of_its_stream_only(cuda, side, misuse):
    x, other = torch.ones(3, device=cuda), torch.ones(3, device="cuda:0")
    with torch.cuda.graph(torch.cuda.CUDAGraph()), misuse("stream 0 of cuda:1 within a capture on stream 1 of cuda:0"):
        x + 1
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
        assert torch.cuda.is_current_stream_capturing()
        with misuse("stream 0 of cuda:0 within a capture"):
            other + 1
        with torch.cuda.stream(torch.cuda.Stream(cuda)), misuse("stream 2 of cuda:1 within a capture"):
            x + 1
        with misuse("one capture at a time"), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
            pass
    with misuse("default stream"), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream(cuda)):
        pass


def test_threads_have_devices_streams_and_captures_of_their_own(cuda, side, misuse):
    x = torch.ones(3, device=cuda)

    def other_thread(run):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(run).result()

    def add():
        with torch.cuda.stream(side):
            return x + 1

    with torch.cuda.stream(side):
        assert other_thread(torch.cuda.current_device) == 0
        assert other_thread(lambda: torch.cuda.current_stream(cuda)) is not side
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side, capture_error_mode="thread_local"):
        assert not other_thread(torch.cuda.is_current_stream_capturing)
        assert other_thread(lambda: (x + 1).tolist()) == [2, 2, 2]
        with misuse("add runs on stream 1 of cuda:1, on which another thread captures"):
            other_thread(add)
        with misuse("synchronize waits for the device, on which another thread captures"):
            other_thread(lambda: torch.cuda.synchronize(cuda))
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side), misuse("tolist waits for the device"):
        other_thread(x.tolist)


def test_memory_in_a_graph(cuda, side, misuse):
    """That of temporary tensors is used again within the graph; tensors from before the capture must stay."""
    x, graph = torch.ones(3, device=cuda), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        temporary = x + 1
        kept = temporary.value
        y = temporary * 2
        del temporary
        x.add_(1)
    assert x.tolist() == [1, 1, 1], "a capture runs nothing"
    graph.replay()
    assert (y.tolist(), x.tolist()) == ([4, 4, 4], [2, 2, 2]) and kept.isnan().all()
    graph.replay()
    with torch.cuda.stream(side), misuse("a replay on stream 1 of cuda:1 writes memory, which"):
        graph.replay()
    del x
    with misuse("add uses memory that was freed after its capture"):
        graph.replay()


@pytest.mark.parametrize("inference", [False, True])
def test_destroying_a_graph_frees_the_workspace_of_its_stream(cuda, side, misuse, inference):
    x, pool = torch.ones(3, 3, device=cuda), torch.cuda.graph_pool_handle()
    graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
    for graph, stream in zip(graphs, (side, side, torch.cuda.Stream(cuda)), strict=True):
        with torch.cuda.graph(graph, pool=pool, stream=stream), torch.inference_mode(inference):
            y = torch.nn.functional.linear(x, x)
    del graphs[1], graph
    with misuse("uses memory that was freed"):
        graphs[0].replay()
    torch.cuda.synchronize(cuda)
    graphs[1].replay()
    assert y.tolist() == [[3] * 3] * 3
    graphs.clear()
    with misuse("torch rejects its handle"), torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool, stream=side):
        pass


def test_an_error_of_a_kernel_is_reported_later_and_from_then_on(cuda, side):
    x, other = torch.ones(3, device=cuda), torch.ones(3, device="cuda:0")
    torch._assert_async(x[0])
    torch.cuda.synchronize(cuda)
    torch._assert_async(x[0] - 1)
    y = x + 1
    for call in (y.tolist, lambda: x + 1, lambda: torch.ones(3, device=cuda), side.query, side.synchronize):
        with pytest.raises(torch.AcceleratorError, match="device-side assert"):
            call()
    assert other.tolist() == [1, 1, 1]
