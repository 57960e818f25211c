"""CUDA graphs: where and how a function is recorded, and what must not happen meanwhile."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from fastadv.errors import UserError

WARM_UPS = 2  # runs before the one in which a wait for the device is an error


class NotReplayable(UserError):
    """A network or method does what a CUDA graph cannot, most often something on the host."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"This network or method cannot be replayed as a CUDA graph ({reason}): "
            "pass mode='eager' or mode='compiled'."
        )


class CudaRecorder:
    """Captures functions as CUDA graphs on one stream. Graphs share a memory pool, so a replay may
    overwrite another graph's outputs; ``alone=True`` uses a separate pool.

    Warm-ups run on that stream too: what libraries keep for a stream (workspaces, the allocator's
    cache) is then made once, and outside of the graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._graphs: dict[bool, weakref.WeakSet[Any]] = {
            alone: weakref.WeakSet() for alone in (False, True)
        }

    def __getstate__(self) -> dict[str, Any]:
        return {"device": self.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["device"])  # type: ignore[misc]

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Run ``function`` a few times: libraries initialise, kernels compile and are tuned.

        Raises ``NotReplayable`` if it still waits for the device the last time. A capture that
        meets a wait breaks, and leaves allocator and generators in the middle of it.
        """
        # So that dropout draws in the first replay what it would have drawn without the warm-up.
        generator = torch.cuda.get_rng_state(self.device)
        try:
            with self._on_the_stream():
                for _ in range(WARM_UPS):
                    function()
                with _waiting_is_an_error():
                    function()
        finally:
            torch.cuda.set_rng_state(generator, self.device)
        gc.collect()  # what is left of these runs in cycles may hold autograd graphs

    def __call__(
        self, function: Callable[[], Any], *, alone: bool = False
    ) -> tuple[Any, Callable[[], None]]:
        """Record ``function``: what it returned, in the graph's memory, and the replay.

        Replaying a graph may write over what any later one of its pool has returned. ``alone`` is
        for results that must outlive a replay of the others.
        """
        graph = torch.cuda.CUDAGraph()
        # A pool ends with its last graph, and its name may not be used again.
        living = next((other.pool() for other in self._graphs[alone]), None)
        pool = living or torch.cuda.graph_pool_handle()
        broken: BaseException | None = None
        with self._on_the_stream(), _no_garbage_collected():
            try:
                with self._capture(graph, pool):
                    try:
                        result = function()
                    except BaseException as error:
                        broken = error
                        raise
            except RuntimeError as error:
                if error is not broken:
                    self._leave_capture(pool)
                # Ending a broken capture fails, too, and with a reason that tells nothing.
                cause = broken if isinstance(broken, RuntimeError) else error
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
                raise NotReplayable(_first_line(cause)) from error
        self._graphs[alone].add(graph)
        return result, graph.replay

    def _capture(self, graph: Any, pool: Any) -> AbstractContextManager[None]:
        # Not "global": threads of DALI, of NCCL or of the user may allocate meanwhile.
        return torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local")

    def _leave_capture(self, pool: Any) -> None:
        """After a capture that could not be ended: torch before 2.12 lets allocator and generators
        stay in it, and the next capture and the next random number of the process fail."""
        index = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(index, pool)
        except RuntimeError:
            return  # this torch has done so itself
        torch._C._cuda_releasePool(index, pool)
        # The end of a capture lets the generators go, be it one of nothing.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with self._capture(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()):
                pass

    @contextmanager
    def _on_the_stream(self) -> Iterator[None]:
        """The recording stream is current inside; it waits for what was queued before, and what
        comes after waits for it."""
        with torch.cuda.device(self.device):
            outside = torch.cuda.current_stream()
            self.stream.wait_stream(outside)
            try:
                with torch.cuda.stream(self.stream):
                    yield
            finally:
                # A capture that breaks leaves its own stream current.
                torch.cuda.set_stream(outside)
                outside.wait_stream(self.stream)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise NotReplayable(_first_line(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """What a collection frees (events, pinned memory, graphs) may call CUDA in the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
