"""The speed of the kernels: ``python bench/kernels.py [--device cuda] [--large] [-k linf]``.

Every case is timed as Triton (where it can run), as the reference, as the compiled reference, and
as the PyTorch calls that one would write by hand. pytest-benchmark times whole calls,
synchronisation included; on a GPU, CUDA events around graph replays time the device alone. GB/s
counts the bytes that a case must move, and a copy on the same device is timed for comparison. Rows
are appended to ``bench/results/``, one file per device and torch version; values that were not
measured are null.
"""

import json
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv import kernels
from fastadv.benchmark.launches import watched_launches
from fastadv.benchmark.rows import provenance
from fastadv.kernels.dispatch import INTERPRETED, OPERATORS, why_not_triton

RESULTS = Path(__file__).parent / "results"
EPS, ALPHA = 8 / 255, 2 / 255
BACKENDS = ("triton", "reference", "compiled", "by hand")
COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
REPLAYS = 50
# The 21 tensors with more than one dimension of a pre-activation ResNet-18.
STAGES = ((64, 64), (64, 128), (128, 256), (256, 512))
RESNET18 = [(64, 3, 3, 3)] + [
    shape
    for before, width in STAGES
    for shape in (
        (width, before, 3, 3),
        *[(width, width, 3, 3)] * 3,
        *([(width, before, 1, 1)] if before != width else []),
    )
]
RESNET18.append((10, 512))


@dataclass(frozen=True)
class Case:
    """One operator to time: its arguments, the same computation by hand, and the bytes it moves."""

    kernel: str
    size: str
    arguments: tuple[Any, ...]
    by_hand: Callable[..., Any]
    bytes_moved: int
    backward: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    gradient: Tensor | None = None  # what the backward pass begins with; None: ones


def linf_by_hand(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float) -> Tensor:
    delta = torch.clamp(x_adv - x + alpha * torch.sign(grad), -eps, eps)
    return x + torch.clamp(delta, 0 - x, 1 - x)


def l2_by_hand(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float) -> Tensor:
    norm = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    delta = (x_adv - x + alpha * grad / (norm + 1e-10)).flatten(1).renorm(2, 0, eps)
    return x + torch.clamp(delta.view_as(x), 0 - x, 1 - x)


def start_by_hand(x: Tensor, eps: float, *_key: object) -> Tensor:
    return (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)


def awp_by_hand(weights: list[Tensor], directions: list[Tensor], gamma: float) -> None:
    for w, d in zip(weights, directions, strict=True):
        w.add_(gamma * w.norm() / (d.norm() + 1e-20) * d)


def awp_by_foreach(weights: list[Tensor], directions: list[Tensor], gamma: float) -> None:
    w_norms, d_norms = torch._foreach_norm(weights), torch._foreach_norm(directions)
    torch._foreach_mul_(w_norms, gamma)
    torch._foreach_add_(d_norms, 1e-20)
    torch._foreach_div_(w_norms, d_norms)
    torch._foreach_add_(weights, torch._foreach_mul(directions, w_norms))


def top_n_by_hand(z: Tensor, z_adv: Tensor, n: int) -> Tensor:
    distance = (z - z_adv).abs().flatten()
    mask = torch.zeros_like(distance).scatter_(0, distance.detach().topk(n).indices, 1.0)
    return (distance * mask).sum()


def kl_by_hand(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(q, 1), F.softmax(p, 1), reduction="none").sum(1)


def ce_by_hand(logits: Tensor, y: Tensor, c_min: float) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(logits, y, reduction="none")
    kept = (loss <= c_min).float()
    return (loss * kept).mean(), kept.sum()


def crop_by_hand(
    store: Tensor,
    index: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    size: tuple[int, int],
    channels_last: bool = False,
) -> Tensor:
    rows = store[index].float() / 255
    y = top[:, None] + torch.arange(size[0], device=store.device)
    x = left[:, None] + torch.arange(size[1], device=store.device)
    sample = torch.arange(len(index), device=store.device)[:, None, None]
    window = rows.permute(0, 2, 3, 1)[sample, y[:, :, None], x[:, None]].permute(0, 3, 1, 2)
    window = torch.where(flip[:, None, None, None], window.flip(3), window)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return window.contiguous(memory_format=layout)


