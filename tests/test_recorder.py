"""The calls of ``CudaRecorder`` to CUDA and their order, with stand-ins for CUDA's objects."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from fastadv.engine.cuda_graph import WARM_UPS, CudaRecorder, NotReplayable

CAPTURE = inspect.signature(torch.cuda.graph)


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeGraph:
    def __init__(self) -> None:
        self.name: Any = None

    def pool(self) -> Any:
        return self.name

    def replay(self) -> None:
        pass


class FakeCuda:
    """The part of ``torch.cuda`` that a recorder uses."""

    CUDAGraph = FakeGraph

    def __init__(self) -> None:
        self.log: list[str] = []
        self.outside = self.now = FakeStream(self, "outside")
        self.pools: list[Any] = []
        self.sync_debug_mode: int | str = 0
        self.drawn = 0
        self.handles = 0
        self.capturing = self.capture_fails_to_end = self.cleans_up = False

    def Stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, "side")

    def device(self, device: torch.device) -> Any:
        return nullcontext()

    def current_stream(self) -> FakeStream:
        return self.now

    def set_stream(self, stream: FakeStream) -> None:
        self.now = stream

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before  # not after an error, as where torch's capture breaks

    def get_rng_state(self, device: torch.device) -> int:
        return self.drawn

    def set_rng_state(self, state: int, device: torch.device) -> None:
        self.drawn = state

    def get_sync_debug_mode(self) -> int | str:
        return self.sync_debug_mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.sync_debug_mode = mode

    @contextmanager
    def graph(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        given = CAPTURE.bind(*args, **kwargs).arguments  # a call that torch understands
        assert given["stream"].name == "side"
        assert given["capture_error_mode"] == "thread_local"
        self.pools.append(given["pool"])
        given["cuda_graph"].name = given["pool"]
        self.capturing = True
        try:
            yield
        finally:
            if self.capture_fails_to_end:
                self.capture_fails_to_end = False
                raise RuntimeError("capture invalidated")
            self.capturing = False

    def graph_pool_handle(self) -> str:
        self.handles += 1
        return f"pool {self.handles}"

    def current_device(self) -> int:
        return 0

    def end_allocating(self, device: int, pool: str) -> None:
        if self.cleans_up:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.log.append(f"leaves {pool}")

    def release(self, device: int, pool: str) -> None:
        self.log.append(f"releases {pool}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("Stream", "CUDAGraph", "device", "current_stream", "set_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    for name in ("get_rng_state", "set_rng_state", "graph", "graph_pool_handle", "current_device"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    allocator = {"_cuda_endAllocateToPool": "end_allocating", "_cuda_releasePool": "release"}
    for name, own in allocator.items():
        monkeypatch.setattr(torch._C, name, getattr(fake, own), raising=False)
    for name in ("get_sync_debug_mode", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def recorder() -> CudaRecorder:
    return CudaRecorder(torch.device("cuda", 0))


def test_warm_ups_run_on_the_side_and_draw_nothing(cuda: FakeCuda) -> None:
    seen = []

    def function() -> None:
        seen.append((cuda.now.name, cuda.sync_debug_mode))
        cuda.drawn += 1

    recorder().warm_up(function)
    assert seen == [("side", 0)] * WARM_UPS + [("side", "error")]
    assert cuda.log == ["side waits for outside", "outside waits for side"]
    assert (cuda.now, cuda.drawn, cuda.sync_debug_mode) == (cuda.outside, 0, 0)


def test_synchronisations_are_distinguished_from_other_errors(cuda: FakeCuda) -> None:
    def waits() -> None:
        if cuda.sync_debug_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def breaks() -> None:
        if cuda.sync_debug_mode == "error":
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(NotReplayable, match=r"synchronizing CUDA operation.*mode='eager'"):
        recorder().warm_up(waits)
    with pytest.raises(RuntimeError, match="shapes cannot") as raised:
        recorder().warm_up(breaks)
    assert not isinstance(raised.value, NotReplayable)
    assert (cuda.now, cuda.sync_debug_mode) == (cuda.outside, 0)
    assert cuda.log == ["side waits for outside", "outside waits for side"] * 2


def test_graphs_share_a_pool_as_long_as_one_lives(cuda: FakeCuda) -> None:
    record = recorder()
    collected = []
    replays = [record(lambda: collected.append(gc.isenabled()))[1] for _ in range(2)]
    assert collected == [False, False]
    assert gc.isenabled()
    del replays[0]
    replays.append(record(lambda: None)[1])
    replays += [record(lambda: None, alone=alone)[1] for alone in (True, False, True)]
    replays.clear()
    gc.collect()
    record(lambda: None)
    assert cuda.pools == [f"pool {place}" for place in (1, 1, 1, 2, 1, 2, 3)]


def test_a_failed_capture_is_discarded(cuda: FakeCuda) -> None:
    def breaks() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(NotReplayable, match=r"\(operation not permitted when stream is capturing"):
        recorder()(breaks)
    assert cuda.now is cuda.outside
    assert gc.isenabled()

    def too_much() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        recorder()(too_much)


@pytest.mark.parametrize("cleans_up", [False, True])
def test_a_capture_that_cannot_be_ended_is_discarded(cuda: FakeCuda, cleans_up: bool) -> None:
    """torch before 2.12 stays in the capture; the reported error is the one that broke it."""
    cuda.cleans_up = cleans_up

    def waits() -> None:
        cuda.capture_fails_to_end = True
        raise RuntimeError("operation would make the capture depend on the host")

    with pytest.raises(NotReplayable, match=r"\(operation would make the capture depend"):
        recorder()(waits)
    allocator = [line for line in cuda.log if "pool" in line]
    assert allocator == ([] if cleans_up else ["leaves pool 1", "releases pool 1"])
    assert cuda.capturing == cleans_up  # the stand-in has no generators to let go
    assert cuda.now is cuda.outside

    def too_much() -> None:
        cuda.capture_fails_to_end = True
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        recorder()(too_much)

    def breaks_silently() -> None:
        cuda.capture_fails_to_end = True

    with pytest.raises(NotReplayable, match="capture invalidated"):
        recorder()(breaks_silently)
