"""Controls of the pretended CUDA runtime: what must break a capture, and what must not.

Run it on the library (``build.environment``); the exit code is 1 if a control has a wrong result.
The first kind shows that a capture can fail, the second that it can succeed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

Work = Callable[[], Any]
PATIENCE = 120  # seconds for one control
INVALIDATED = "operation failed due to a previous error during capture"
CAPTURING = "operation not permitted when stream is capturing"
ISOLATED = "dependency created on uncaptured work in another stream"
LEGACY = "make the legacy stream depend on a capturing blocking stream"

BREAKS: dict[str, tuple[Callable[[], str], str]] = {}  # name -> control and expected error
HOLDS: dict[str, Callable[[], str]] = {}


def breaks(name: str, error: str = CAPTURING) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def register(control: Callable[[], str]) -> Callable[[], str]:
        BREAKS[name] = control, error
        return control

    return register


def holds(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def register(control: Callable[[], str]) -> Callable[[], str]:
        HOLDS[name] = control
        return control

    return register


def captured(
    work: Work, mode: str = "thread_local", stream: Any = None, replay: bool = True
) -> str:
    """The result of capturing ``work``: the first line of the first error, or "captured"."""
    stream = stream or torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    said = ""
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode=mode)
        try:
            work()
        except Exception as error:
            said = str(error).splitlines()[0]
        try:
            graph.capture_end()
        except Exception as error:
            said = said or str(error).splitlines()[0]
    if not said:
        graph.replay()
        torch.cuda.synchronize()
    return said or "captured"


def runtime() -> ctypes.CDLL:
    """The library, for calls that torch does not expose."""
    return ctypes.CDLL(None)


def ones() -> Tensor:
    return torch.ones(4, device="cuda")


def malloc() -> int:
    """An allocation without torch's allocator, which would exempt itself from the rule."""
    address = ctypes.c_void_p()
    return int(runtime().cudaMalloc(ctypes.byref(address), ctypes.c_size_t(1 << 20)))


def elsewhere(work: Work) -> None:
    """Run in another thread."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


# -- what must break -------------------------------------------------------------------------------


@breaks("item")
def _() -> str:
    x = ones()
    return captured(lambda: x.sum().item())


@breaks("nonzero")
def _() -> str:
    x = ones()
    return captured(x.nonzero)


@breaks("mask")
def _() -> str:
    x = ones()
    return captured(lambda: x[x > 0])


@breaks("synchronize")
def _() -> str:
    return captured(torch.cuda.synchronize)


@breaks("query of the captured stream")
def _() -> str:
    stream = torch.cuda.Stream()
    return captured(stream.query, stream=stream)


@breaks("pageable copy", "pinned")  # torch refuses it before CUDA does
def _() -> str:
    return captured(lambda: torch.ones(4).to("cuda"))


@breaks("pageable copy past torch", INVALIDATED)
def _() -> str:
    x, page = ones(), (ctypes.c_char * 16)()

    def copy() -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        runtime().cudaMemcpyAsync(
            ctypes.c_void_p(x.data_ptr()), page, ctypes.c_size_t(16), 1, stream
        )

    return captured(copy)


@breaks("waiting pinned copy")
def _() -> str:
    x, pinned = ones(), torch.ones(4).pin_memory()
    return captured(lambda: pinned.copy_(x))


@breaks("a held parameter's graph", LEGACY)
def _() -> str:
    x, weight = ones(), ones().requires_grad_()
    held = (weight * 2).sum()  # keeps the parameter's accumulator, on the default stream
    said = captured(lambda: torch.autograd.grad((weight * x).sum(), [weight]))
    del held
    return said


@breaks("wait for uncaptured work", ISOLATED)
def _() -> str:
    event = torch.cuda.Event()
    event.record()
    return captured(lambda: torch.cuda.current_stream().wait_event(event))


@breaks("query of a captured event", "event last recorded in a capturing stream")
def _() -> str:
    event = torch.cuda.Event()

    def query() -> None:
        event.record()
        event.query()

    return captured(query)


@breaks("synchronize a captured event", "event last recorded in a capturing stream")
def _() -> str:
    event = torch.cuda.Event()

    def wait() -> None:
        event.record()
        event.synchronize()

    return captured(wait)


@breaks("unjoined side stream", "capturing stream has unjoined work")
def _() -> str:
    x, side = ones(), torch.cuda.Stream()

    def fork() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)

    return captured(fork)


@breaks("two captures merged", "merge of separate capture sequences")
def _() -> str:
    other, second, event = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.Event()

    def merge() -> None:
        with torch.cuda.stream(other):
            second.capture_begin(capture_error_mode="thread_local")
            event.record()
        torch.cuda.current_stream().wait_event(event)

    return captured(merge)


def blocking_stream() -> Any:
    """A stream that the legacy default stream waits for, unlike torch's own streams."""
    made = ctypes.c_void_p()
    runtime().cudaStreamCreate(ctypes.byref(made))
    return torch.cuda.ExternalStream(made.value)


@breaks("legacy stream", LEGACY)
def _() -> str:
    x = ones()

    def escape() -> None:
        with torch.cuda.stream(torch.cuda.default_stream()):
            x.add_(1)

    return captured(escape, stream=blocking_stream())


@breaks("cudaMalloc", INVALIDATED)
def _() -> str:
    return captured(malloc)


@breaks("cudaMalloc of another thread, global mode", INVALIDATED)
def _() -> str:
    return captured(lambda: elsewhere(malloc), mode="global")


