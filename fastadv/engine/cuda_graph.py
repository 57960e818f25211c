"""Records functions as CUDA graphs, and keeps away what would break a capture."""

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
    """Raised if a network or method does something that a CUDA graph cannot repeat, most often work
    on the host."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"This network or method cannot be replayed as a CUDA graph ({reason}): "
            "pass mode='eager' or mode='compiled'."
        )


class CudaRecorder:
    """Captures functions as CUDA graphs on one stream. Graphs share a memory pool, so a replay may
    overwrite another graph's outputs; ``alone=True`` uses a separate pool.

    Warm-ups also run on that stream: resources that libraries keep per stream (workspaces, the
    allocator's cache) are then created once, and outside of the graphs.
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
        """Run ``function`` a few times, so that libraries initialise and kernels are compiled and
        tuned.

        Raises ``NotReplayable`` if it waits for the device in the last run. Such a wait would break
        the capture and leave the allocator and the generators in capture mode.
        """
        # Dropout must draw the same in the first replay as it would without the warm-up.
        generator = torch.cuda.get_rng_state(self.device)
        try:
            with self._on_the_stream():
                for _ in range(WARM_UPS):
                    function()
                with _waiting_is_an_error():
                    function()
        finally:
            torch.cuda.set_rng_state(generator, self.device)
        gc.collect()  # reference cycles of these runs may hold autograd graphs

    def __call__(
        self, function: Callable[[], Any], *, alone: bool = False
    ) -> tuple[Any, Callable[[], None]]:
        """Record ``function``. Returns its result, which is in the graph's memory, and a function
        that replays the graph.

        A replay may overwrite the results of any graph of the same pool that was recorded later.
        ``alone`` is for results that must outlive a replay of the others. Raises ``NotReplayable``
        if the function cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        # A pool is freed with its last graph, and its handle cannot be used again.
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
                # The end of a broken capture also fails, with an error that does not say why.
                cause = broken if isinstance(broken, RuntimeError) else error
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
                raise NotReplayable(_first_line(cause)) from error
        self._graphs[alone].add(graph)
        return result, graph.replay

    def _capture(self, graph: Any, pool: Any) -> AbstractContextManager[None]:
        # Not "global": other threads (DALI, NCCL, the user's) may allocate during a capture.
        return torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local")

    def _leave_capture(self, pool: Any) -> None:
        """End capture mode after a capture that failed to end: torch before 2.12 leaves allocator
        and generators in it, and the next capture and the next random number of the process would
        fail."""
        index = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(index, pool)
        except RuntimeError:
            return  # this version of torch has done it
        torch._C._cuda_releasePool(index, pool)
        # The end of any capture, even of an empty one, takes the generators out of capture mode.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with self._capture(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()):
                pass

    @contextmanager
    def _on_the_stream(self) -> Iterator[None]:
        """Within this context the recording stream is current. It waits for the work queued before,
        and the caller's stream then waits for it."""
        with torch.cuda.device(self.device):
            outside = torch.cuda.current_stream()
            self.stream.wait_stream(outside)
            try:
                with torch.cuda.stream(self.stream):
                    yield
            finally:
                # A broken capture leaves its stream current.
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
    """No garbage collection within this context: freeing events, pinned memory or graphs calls
    CUDA, which breaks a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
