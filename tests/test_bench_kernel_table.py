"""The kernel table from a trace and recorded launches, without a GPU."""

import pytest
import torch

from fastadv.benchmark import launches
from fastadv.benchmark.kernel_table import Activity, activities, table_rows


def event(category, name, ts, dur, **args):
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "args": args}


def test_a_trace_gives_the_kernels_and_the_bytes_of_copies():
    trace = [
        {"ph": "M", "name": "process_name", "args": {}},
        event("cpu_op", "aten::add", 0, 9),
        event("cuda_runtime", "cudaGraphLaunch", 1, 2),
        event("kernel", "triton_x", 10, 4, grid=[1, 1, 1]),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 14, 2, bytes=100),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 17, 1, bytes=8),
        event("gpu_memset", "Memset (Device)", 18, 1, bytes=64),
    ]
    assert activities(trace) == [
        Activity("triton_x", 10, 4),
        Activity("Memcpy DtoD (Device -> Device)", 14, 2, 200),
        Activity("Memcpy HtoD (Pinned -> Device)", 17, 1, 8),
        Activity("Memset (Device)", 18, 1, 64),
    ]


def test_the_table_is_sorted_and_has_the_recorded_bytes():
    found = [
        Activity("triton_a", 0, 1), Activity("triton_a", 1, 1), Activity("cudnn", 3, 5),
        Activity("triton_b", 8, 1), Activity("triton_b", 9, 3), Activity("triton_c", 12, 1),
        Activity("Memset (Device)", 12, 1, 64),
    ]  # fmt: skip
    noted = {
        "triton_a": [1000] * 3,  # the same each time, however often it was recorded
        "triton_b": [100, 300],
        "triton_c": [5, 7],  # which of them ran cannot be told
    }
    whole, *rows = table_rows(found, noted, 4e9, 20e-6, {"candidate": "pgd", "mode": "captured"})
    assert [(row["name"], row["count"], row["us"], row["bytes"]) for row in rows] == [
        ("cudnn", 1, 5, None),
        ("triton_b", 2, 4, 400),
        ("triton_a", 2, 2, 2000),
        ("triton_c", 1, 1, None),
        ("Memset (Device)", 1, 1, 64),
    ]
    # 2000 bytes in 2 us are 1 GB/s, a quarter of the copy
    assert [row["of_copy"] for row in rows] == [None, 0.025, 0.25, None, 0.016]
    assert {row["kind"] for row in rows} == {"kernel"}
    assert {row["candidate"] for row in (whole, *rows)} == {"pgd"}
    assert (whole["kind"], whole["count"], whole["wall_us"]) == ("kernels", 7, 20)
    # From 0 to 13, nothing from 2 to 3; the last two run at the same time.
    assert (whole["kernel_us"], whole["span_us"], whole["idle_share"]) == (13, 13, 0.0769)
    assert whole["us_of_known_bytes"] == 7


def test_a_call_without_launches_has_an_empty_table():
    (whole,) = table_rows([], {}, 1e9, 1e-6, {})
    assert (whole["count"], whole["idle_share"]) == (0, None)


def test_a_tensor_counts_once_and_twice_if_it_is_read_and_written():
    x = torch.zeros(10, 4)
    assert launches.argument_bytes("k", [("in_ptr0", x), ("n", 40), ("out", x.half())]) == 240
    assert launches.argument_bytes("k", [("in_out_ptr0", x)]) == 320
    assert launches.argument_bytes("k", [("x", torch.zeros(1).expand(1000))]) == 4
    assert launches.argument_bytes("k", [("weights", (x, x))]) == 320
    assert launches.argument_bytes("_restore_kernel", [("weights", (x, x)), ("shifts", x)]) == 800


class Kernel:
    """Launched as Triton's functions are: by ``run``, with its arguments' names at hand."""

    arg_names = ("in_out_ptr0", "n")
    ran = 0

    def __init__(self) -> None:
        self.__name__ = "triton_k"

    def run(self, *args, stream=None):
        Kernel.ran += 1
        return "launched"


@pytest.mark.parametrize("recording", [True, False])
def test_launches_are_noted_while_they_are_recorded(recording, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    seen, before, ran = {}, Kernel.run, Kernel.ran
    restore = launches._note_runs(Kernel, seen, True)
    assert Kernel().run(torch.zeros(2), 2, stream=0) == "launched"
    restore()
    assert Kernel.run is before
    assert Kernel.ran == ran + 1
    assert seen == ({"triton_k": [16]} if recording else {})


def test_watching_leaves_no_patch():
    heuristics = pytest.importorskip("torch._inductor.runtime.triton_heuristics")
    before = heuristics.CachingAutotuner.run
    with launches.watched_launches() as seen:
        assert heuristics.CachingAutotuner.run is not before
    assert heuristics.CachingAutotuner.run is before
    assert seen == {}
