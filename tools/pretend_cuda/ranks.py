"""Two processes train on the pretended runtime, with NCCL, in captured mode.

Each method's step is recorded and replayed in both. Reported are the nodes of its graphs and the
launches of a replayed step, and how many of each are NCCL's. Run it on the library
(``build.environment``); the exit code is 1 if a method fails.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

RANKS = 2
# With options that make each method's own part run from the first step.
METHODS = ("pgd:steps=2", "awp:steps=2", "rwp:steps=2", "apart", "atta-1")
CALLS = 5
SIZE = 8  # images in each process's batch
RUN = 8  # steps of the run: too few for compiling


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--json", type=Path, help="write the results there")
    chosen = parser.parse_args()
    os.environ["PRETEND_CUDA_DEVICES"] = str(RANKS)
    results: dict[str, Any] = {}
    # New processes for each method: a capture that fails may break later ones.
    for method in chosen.methods or METHODS:
        results[method] = trained(method)
        print(f"{method}: {told(results[method])}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if any("failed" in found for found in results.values()) else 0


def trained(method: str) -> dict[str, Any]:
    """The result of both processes, which must be equal."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=work, args=(method, rank, port, queue)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    failed = [one for one in found if "failed" in one]
    if failed:
        return failed[0]
    first, second = found
    if first != second:
        return {"failed": f"the processes differ: {first} and {second}"}
    if not first["nccl_beside"] + sum(graph["nccl"] for graph in first["graphs"]):
        return {"failed": f"the processes exchanged no message: {first}"}
    return first


def told(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"failed: {found['failed']}"
    graphs = ", ".join(f"{graph['nodes']} ({graph['nccl']} NCCL)" for graph in found["graphs"])
    launches = f"{found['replayed']} ({found['nccl_beside']} NCCL)"
    return f"graphs of {graphs} nodes; a replayed step launches {launches}"


def work(method: str, rank: int, port: int, queue: Any) -> None:
    try:
        queue.put(steps(method, rank, port))
    except BaseException as error:
        traceback.print_exc()
        queue.put({"failed": f"{type(error).__name__}: {str(error).splitlines()[:1]}"})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # ending the group would wait for a process that has failed


def steps(method: str, rank: int, port: int) -> dict[str, Any]:
    """Run some steps of ``method`` in this process; returns its counts."""
    import numbers_off  # imported here, because it imports fastadv, which the parent does not need

    from fastadv.benchmark.ours import make_step
    from fastadv.benchmark.setting import Setting
    from fastadv.benchmark.specs import Spec
    from fastadv.engine.process import distributed as ours

    torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("nccl", init_method=address, rank=rank, world_size=RANKS)
    numbers_off.switch_off()
    ours.any_process = any_process
    setting = Setting(width=8, batch_size=SIZE, device=f"cuda:{rank}")
    step = make_step(setting, Spec.parse(method), "bf16", "captured", RUN)
    library = ctypes.CDLL(None)
    library.pretend_cuda_launches.restype = ctypes.c_long
    library.pretend_cuda_census.restype = library.pretend_cuda_graphs.restype = ctypes.c_char_p
    graphs, replayed, beside = [], 0, 0
    for batch in setting.batches(CALLS, channels_last=True):
        library.pretend_cuda_reset()
        step(batch.x, batch.y, batch.index, second=batch.x.flip(-1))
        replayed = library.pretend_cuda_launches()
        beside = messages(json.loads(library.pretend_cuda_census()))
        graphs += json.loads(library.pretend_cuda_graphs())
    nodes = [{"nodes": count, "nccl": messages(census)} for census, count in graphs]
    return {"graphs": nodes, "replayed": replayed, "nccl_beside": beside}


def messages(census: dict[str, int]) -> int:
    """The number of launches that are NCCL's."""
    return sum(count for name, count in census.items() if name.startswith("nccl "))


def any_process(said: bool, device: torch.device) -> bool:
    """fastadv's function with the real result: no kernel computes it, so it is right here also."""
    flag = torch.tensor(float(said)).to(device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return flag.item() != 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