def pad_by_hand(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    return F.pad(x.to(dtype), (0, 0, 0, 0, 0, channels - x.shape[1]))


def dots_by_hand(gradients: list[Tensor], signs: list[Tensor]) -> Tensor:
    return torch.stack([(g * s).sum() for g, s in zip(gradients, signs, strict=True)])


def signs_by_hand(gradients: list[Tensor]) -> list[Tensor]:
    return [g.sign() for g in gradients]


def put_back_by_hand(weights: list[Tensor], copies: list[Tensor], ok: Tensor) -> None:
    for w, old in zip(weights, copies, strict=True):
        torch.where(ok, w, old, out=w)


def not_finite_by_hand(weights: list[Tensor]) -> Tensor:
    return ~torch.stack([w.sum() for w in weights]).isfinite().all()


def look_by_hand(
    x: Tensor, y: Tensor, rows: Tensor, box: tuple[float, float], rounding: float, classes: int,
    first: int, count: int, bad: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    low, high = box
    bad[0].copy_(~((x >= low - rounding) & (x <= high + rounding)).all())
    bad[1].copy_(((y < 0) | (y >= classes)).any())
    bad[2].copy_(((rows < first) | (rows >= count)).any())
    return x.clamp(low, high), y.clamp(0, classes - 1), rows.clamp(0, count - 1)


def unmoved_by_hand(x_adv: Tensor, start: Tensor, x: Tensor, eps: float) -> Tensor:
    start = start.clamp(0, 1)
    out = (start - x).abs() >= 0.999 * eps
    stuck = out | (start <= 0) | (start >= 1)
    edge = out.flatten(1).any(1) & stuck.flatten(1).all(1)
    return (x_adv == start).flatten(1).all(1) & ~edge


def norm_by_hand(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    before: Tensor | None,
    after: Tensor | None,
) -> Tensor:
    x = x if before is None else x + before
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return F.relu(y if after is None else y + after)


def norm_case(device: str, shape: tuple[int, ...], residual: bool) -> Case:
    """BatchNorm, an addition after it if ``residual``, and ReLU of one layer in bfloat16, forward
    and backward.

    Bytes in tensors: 3 for the forward pass (statistics read x; the application reads x and writes
    y) and 5 for the backward pass (sums read x and dy; the gradient reads both and is written); the
    residual, y again and the gradient behind the ReLU are 1 each.
    """
    x, gradient, skip = (
        torch.randn(shape, device=device, dtype=torch.bfloat16).to(
            memory_format=torch.channels_last
        )
        for _ in range(3)
    )
    numbers = [torch.ones(shape[1], device=device) for _ in range(4)]
    arguments = (x.requires_grad_(), *numbers, True, 0.1, 1e-5, None, skip if residual else None)
    size = "x".join(map(str, shape)) + " after" * residual
    skip.requires_grad_()
    moved = (11 if residual else 8) * 2 * x.numel()
    return Case("fused_norm", size, arguments, norm_by_hand, moved, True, gradient)


def cases(device: str, large: bool) -> dict[str, Case]:
    """The cases by name; ``large`` adds the sizes that are meant for a GPU."""
    batches = {"128x3x32x32": 128} | ({"64 MB": 64 * 2**20 // (4 * 3072)} if large else {})
    rows = {"128x10": (128, 10)} | ({"512x1000": (512, 1000)} if large else {})
    found: list[Case] = []
    flags = [torch.zeros((), dtype=torch.bool, device=device) for _ in range(3)]
    for size, batch in batches.items():
        x, x_adv, grad = (torch.rand(batch, 3, 32, 32, device=device) for _ in range(3))
        moved, index = x.numel() * 4, torch.arange(batch, device=device)
        step = (x_adv, grad - 0.5, x)
        store = torch.randint(256, (batch, 3, 40, 40), dtype=torch.uint8, device=device)
        pad = (x.to(memory_format=torch.channels_last), 8, torch.bfloat16)
        view = (index, index % 9, index % 9, index % 2 == 0)
        found += [
            Case("linf_step", size, (*step, ALPHA, EPS), linf_by_hand, 4 * moved),
            Case("linf_start", size, (x, EPS, index, 0, 0), start_by_hand, 2 * moved),
            Case("l2_step", size, (*step, 0.1, 0.5), l2_by_hand, 4 * moved),
            Case("pad_channels", size, pad, pad_by_hand, moved + 2 * x.numel() // 3 * 8),
            Case("unmoved_images", size, (x_adv, x_adv, x, EPS), unmoved_by_hand, 3 * moved),
            Case(
                *("look_at_batch", size),
                (x, index % 10, index, (0.0, 1.0), 1e-5, 10, 0, batch, flags),
                *(look_by_hand, 2 * moved),
            ),
        ]
        crop = (store, *view, (32, 32))
        for name, options in ((size, {}), (f"{size} channels_last", {"channels_last": True})):
            bytes_moved = moved // 4 * 5
            found.append(Case("crop_flip", name, crop, crop_by_hand, bytes_moved, options=options))
    # Few samples, the largest that one program holds, and one of many programs.
    for shape in ((16, 3, 32, 32), *([(512, 3, 64, 64), (32, 3, 224, 224)] if large else [])):
        step = tuple(torch.rand(shape, device=device) for _ in range(3))
        size, moved = "x".join(map(str, shape)), 4 * math.prod(shape)
        found.append(Case("l2_step", size, (*step, 0.1, 0.5), l2_by_hand, 4 * moved))
    for size, shape in rows.items():
        p, q = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
        y, moved = torch.zeros(shape[0], dtype=torch.int64, device=device), p.numel() * 4
        for backward in (False, True):
            both, one = (5 if backward else 2) * moved, (3 if backward else 1) * moved
            n = p.numel() // 10 if shape[1] == 10 else 1000
            found += [
                Case("trades_kl", size, (p, q), kl_by_hand, both, backward),
                Case("masked_ce", size, (p, y, 1.7), ce_by_hand, one, backward),
                Case("top_n_sum", size, (p, q, n), top_n_by_hand, both, backward),
            ]
    layers = [torch.randn(shape, device=device) for shape in RESNET18]
    directions = [torch.randn(shape, device=device) for shape in RESNET18]
    moved = 4 * sum(t.numel() for t in layers)
    awp = (layers, directions, 0.0)
    blocks = [torch.randn(128 if large else 8, 64, 32, 32, device=device) for _ in range(8)]
    block_bytes = 4 * sum(t.numel() for t in blocks)
    found += [
        Case("perturb_weights", "21 tensors", awp, awp_by_hand, 6 * moved),
        Case("perturb_weights", "21 tensors, foreach", awp, awp_by_foreach, 6 * moved),
        Case("not_finite", "21 tensors", (layers,), not_finite_by_hand, moved),
        # An update that counts reads one flag; the bytes of the other are read and written.
        Case("put_back_unless", "21 tensors", (layers, directions, ~flags[0]), put_back_by_hand, 1),
        Case(
            *("put_back_unless", "21 tensors, undone"),
            *((layers, directions, flags[0]), put_back_by_hand, 2 * moved),
        ),
        Case("block_signs", "8 blocks", (blocks,), signs_by_hand, 2 * block_bytes),
        Case("block_step_gradients", "8 blocks", (blocks, blocks), dots_by_hand, 2 * block_bytes),
    ]
    shapes = [(32, 64, 8, 8)]
    if large:
        layers_at = ((64, 32), (128, 16), (256, 8), (512, 4))
        shapes += [(batch, c, side, side) for batch in (128, 512) for c, side in layers_at]
    found += [norm_case(device, shape, residual=False) for shape in shapes]
    found += [norm_case(device, shape, residual=True) for shape in shapes if shape[1] == 64]
    names = [f"{c.kernel} {c.size}{' backward' * c.backward}" for c in found]
    return dict(zip(names, found, strict=True))


def function_of(case: Case, backend: str) -> Callable[..., Any]:
    """The function to time for a backend; skips the test if Triton cannot run it."""
    # Three operators and PyTorch's autograd between them; the reference is what PyTorch has.
    whole = case.kernel == "fused_norm"
    if whole and backend == "reference":
        pytest.skip("the calls by hand are the reference")
    plain = case.by_hand
    if not whole and backend != "by hand":
        plain = OPERATORS[case.kernel].reference
    if backend == "compiled":
        torch._dynamo.reset()
        return torch.compile(plain, fullgraph=True, dynamic=False)
    if backend == "triton":
        first = case.arguments[0]
        device = (first if isinstance(first, Tensor) else first[0]).device
        problem = why_not_triton(device, case.arguments)
        if problem or INTERPRETED:
            pytest.skip(problem or "the interpreter is not a device")
        return kernels.fused_norm if whole else OPERATORS[case.kernel].triton
    return plain


def runner(case: Case, backend: str) -> Callable[[], Any]:
    """A function that makes one call, or one call and its gradient."""
    function = function_of(case, backend)

    def forward() -> Any:
        with torch.no_grad():
            return function(*case.arguments, **case.options)

    def backward() -> Any:
        found = function(*case.arguments, **case.options)
        value = found[0] if isinstance(found, tuple) else found
        inputs = [t for t in case.arguments if isinstance(t, Tensor) and t.requires_grad]
        if case.gradient is not None:
            return torch.autograd.grad(value, inputs, case.gradient)
        return torch.autograd.grad(value.sum(), inputs)

    return backward if case.backward else forward


def launch_count(run: Callable[[], Any]) -> int:
    """The number of Triton kernels that a call launches."""
    with watched_launches(only_recorded=False) as seen:
        run()
    return sum(map(len, seen.values()))


def device_seconds(run: Callable[[], Any]) -> float:
    """Median seconds of one graph replay on the current CUDA device, by events, after a warm-up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    # Replays are queued without waiting, so that events do not measure the host's time.
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times) / 1e3


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy that does not fit into the device's cache."""
    size = COPY_BYTES[device]
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    if device == "cuda":
        return 2 * size / device_seconds(lambda: target.copy_(source))
    times = []
    for _ in range(9):
        before = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - before)
    return 2 * size / statistics.median(times)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    told = information.read_text() if information.exists() else ""
    named = re.search(r"model name\s*:\s*(.+)", told)
    return named.group(1) if named else platform.machine()


def append(row: dict[str, Any], folder: Path) -> None:
    name = re.sub(r"[^a-z0-9]+", "-", f"{row['device']} torch {row['torch']}".lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"kernels-{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


class Options:
    """A pytest plugin with the command line options of this script."""

    def pytest_addoption(self, parser: Any) -> None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        parser.addoption("--device", default=default, choices=("cpu", "cuda"))
        parser.addoption("--large", action="store_true", help="also the sizes meant for a GPU")
        parser.addoption("--results", type=Path, default=RESULTS)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def bandwidth(device: str) -> float:
    return copy_bandwidth(device)


@pytest.fixture(scope="session")
def prepared(device: str, request: pytest.FixtureRequest) -> dict[str, Case]:
    return cases(device, request.config.getoption("--large") or device == "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", cases("meta", True))
def test_speed(
    benchmark: Any,
    prepared: dict[str, Case],
    bandwidth: float,
    device: str,
    name: str,
    backend: str,
    request: pytest.FixtureRequest,
) -> None:
    if name not in prepared:
        pytest.skip("this size is for a GPU; --large runs it anyway")
    case = prepared[name]
    run = runner(case, backend)
    run()

    def synchronised() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronised)
    call_seconds = benchmark.stats.stats.median
    on_device = device_seconds(run) if device == "cuda" else None
    rate = case.bytes_moved / (on_device or call_seconds) / 1e9
    print(f"\n{name}, {backend}: {rate:.1f} GB/s; a copy reaches {bandwidth / 1e9:.1f} GB/s")
    row = provenance(torch.device(device)) | {
        "bench": "kernels",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernel": case.kernel,
        "size": case.size,
        "backward": case.backward,
        "backend": backend,
        "call_seconds": call_seconds,
        "device_seconds": on_device,
        "launches": launch_count(run) if backend == "triton" else None,
        "bytes": case.bytes_moved,
        "gigabytes_per_second": rate,
        "copy_gigabytes_per_second": bandwidth / 1e9,
    }
    append(row, request.config.getoption("--results"))


if __name__ == "__main__":
    quiet = ["-o", "addopts=", "--benchmark-only", "--import-mode=importlib", "-s", "-q"]
    sys.exit(pytest.main([__file__, *quiet, *sys.argv[1:]], plugins=[Options()]))
