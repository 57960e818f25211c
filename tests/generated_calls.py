"""Calls of the Python API with arguments drawn at random, most of them wrong.

Each call is drawn from a number, so that one that failed can be made again; ``judged_calls.py``
says what became of it.
"""

from __future__ import annotations

import io
import math
import random
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from generated_arguments import CLASSES, COMPANION, INDEX, MODELS, VALUES, Net, X, Y, images, labels
from judged_calls import fault_of_step
from torch import Tensor, nn

import fastadv

USUAL = 0.94  # probability of what is right

METHODS = (
    *("pgd", "trades", "fast", "free", "awp", "atta-1", "n-fgsm", "mart", "rwp", "te"),
    *("pgd", "pgd", "fast"),
)
OPTIONS = (
    *("eps", "norm", "threat", "amp", "mode", "fused_norm", "num_samples", "num_classes"),
    *("total_steps", "steps_per_epoch", "scaler", "max_grad_norm", "seed", "amp_dtype"),
    *("attack_dtype", "blocks", "criterion", "attack_criterion", "output", "method"),
    *("steps", "alpha", "beta", "gamma", "restarts", "weights", "regularizer", "unknown", "start"),
)
ATTACKS = (
    *("pgd", "pgd-3", "fgsm", "clean", "cw-3", "apgd-ce-5", "square-20", "fab-3", "noise-0.1"),
    *("fgsm", "pgd-3", "pgd-2", "cw-2", "fgsm-rwp", "pgd-3-2", "apgd-t-3-2", "quick"),
    *("apgd-ce-5+square-9", "pgd-dlr-3", "pgd-3-2-largest", "malt-3", "pma-3"),
    *("pgd-", "", "PGD-3", "pgd-10000000", "square-99999999999"),
)
ATTACK_OPTIONS = (
    *("eps", "norm", "threat", "mask", "targeted", "alpha", "steps", "restarts", "random_start"),
    *("start", "objective", "seed", "index", "amp", "criterion", "output", "name"),
)
EVALUATE_OPTIONS = (
    *("eps", "norm", "threat", "alpha", "seed", "amp", "device", "progress", "shared"),
    *("criterion", "metric", "output", "search_dtype", "mode", "attacks"),
)
BUILD_OPTIONS = (
    *("name", "num_classes", "width", "in_channels", "mean", "std", "dropout", "image_size"),
    *("depth", "stem", "shortcut", "depths", "unknown"),
)


class Generated(NamedTuple):
    """``said``: what the call is, in words. ``run`` makes it and returns what is wrong with the
    result, or ""."""

    said: str
    run: Callable[[], str]


def generated(number: int) -> Generated:
    """The call that belongs to ``number``."""
    draw = random.Random(number)
    makers = (_step, _step, _step, _attack, _attack, _evaluate, _build, _saved)
    return draw.choice(makers)(draw)


def _one(draw: random.Random, pool: dict[str, Any], usual: float) -> tuple[str, Any]:
    """The first entry of ``pool`` with the probability ``usual``, else any."""
    name = next(iter(pool)) if draw.random() < usual else draw.choice(list(pool))
    return name, pool[name]


def _count(x: object) -> int:
    try:
        return len(x)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # no sequence, or nested
        return 4


def _chosen(draw: random.Random, names: tuple[str, ...], said: list[str]) -> dict[str, Any]:
    """At most two options with any values."""
    given: dict[str, Any] = {}
    for _ in range(draw.choice((0, 0, 0, 0, 1, 1, 2))):
        name, value = draw.choice(names), draw.choice(list(VALUES))
        if name == "progress" and callable(VALUES[value]):
            continue  # what the caller's own function raises is the caller's
        given[name] = VALUES[value]
        said.append(f"{name}={value}")
    return given


def _optimizer(draw: random.Random, model: Any, said: list[str]) -> Any:
    other = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    parameters = parameters or list(other.parameters())
    made: dict[str, Callable[[], Any]] = {
        "SGD": lambda: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        "Adam": lambda: torch.optim.Adam(parameters, lr=0.01),
        "AdamW, fused": lambda: torch.optim.AdamW(parameters, lr=0.01, fused=True),
        "of half of the parameters": lambda: torch.optim.SGD(parameters[:2], lr=0.01),
        "of another model": lambda: torch.optim.SGD(other.parameters(), lr=0.01),
        "of both models": lambda: torch.optim.SGD([*parameters, *other.parameters()], lr=0.01),
        "with a rate of NaN": lambda: torch.optim.SGD(parameters, lr=math.nan),
        "with a rate of inf": lambda: torch.optim.SGD(parameters, lr=math.inf),
        "with a rate of 1e30": lambda: torch.optim.SGD(parameters, lr=1e30),
        "with a rate that is a tensor": lambda: torch.optim.SGD(parameters, lr=torch.tensor(0.1)),
        "LBFGS": lambda: torch.optim.LBFGS(parameters),
        "Rprop": lambda: torch.optim.Rprop(parameters),
        "SparseAdam": lambda: torch.optim.SparseAdam(parameters),
        "ascending": lambda: torch.optim.SGD(parameters, lr=0.01, maximize=True),
        "none": lambda: None,
        "a list": lambda: parameters,
        "a class": lambda: torch.optim.SGD,
        "a scheduler": lambda: torch.optim.lr_scheduler.StepLR(
            torch.optim.SGD(parameters, lr=0.01), 1
        ),
    }
    name, make = _one(draw, made, 0.9)
    said.append(f"optimizer {name}")
    try:
        return make()
    except Exception:  # torch refuses it itself
        return torch.optim.SGD(parameters, lr=0.01)