@breaks("svd", "pinned")  # torch copies its info to the host, and refuses that copy itself
def _() -> str:
    x = torch.ones(4, 4, device="cuda")
    torch.linalg.svdvals(x)  # creates the library's handle, which is also forbidden in a capture
    return captured(lambda: torch.linalg.svdvals(x))


@breaks("eigh")
def _() -> str:
    x = torch.ones(4, 4, device="cuda")
    torch.linalg.eigh(x)
    return captured(lambda: torch.linalg.eigh(x))


@breaks("ended by another thread", "terminate a thread-local capture sequence from another thread")
def _() -> str:
    stream, graph, said = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []

    def end() -> None:
        try:
            with torch.cuda.stream(stream):
                graph.capture_end()
        except Exception as error:
            said.append(str(error).splitlines()[0])

    ones()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
    elsewhere(end)
    return said[0] if said else "captured"


@breaks("NCCL communicator inside a capture", "NCCL error")
def _() -> str:
    address = f"tcp://127.0.0.1:{free_port()}"
    distributed.init_process_group("nccl", init_method=address, rank=0, world_size=1)
    x = ones()
    return captured(lambda: distributed.all_reduce(x))


# -- what must hold --------------------------------------------------------------------------------


@holds("fork and join of two streams")
def _() -> str:
    x, y, side = ones(), ones(), torch.cuda.Stream()

    def fork() -> None:
        stream = torch.cuda.current_stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            y.add_(1)
        x.add_(1)
        stream.wait_stream(side)
        x.add_(y)

    return captured(fork)


@holds("pinned copies, made at the replay")
def _() -> str:
    first, second = torch.arange(4.0).pin_memory(), torch.zeros(4).pin_memory()
    x = torch.empty(4, device="cuda")

    def copy() -> None:
        x.copy_(first, non_blocking=True)
        second.copy_(x, non_blocking=True)

    said = captured(copy)
    return said if torch.equal(first, second) else f"{said}, and {second} was copied"


@holds("memory of a private pool, freed and taken again")
def _() -> str:
    def allocate() -> None:
        for size in (1 << 10, 1 << 22, 1 << 26):
            torch.empty(size, device="cuda").add_(1)

    return captured(allocate)


@holds("cudaMalloc of another thread, thread-local mode")
def _() -> str:
    return captured(lambda: elsewhere(malloc))


@holds("a synchronizing thread beside it, thread-local mode")
def _() -> str:
    return captured(lambda: elsewhere(torch.cuda.synchronize))


@holds("matrix product")
def _() -> str:
    x = torch.ones(8, 8, device="cuda")
    x @ x
    return captured(lambda: x @ x)


@holds("convolution, batch norm, backward")
def _() -> str:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
    model = model.cuda().to(memory_format=torch.channels_last)
    x = torch.ones(2, 3, 8, 8, device="cuda").to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().sum()
        torch.autograd.grad(loss, list(model.parameters()))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    return captured(step, stream=stream)


@holds("registered generator")
def _() -> str:
    generator = torch.Generator("cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        torch.rand(4, device="cuda", generator=generator)
        torch.rand(4, device="cuda")
        graph.capture_end()
    graph.replay()
    return "captured"


@holds("all_reduce on two ranks, exchanged at the replay")
def _() -> str:
    port = free_port()
    ranks = [start(lambda rank=rank: all_reduced(rank, port)) for rank in (0, 1)]
    return " / ".join(sorted({result(*rank) for rank in ranks}))


def all_reduced(rank: int, port: int) -> str:
    torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("nccl", init_method=address, rank=rank, world_size=2)
    x = torch.tensor([rank + 1.0]).cuda()
    distributed.all_reduce(x)
    said = captured(lambda: distributed.all_reduce(x))
    total = float(x.cpu())
    return said if total == 6 else f"{said}, and the sum was {total} where 6 is right"


@holds("work on a stream outside of the capture is counted")
def _() -> str:
    x = ones()

    def escape() -> None:
        with torch.cuda.stream(torch.cuda.default_stream()):
            x.add_(1)

    runtime().pretend_cuda_reset()
    said = captured(escape)
    return (
        said if runtime().pretend_cuda_escapes() == 1 else "the work outside of it was not counted"
    )


# -- running them ----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(work: Callable[[], str]) -> tuple[int, int]:
    """Run ``work`` in its own process: a capture that fails may break later ones."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    signal.alarm(PATIENCE)
    try:
        said = work()
    except BaseException:
        said = traceback.format_exc().strip().splitlines()[-1]
    os.write(writer, said.encode()[:4000])
    os._exit(0)  # without clean-up, which may fail after a broken capture


def result(child: int, reader: int) -> str:
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return said or f"the process ended with {status}"


def forked(work: Callable[[], str]) -> str:
    return result(*start(work))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    chosen = parser.parse_args()
    if not hasattr(runtime(), "pretend_cuda_reset"):
        sys.exit("The pretended runtime is not loaded: use the environment of build.environment.")
    os.environ["PRETEND_CUDA_DEVICES"] = "2"  # read by the first call that asks for a device
    rows = []
    for name, (control, error) in BREAKS.items():
        said = forked(control)
        rows.append({"name": name, "must": "break", "said": said, "right": error in said})
    for name, hold in HOLDS.items():
        said = forked(hold)
        rows.append({"name": name, "must": "hold", "said": said, "right": said == "captured"})
    for row in rows:
        verdict = "ok   " if row["right"] else "WRONG"
        print(f"{verdict} {row['must']:5} {row['name']:50} {str(row['said'])[:110]}")
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")
    wrong = sum(not row["right"] for row in rows)
    print(f"{len(rows) - wrong} of {len(rows)} controls are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
