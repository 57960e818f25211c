"""``fastadv doctor``, and ``--gpu`` with a GPU that is played: each fault has its line."""

import io
import math
import re
import time
from collections import Counter
from itertools import count

import pytest
import torch
from rich.console import Console

from fastadv.benchmark.installation import all_checks, library_checks
from fastadv.benchmark.installation.finding import LEFT_OUT, Check, Failed, findings
from fastadv.benchmark.installation.library_checks import (
    ASKED,
    Facts,
    arithmetic_checks,
    clock_check,
    nccl_check,
    version_checks,
)
from fastadv.benchmark.installation.step_checks import Meter, captured_checks, memory_checks
from fastadv.cli import doctor

CPU = torch.device("cpu")


def found(checks, limit=math.inf):
    return {each.name: each for each in findings(checks, limit)}


def fails(said, todo):
    def run():
        raise Failed(said, todo)

    return run


def test_without_a_gpu_it_is_one_sentence(fastadv_command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = fastadv_command("doctor", "--gpu")
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert "Nothing to check" in said.err


def test_a_driver_that_is_too_old_is_said(fastadv_command, monkeypatch):
    def init():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found 11040). Please update"
        )

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    said = fastadv_command("doctor", "--gpu")
    assert said.code == 2
    assert (
        "torch finds no GPU (The NVIDIA driver on your system is too old (found 11040));"
        in said.err
    )
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert "there is no CUDA device here" in fastadv_command("doctor", "--gpu").err


@pytest.mark.parametrize("wrong", [False, True])
def test_exit_code_and_lines(wrong, fastadv_command, monkeypatch):
    checks = [
        Check("one", lambda: "as it should be"),
        Check("two", fails("off by 1e-2 " * 12, "install it again")) if wrong
        else Check("two", lambda: None),
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Played [GPU]")
    monkeypatch.setattr(all_checks, "gpu_checks", lambda device: checks)
    said = fastadv_command("doctor", "--gpu")
    assert said.code == int(wrong)
    lines = said.out.splitlines()
    assert lines[0] == "cuda:0: Played [GPU]"
    assert re.fullmatch(r"ok   one +0\.0 s  as it should be", lines[1])
    assert ("do: install it again" in said.out) is wrong
    assert lines[-1] == f"1 right, {int(wrong)} wrong, {1 - wrong} not checked"
    assert max(map(len, lines)) <= 80


def test_a_plain_report_has_80_columns_and_says_nothing_twice(fastadv_command):
    lines = [line for line in fastadv_command("doctor").out.splitlines() if line]
    assert max(map(len, lines)) <= 80
    assert Counter(lines).most_common(1)[0][1] == 1
    reasons = [line for line in lines if "Triton needs a CUDA device" in line]
    assert len(reasons) <= 1


def test_what_a_broken_installation_raises_is_a_finding():
    def broken():
        raise RuntimeError("no kernel image is available\nand a hint")

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    each = found([Check("a", broken), Check("b", lost), Check("c", lambda: "not reached")])
    assert each["a"].said == "RuntimeError: no kernel image is available"
    assert (each["b"].passed, "c" in each) == (False, False)
    assert "the device is lost" in each["further checks"].said


def test_what_does_not_fit_into_the_time_is_left_out():
    checks = [
        Check("slow", lambda: time.sleep(0.2) or "right", seconds=0.1),
        Check("long", lambda: "never", seconds=10.0),
        Check("short", lambda: "right", seconds=0.0),
    ]
    each = found(checks, limit=5.0)
    assert [each[name].passed for name in ("slow", "long", "short")] == [True, None, True]
    assert each["long"].said == LEFT_OUT
    console = Console(file=io.StringIO(), width=80)
    assert doctor.show(each.values(), console)


GOOD = Facts((13, 1), (13, 0), (9, 0), ["sm_80", "sm_90"], "3.9.0", "3.9.0")


def versions(**changes):
    facts = Facts(**{**GOOD.__dict__, **changes})
    return {name: each.passed for name, each in found(version_checks(lambda: facts)).items()}


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, set()),
        ({"driver": (12, 4)}, {"driver and CUDA"}),
        ({"driver": (13, 0), "runtime": (13, 2)}, set()),  # minor versions are compatible
        ({"driver": None}, set()),
        ({"capability": (12, 0)}, {"torch for this GPU"}),
        ({"capability": (8, 6)}, set()),  # by the code for sm_80
        ({"capability": (7, 5)}, {"torch for this GPU"}),
        ({"capability": (12, 0), "architectures": ["sm_90", "compute_90"]}, set()),
        ({"triton": None}, {"Triton for this torch"}),
        ({"triton": "3.1.0"}, {"Triton for this torch"}),
        ({"triton": "3.1.0", "triton_wanted": None}, set()),
    ],
)
def test_versions_that_do_not_fit(changes, failing):
    assert {name for name, passed in versions(**changes).items() if not passed} == failing


def test_facts_are_read_without_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    told = library_checks.facts(CPU)
    assert told.capability == (9, 0)
    assert told.triton is None or told.triton[0].isdigit()


