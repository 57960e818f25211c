"""Counters that kernels leave at zero: which launches share them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastadv import kernels
from fastadv.kernels import tickets as module
from fastadv.kernels.tickets import ALIGNMENT, RESERVE, tickets

CPU = torch.device("cpu")


class Work:
    """What the process is doing: on which stream, and whether it is captured."""

    stream = 0
    capturing = False


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Nothing has been handed out yet, and the test says where the next launch goes."""
    state = Work()
    monkeypatch.setattr(module, "_stream", lambda _device: state.stream)
    monkeypatch.setattr(module, "_is_capturing", lambda _device: state.capturing)
    for name in ("_of_streams", "_reserves"):
        monkeypatch.setattr(module, name, {})
    return state


def places(counters: Tensor) -> set[int]:
    return set(range(counters.data_ptr(), counters.data_ptr() + 4 * len(counters), 4))


def assert_apart(*taken: Tensor) -> None:
    assert len(set().union(*map(places, taken))) == sum(map(len, taken))
    for counters in taken:
        assert counters.dtype == torch.int32
        assert counters.data_ptr() % (4 * ALIGNMENT) == 0
        assert not counters.any()


@pytest.mark.usefixtures("work")
def test_launches_on_one_stream_share_their_counters() -> None:
    first = tickets(CPU, 5)
    assert first.shape == (5,)
    assert tickets(CPU, 5).data_ptr() == first.data_ptr()
    assert_apart(first, tickets(CPU, 7))


def test_launches_on_two_streams_do_not(work: Work) -> None:
    first = tickets(CPU, 3)
    work.stream = 1
    assert_apart(first, tickets(CPU, 3))


def test_each_captured_launch_has_its_own(work: Work) -> None:
    eager = tickets(CPU, 3)
    reserve = module._reserves[CPU].zeros
    work.capturing = True
    captured = [tickets(CPU, count) for count in (3, 3, 1, 4, 5)]
    assert_apart(eager, *captured)
    # Not in the memory of the graph, which other work may use between two replays.
    assert all(places(counters) <= places(reserve) for counters in captured)


def test_a_capture_without_a_reserve_zeroes_its_own(work: Work) -> None:
    work.capturing = True
    assert_apart(tickets(CPU, 3), *(early := [tickets(CPU, 3)]))
    assert not module._reserves
    work.capturing = False
    tickets(CPU, 1)
    work.capturing = True
    large = tickets(CPU, RESERVE - 2)
    assert places(large) <= places(module._reserves[CPU].zeros)
    late = tickets(CPU, 3)
    assert not places(late) <= places(module._reserves[CPU].zeros)
    assert_apart(large, late, *early)


def test_a_used_reserve_is_replaced_and_kept(work: Work) -> None:
    """A graph holds addresses, not tensors."""
    tickets(CPU, 1)
    work.capturing = True
    tickets(CPU, RESERVE // 2 + 1)
    old, used = module._reserves[CPU], tickets(CPU, 1)
    work.capturing = False
    tickets(CPU, 1)
    assert module._reserves[CPU] is not old
    assert old in module._full
    work.capturing = True
    assert_apart(used, tickets(CPU, RESERVE // 2))


@pytest.fixture
def device() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()


def losses(seed: int) -> tuple[Tensor, Tensor]:
    """Logits and labels for which many programs add up a loss."""
    generator = torch.Generator("cuda").manual_seed(seed)
    z = torch.randn(4096, 100, device="cuda", generator=generator)
    return z, torch.arange(4096, device="cuda") % 100


def recorded_losses(z: Tensor, y: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, _count = kernels.masked_ce(z, y, 4.0)
    return graph, total


@pytest.mark.gpu
def test_replays_on_two_streams_at_once(device: torch.device) -> None:
    given = [losses(seed) for seed in (0, 1)]
    expected = [kernels.masked_ce(z, y, 4.0)[0].clone() for z, y in given]
    graphs = [recorded_losses(z, y) for z, y in given]
    streams = [torch.cuda.Stream(device) for _ in graphs]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for stream, (graph, total), kept in zip(streams, graphs, found, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                kept.append(total.clone())
    torch.cuda.synchronize()
    for values, right in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.stack(values), right.expand(50), rtol=0, atol=0)


@pytest.mark.gpu
def test_eager_launches_beside_a_replay(device: torch.device) -> None:
    z, y = losses(0)
    expected = kernels.masked_ce(z, y, 4.0)[0].clone()
    graph, total = recorded_losses(z, y)
    stream, found = torch.cuda.Stream(device), []
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(stream):
            graph.replay()
        found.append(kernels.masked_ce(z, y, 4.0)[0])
    torch.cuda.synchronize()
    everything = torch.stack([total, *found])
    torch.testing.assert_close(everything, expected.expand(51), rtol=0, atol=0)


@pytest.mark.gpu
def test_a_first_call_inside_a_capture(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, y = losses(0)
    expected = kernels.masked_ce(z, y, 4.0)[0].clone()
    monkeypatch.setattr(module, "_reserves", {})
    graph, total = recorded_losses(z, y)
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(total, expected, rtol=0, atol=0)
    assert device not in module._reserves
