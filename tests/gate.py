"""The gate of speed: ratios to plain PyTorch in the same process, which hold on any machine.

``test_gate.py`` runs this file alone, in a process of its own. pytest-benchmark times our side; its
setup times the plain side before each round, so that both see the same machine. The smallest of
many rounds is what a machine without other programs takes. What the ratios were is in
``bench/results/gate.jsonl``, by ``FASTADV_GATE_WRITES=1`` and this file on one thread, which adds
rows and compares nothing. ``FASTADV_GATE_SLOWER=1.4`` makes the step take that much longer, to try
the gate.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_script import script
from torch import Tensor
from torch.nn import functional

from fastadv.benchmark.ours import make_optimizer, make_step
from fastadv.benchmark.rows import append_rows, provenance, read_rows
from fastadv.benchmark.setting import ALPHA, EPS, Setting
from fastadv.benchmark.specs import Spec

SLOWER = float(os.environ.get("FASTADV_GATE_SLOWER", "1"))
SETTING = Setting(width=16, batch_size=16)
STEPS = 2
ROWS = Path(__file__).parents[1] / "bench" / "results" / "gate.jsonl"
WRITES = bool(os.environ.get("FASTADV_GATE_WRITES"))
# The loop below has the passes of ours and nothing else; ours adds checks of batch and update.
STEP = "pgd step"
STEP_MOST = 1.1
# The references do more than the calls that one would write by hand: noise that belongs to the
# sample, ties, flags. Other processors weigh memory and arithmetic otherwise.
KERNELS = (
    "linf_step 128x3x32x32",
    "l2_step 128x3x32x32",
    "linf_start 128x3x32x32",
    "pad_channels 128x3x32x32",
    "unmoved_images 128x3x32x32",
    "look_at_batch 128x3x32x32",
    "crop_flip 128x3x32x32",
    "trades_kl 128x10",
    "masked_ce 128x10",
    "top_n_sum 128x10",
    "perturb_weights 21 tensors",
    "block_step_gradients 8 blocks",
)
KERNEL_MARGIN = 2.0
CALL_SECONDS = 0.003


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def ratio(benchmark: Any, ours: Callable[[], Any], plain: Callable[[], Any], rounds: int) -> float:
    """The smallest time of ``ours`` over the smallest of ``plain``, round by round."""
    taken: list[float] = []
    benchmark.pedantic(
        ours,
        setup=lambda: taken.append(seconds(plain)),
        rounds=rounds,
        warmup_rounds=2,
        iterations=1,
    )
    found = float(benchmark.stats.stats.min) / min(taken)
    benchmark.extra_info["over plain PyTorch"] = found
    return found


def require(name: str, found: float, most: float) -> None:
    """``found`` is at most ``most``; or only a row is written."""
    if WRITES:
        row = provenance(torch.device("cpu")) | {"kind": "gate", "name": name}
        append_rows(ROWS, [row | {"over_plain_ratio": round(found, 3)}])
        return
    assert found <= most, f"{found:.2f} times plain PyTorch, at most {most:.2f} is allowed"


def plain_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., None]:
    """PGD in PyTorch as one would write it by hand, with no pass too many."""

    def run(x: Tensor, y: Tensor) -> None:
        model.train()
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.requires_grad_(False)
        x_adv = (x + (2 * torch.rand_like(x) - 1) * EPS).clamp(0, 1)
        for _ in range(STEPS):
            point = x_adv.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(functional.cross_entropy(model(point), y), [point])
            x_adv = torch.clamp(point.detach() + ALPHA * gradient.sign(), x - EPS, x + EPS)
            x_adv = x_adv.clamp(0, 1)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer.zero_grad()
        functional.cross_entropy(model(x_adv), y).backward()
        optimizer.step()

    return run


def test_a_pgd_step_takes_what_its_passes_take(benchmark: Any) -> None:
    (batch,) = SETTING.batches(1, channels_last=True)
    spec = Spec("pgd", (("steps", str(STEPS)),))
    step = make_step(SETTING, spec, "fp32", "eager")
    model = SETTING.make_model(channels_last=True)
    plain = plain_step(model, make_optimizer(model))

    def ours() -> None:
        taken = seconds(lambda: step(batch.x, batch.y, batch.index))
        if SLOWER > 1:
            time.sleep((SLOWER - 1) * taken)

    found = ratio(benchmark, ours, lambda: plain(batch.x, batch.y), rounds=20)
    require(STEP, found, STEP_MOST)


@pytest.fixture(scope="module")
def kernels() -> Any:
    return script("kernels")


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernels_reference_is_as_fast_as_it_was(name: str, benchmark: Any, kernels: Any) -> None:
    case = kernels.cases("cpu", False)[name]
    ours, by_hand = (kernels.runner(case, backend) for backend in ("reference", "by hand"))
    by_hand()
    times = max(1, int(CALL_SECONDS / max(seconds(by_hand), 1e-7)))

    def repeated(call: Callable[[], Any]) -> Callable[[], None]:
        return lambda: [call() for _ in range(times)] and None

    found = ratio(benchmark, repeated(ours), repeated(by_hand), rounds=25)
    last = {row["name"]: row["over_plain_ratio"] for row in read_rows(ROWS)} if not WRITES else {}
    require(name, found, KERNEL_MARGIN * last.get(name, 0.0))