def smi(reasons, **changes):
    values = dict(
        zip(ASKED, ("560.1", "1980", "1980", "61", "310.2", "700.0", reasons), strict=True)
    )
    return ", ".join((values | changes).values())


@pytest.mark.parametrize(
    ("line", "passed", "said"),
    [
        (smi("0x0000000000000004"), True, "1980 of 1980 MHz, 61 C, 310.2 of 700.0 W"),
        (smi("0x0000000000000020"), False, "too hot"),
        (smi("0x0000000000000088"), False, "slowed by hardware, power brake"),
        (smi("[N/A]"), True, "driver 560.1"),
        ("No devices were found", None, "nothing to check"),
        (None, None, "nothing to check"),
    ],
)
def test_clocks(line, passed, said):
    each = found([clock_check(lambda: line)])["clocks"]
    assert each.passed is passed
    assert said in each.said


def raises(number):
    raise RuntimeError("unhandled system error\nmore")


@pytest.mark.parametrize(
    ("gpus", "reduce", "passed"),
    [
        (1, None, None),
        (3, lambda number: [6.0] * number, True),
        (2, lambda number: [3.0, 2.0], False),
        (2, raises, False),
        (2, lambda number: time.sleep(60), False),
    ],
)
def test_a_sum_over_several_gpus(gpus, reduce, passed, monkeypatch):
    monkeypatch.setattr(library_checks, "NCCL_SECONDS", 0.2)
    each = found([nccl_check(gpus, reduce)])["NCCL"]
    assert each.passed is passed
    assert bool(each.todo) is (passed is False)


def test_arithmetic_is_right_here():
    each = found(arithmetic_checks(CPU))
    assert [each[name].passed for name in ("TF32", "cuDNN")] == [True, True]


def test_products_that_round_although_they_must_not_are_found(monkeypatch):
    real = torch.Tensor.__matmul__

    def rounded(self, other):
        return (
            real(self.bfloat16().to(self.dtype), other)
            if self.dtype == torch.float32
            else real(self, other)
        )

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    each = found(arithmetic_checks(CPU))["TF32"]
    assert (each.passed, each.todo) == (False, "unset NVIDIA_TF32_OVERRIDE")


@pytest.mark.parametrize("fault", ["differ from run to run", "a convolution is off"])
def test_convolutions_that_are_wrong_or_differ_are_found(fault, monkeypatch):
    real, calls = torch.nn.functional.conv2d, count(1)

    def conv2d(x, weight, **options):
        result = real(x, weight, **options)
        if x.dtype == torch.float64:
            return result
        return result * (1 + 1e-3 * (next(calls) if fault.startswith("differ") else 1))

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    each = found(arithmetic_checks(CPU))["cuDNN"]
    assert each.passed is False
    assert fault in each.said


def meter(*, leak=0, peaks=(100, 110)):
    """Every reading has grown by ``leak`` bytes; the peaks of a plain pass and of a step."""
    grown, peak = count(), iter(peaks)
    return Meter(lambda: 1000 + leak * next(grown), lambda: 1000 + next(peak), lambda: None)


def memory(**played):
    checks = list(memory_checks(CPU, meter(**played), batch=2, modes=("eager",)))
    return [found([check])[check.name] for check in checks]


@pytest.mark.slow
def test_memory_and_what_steps_leave_behind(monkeypatch):
    from fastadv.benchmark.installation import step_checks

    monkeypatch.setattr(step_checks, "WARM", 1)
    monkeypatch.setattr(step_checks, "STEPS", 2)
    monkeypatch.setattr(step_checks, "NETWORK", {"width": 2, "depths": (1, 1, 1, 1)})
    small = (torch.rand(2, 3, 8, 8), torch.arange(2))
    monkeypatch.setattr(step_checks, "_batch", lambda device, batch: small)
    peak, leak = memory()
    assert (peak.passed, leak.passed) == (True, True)
    peak, leak = memory(leak=4096, peaks=(100, 9000))
    assert (peak.passed, leak.passed) == (False, False)
    assert leak.said == "2.0 KiB a step stay allocated"
    assert "1.5 times" in peak.said


def test_a_step_with_other_numbers_is_found(monkeypatch):
    from fastadv.benchmark.installation import step_checks

    real, calls = step_checks._weights, count()

    def bent(device, mode, prepare, dtype):
        weights = real(device, mode, prepare, dtype)
        if next(calls) % 2:
            weights["linear.weight"][0] *= math.nan if dtype == torch.float32 else 1 + 1e-7
        return weights

    monkeypatch.setattr(step_checks, "_weights", bent)
    for each in found(captured_checks(CPU, "eager")).values():
        assert each.passed is False
        assert "in linear.weight after 3 updates" in each.said
        assert "--mode eager" in each.todo


def test_the_order_of_all_checks_is_that_of_causes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    names = [check.name for check in all_checks.gpu_checks(torch.device("cuda", 0))]
    assert names[:6] == [
        "driver and CUDA", "torch for this GPU", "Triton for this torch", "clocks", "TF32", "cuDNN",
    ]  # fmt: skip
    assert names[-1] == "kernels, full size"
    assert len(names) == len(set(names))
    assert max(map(len, names)) <= 27