def _step(draw: random.Random) -> Generated:
    said: list[str] = []
    seed = draw.random()
    torch.manual_seed(int(seed * 1e6))
    name, make = _one(draw, MODELS, USUAL)
    said.append(f"model {name}")
    model = make()
    optimizer = _optimizer(draw, model, said)
    method = draw.choice(METHODS)
    options = {"method": method, "mode": "eager", "num_samples": 20, "num_classes": CLASSES}
    options |= {"total_steps": 9, "steps_per_epoch": 3}
    for each in list(options):
        if each != "method" and draw.random() < 0.1:
            del options[each]
    said.append(method)
    options |= _chosen(draw, OPTIONS, said)
    calls = []
    for place in range(draw.choice((1, 1, 2, 2, 3))):
        words = [f"call {place + 1}"]
        name, make_x = _one(draw, X, USUAL)
        words.append(f"x {name}")
        x = make_x()
        name, make_y = _one(draw, Y, USUAL)
        words.append(f"y {name}")
        y = make_y(_count(x))
        name, make_index = _one(draw, INDEX, USUAL)
        words.append(f"index {name}")
        index = make_index(_count(x))
        more: dict[str, Any] = {}
        if draw.random() < 0.2:
            key = draw.choice(
                ("view", "start", "second", "eps", "alpha", "mask", "targets", "update")
            )
            name, make_one = draw.choice(list(COMPANION.items()))
            base = x if isinstance(x, Tensor) and x.dim() == 4 and not x.is_sparse else images()
            try:
                more[key] = make_one(base)
            except Exception:
                more[key] = make_one(images())
            words.append(f"{key} {name}")
        between = draw.choice(list(CHANGES)) if draw.random() < 0.12 else None
        words.append(f"then {between}" if between else "")
        said.append(" ".join(words))
        calls.append((x, y, index, more, between))

    def run() -> str:
        step = fastadv.step(model, optimizer, **options)
        for x, y, index, more, between in calls:
            found = step(x, y, index, **more)
            fault = fault_of_step(step, found)
            if fault:
                return fault
            if between:
                CHANGES[between](step)
        step.check()
        return ""

    return Generated("; ".join(said), run)


def _again(step: fastadv.Step) -> None:
    buffer = io.BytesIO()
    torch.save(step.state_dict(), buffer)
    buffer.seek(0)
    step.load_state_dict(torch.load(buffer, weights_only=True))


CHANGES: dict[str, Callable[[fastadv.Step], Any]] = {
    "to float64": lambda step: step.model.double(),
    "to bfloat16": lambda step: step.model.bfloat16(),
    "to meta": lambda step: step.model.to("meta"),
    "eval": lambda step: step.model.eval(),
    "frozen": lambda step: step.model.requires_grad_(False),
    "a layer replaced": lambda step: setattr(step.model, "linear", nn.Linear(4, 7)),
    "state loaded": _again,
    "empty state loaded": lambda step: step.load_state_dict({}),
    "no state loaded": lambda step: step.load_state_dict(None),  # type: ignore[arg-type]
    "epoch -1": lambda step: step.set_epoch(-1),
    "epoch nan": lambda step: step.set_epoch(math.nan),  # type: ignore[arg-type]
    "epoch text": lambda step: step.set_epoch("1"),  # type: ignore[arg-type]
    "epoch 10**30": lambda step: step.set_epoch(10**30),
    "threat text": lambda step: setattr(step, "threat", "l2"),
    "threat l2": lambda step: setattr(step, "threat", fastadv.Threat("l2", 0.3)),
    "no groups": lambda step: step.optimizer.param_groups.clear(),
    "rate nan": lambda step: step.optimizer.param_groups[0].update(lr=math.nan),
    "no gradient mode": lambda step: torch.set_grad_enabled(True),
}


def _attack(draw: random.Random) -> Generated:
    said: list[str] = ["attack"]
    name, make = _one(draw, MODELS, USUAL)
    said.append(f"model {name}")
    model = make()
    name, make_x = _one(draw, X, USUAL)
    said.append(f"x {name}")
    x = make_x()
    name, make_y = _one(draw, Y, USUAL)
    said.append(f"y {name}")
    y = make_y(_count(x))
    attack = draw.choice(ATTACKS)
    said.append(repr(attack))
    options: dict[str, Any] = {"name": attack} | _chosen(draw, ATTACK_OPTIONS, said)
    if draw.random() < 0.25:
        key = draw.choice(("start", "mask", "index", "eps"))
        name, make_one = draw.choice(list(COMPANION.items()))
        base = x if isinstance(x, Tensor) and x.dim() == 4 and not x.is_sparse else images()
        try:
            options[key] = make_one(base)
        except Exception:
            options[key] = make_one(images())
        said.append(f"{key} {name}")

    def run() -> str:
        found = fastadv.attack(model, x, y, **options)
        if not isinstance(found, Tensor) or found.shape != x.shape or found.dtype != x.dtype:
            return f"returned {type(found).__name__}, not images like x"
        if not bool(found.isfinite().all()):
            return "returned images that are not finite"
        threat = options.get("threat")
        if threat is None and bool((found < -1e-6).any() | (found > 1 + 1e-6).any()):
            return "left the box"
        norm = options.get("norm", "linf")
        eps = options.get("eps")
        noise = str(options["name"]).startswith("noise")
        if threat is None and eps is None and norm == "linf" and not noise:
            far = float((found.double() - x.double()).abs().max())
            if far > 8 / 255 + max(1e-6, torch.finfo(x.dtype).eps):
                return f"went {far:g} far, beyond eps"
        return ""

    return Generated("; ".join(said), run)


def _evaluate(draw: random.Random) -> Generated:
    said: list[str] = ["evaluate"]
    name, make = _one(draw, MODELS, USUAL)
    said.append(f"model {name}")
    model = make()
    batches: list[Any] = []
    for _ in range(draw.choice((0, 1, 1, 2, 2))):
        name, make_x = _one(draw, X, USUAL)
        x = make_x()
        name_y, make_y = _one(draw, Y, USUAL)
        said.append(f"x {name}, y {name_y}")
        batches.append((x, make_y(_count(x))))
    shape = draw.choice(("list", "list", "list", "one", "None", "triples", "text"))
    given: Any = {
        "list": batches,
        "one": batches[0] if batches else (),
        "None": None,
        "triples": [(*pair, 0) for pair in batches],
        "text": "batches",
    }[shape]
    said.append(f"batches as {shape}")
    attacks = draw.sample(ATTACKS, draw.choice((1, 1, 2)))
    said.append(repr(attacks))
    options: dict[str, Any] = {"attacks": attacks} | _chosen(draw, EVALUATE_OPTIONS, said)

    def run() -> str:
        found = fastadv.evaluate(model, given, **options)
        for name, value in found.items():
            if options.get("metric") is None and not 0 <= value <= 1:
                return f"{name} is {value}"
            if not math.isfinite(value):
                return f"{name} is {value}"
        return "" if found.n > 0 else "evaluated no image"

    return Generated("; ".join(said), run)


def _build(draw: random.Random) -> Generated:
    said: list[str] = ["build_model"]
    names = (
        "preact_resnet18",
        "resnet18",
        "wide_resnet34_10",
        "vgg16",
        "resnet",
        "a:b",
        "os:getcwd",
    )
    options: dict[str, Any] = {"name": draw.choice(names), "width": 2}
    said.append(options["name"])
    for _ in range(draw.choice((1, 1, 2))):
        name, value = draw.choice(BUILD_OPTIONS), draw.choice(list(VALUES))
        options[name] = VALUES[value]
        said.append(f"{name}={value}")

    def run() -> str:
        model = fastadv.build_model(**options)
        if not isinstance(model, nn.Module):
            return f"returned {model!r}"
        bad = [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]
        bad += [n for n, b in model.named_buffers() if not bool(b.isfinite().all())]
        return f"{bad[0]} is not finite" if bad else ""

    return Generated("; ".join(said), run)


def _saved(draw: random.Random) -> Generated:
    """States and files that are none."""
    said: list[str] = []
    value = draw.choice(list(VALUES))
    kind = draw.choice(("load_model", "load_state_dict", "a key of a state", "sanity"))
    said.append(f"{kind} {value}")
    method = draw.choice(METHODS)
    said.append(method)
    place = draw.random()
    option = draw.choice(
        ("eps", "norm", "threat", "limit", "other", "seed", "amp", "device", "output")
    )
    said.append(option)

    def run() -> str:
        if kind == "load_model":
            fastadv.load_model(VALUES[value])
            return "loaded"
        if kind == "sanity":
            fastadv.sanity(Net(), [(images(), labels())], **{option: VALUES[value]})
            return ""
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        step = fastadv.step(net, optimizer, method, mode="eager", num_samples=20)
        x, y, index = images(), labels(), torch.arange(4)
        second = torch.rand_like(x)
        step(x, y, index, second=second)
        if kind == "load_state_dict":
            step.load_state_dict(VALUES[value])
            return "" if VALUES[value] else "loaded"
        state = dict(step.state_dict())
        names = sorted(state)
        state[names[int(place * len(names))]] = VALUES[value]
        step.load_state_dict(state)
        step(x, y, index, second=second)
        step.check()
        return ""

    return Generated("; ".join(said), run)
