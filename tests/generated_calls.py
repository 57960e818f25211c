"""Calls of the Python API with arguments drawn at random, most of them wrong.

A call is right, or ends in one sentence (``UserError``, ``TrainingError``): ``outcome`` says what
happened to it. Each call is drawn from a number, so that one that failed can be made again.
"""

from __future__ import annotations

import io
import math
import random
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastadv
from fastadv.errors import TrainingError, UserError

CLASSES = 4
USUAL = 0.94  # probability of what is right
SLOW = 30.0  # seconds; a call that takes longer is called a hang
SENTENCE = 1200  # the most characters of one sentence


class Net(nn.Module):
    """(B,C,H,W) to (B,4)."""

    def __init__(self, norm: bool = True, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.conv(x)).relu().mean((2, 3)))


class Returning(nn.Module):
    """A network that gives what ``change`` makes of its logits."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.change = Net(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


class Raising(nn.Module):
    """A network whose own code fails."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("of the network's own")


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(CLASSES))


MODELS: dict[str, Callable[[], Any]] = {
    "a network": Net,
    "without BatchNorm": lambda: Net(norm=False),
    "of float64": lambda: Net().double(),
    "of bfloat16": lambda: Net().bfloat16(),
    "of float16": lambda: Net().half(),
    "in eval mode": lambda: Net().eval(),
    "frozen": lambda: Net().requires_grad_(False),
    "on meta": lambda: Net().to("meta"),
    "lazy": _lazy,
    "of one channel": lambda: Net(channels=1),
    "without parameters": nn.Identity,
    "of weights of NaN": lambda: _filled(Net(), math.nan),
    "of weights of inf": lambda: _filled(Net(), math.inf),
    "of weights of zero": lambda: _filled(Net(), 0.0),
    "with a tuple": lambda: Returning(lambda z: (z, z)),
    "with a list": lambda: Returning(lambda z: [z]),
    "with an empty tuple": lambda: Returning(lambda z: ()),
    "with a dict": lambda: Returning(lambda z: {"logits": z}),
    "with None": lambda: Returning(lambda z: None),
    "with a number": lambda: Returning(lambda z: 3.0),
    "with a text": lambda: Returning(lambda z: "logits"),
    "with detached logits": lambda: Returning(lambda z: z.detach()),
    "with half of the batch": lambda: Returning(lambda z: z[: len(z) // 2]),
    "with one logit": lambda: Returning(lambda z: z[:, :1]),
    "with a vector": lambda: Returning(lambda z: z[:, 0]),
    "with a scalar": lambda: Returning(lambda z: z.sum()),
    "with images": lambda: Returning(lambda z: z[:, :, None, None].expand(-1, -1, 2, 2)),
    "with integers": lambda: Returning(lambda z: z.long()),
    "with bools": lambda: Returning(lambda z: z > 0),
    "with complex logits": lambda: Returning(lambda z: z.to(torch.complex64)),
    "with NaN": lambda: Returning(lambda z: z * math.nan),
    "with inf": lambda: Returning(lambda z: z / 0),
    "with softmax": lambda: Returning(lambda z: z.softmax(1)),
    "with sparse logits": lambda: Returning(lambda z: z.to_sparse()),
    "with float64 logits": lambda: Returning(lambda z: z.double()),
    "raising": Raising,
    "a function": lambda: Net().forward,
    "a lambda": lambda: lambda x: x,
    "a text": lambda: "resnet18",
    "None": lambda: None,
    "a number": lambda: 3,
    "a class": lambda: Net,
    "a state_dict": lambda: Net().state_dict(),
    "a list of networks": lambda: [Net(), Net()],
}


def _filled(net: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def _images(count: int = 4, *shape: int) -> Tensor:
    return torch.rand(count, *(shape or (3, 6, 6)))


X: dict[str, Callable[[], Any]] = {
    "images": _images,
    "one image": lambda: _images(1),
    "many images": lambda: _images(9),
    "no image": lambda: _images(0),
    "images of no pixel": lambda: _images(4, 3, 0, 6),
    "larger images": lambda: _images(4, 3, 9, 7),
    "images of one pixel": lambda: _images(4, 3, 1, 1),
    "grey images": lambda: _images(4, 1, 6, 6),
    "an image without batch": lambda: torch.rand(3, 6, 6),
    "vectors": lambda: torch.rand(4, 3),
    "videos": lambda: torch.rand(4, 3, 2, 6, 6),
    "a number": lambda: torch.rand(()),
    "float64": lambda: _images().double(),
    "bfloat16": lambda: _images().bfloat16(),
    "float16": lambda: _images().half(),
    "uint8": lambda: (255 * _images()).byte(),
    "int64": lambda: _images().long(),
    "bool": lambda: _images() > 0.5,
    "complex": lambda: _images().to(torch.complex64),
    "of NaN": lambda: _images().fill_(math.nan),
    "with one NaN": lambda: _with(_images(), math.nan),
    "with one inf": lambda: _with(_images(), math.inf),
    "with -inf": lambda: _with(_images(), -math.inf),
    "in 255ths": lambda: 255 * _images(),
    "normalised": lambda: (_images() - 0.5) / 0.2,
    "below 0": lambda: -_images(),
    "constant": lambda: torch.zeros(4, 3, 6, 6),
    "with gradient": lambda: _images().requires_grad_(),
    "of a graph": lambda: _images().requires_grad_() * 1.0,
    "strided": lambda: torch.rand(4, 3, 12, 12)[:, :, ::2, ::2],
    "expanded": lambda: torch.rand(1, 3, 6, 6).expand(4, 3, 6, 6),
    "channels last": lambda: _images().to(memory_format=torch.channels_last),
    "sparse": lambda: _images().to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(_images(), 0.1, 0, torch.quint8),
    "on meta": lambda: _images().to("meta"),
    "a parameter": lambda: nn.Parameter(_images()),
    "made in inference mode": lambda: _inference(_images),
    "an array": lambda: _images().numpy(),
    "a list": lambda: [[0.5]],
    "None": lambda: None,
    "a text": lambda: "images",
    "float8": lambda: _images().to(torch.float8_e4m3fn),
    "nested": lambda: _nested(),
    "conjugated": lambda: _images().to(torch.complex64).conj(),
    "negated lazily": lambda: torch._neg_view(-_images()),
    "subclass": lambda: _images().as_subclass(Named),
}


class Named(Tensor):
    """A subclass that adds nothing."""


def _nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.rand(3, 6, 6), torch.rand(3, 5, 5)])


def _inference(make: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():
        return make()


def _with(x: Tensor, value: float) -> Tensor:
    x.view(-1)[7] = value
    return x


def _labels(count: int = 4) -> Tensor:
    return torch.arange(count) % CLASSES


Y: dict[str, Callable[[int], Any]] = {
    "labels": _labels,
    "too few": lambda n: _labels(max(n - 1, 0)),
    "too many": lambda n: _labels(n + 1),
    "int32": lambda n: _labels(n).int(),
    "uint8": lambda n: _labels(n).byte(),
    "bool": lambda n: _labels(n) > 1,
    "float": lambda n: _labels(n).float(),
    "column": lambda n: _labels(n)[:, None],
    "negative": lambda n: _labels(n) - 1,
    "too large": lambda n: _labels(n) + 2,
    "far too large": lambda n: _labels(n) + 2**40,
    "ignored -100": lambda n: _labels(n).fill_(-100),
    "one-hot": lambda n: nn.functional.one_hot(_labels(n), CLASSES),
    "one-hot float": lambda n: nn.functional.one_hot(_labels(n), CLASSES).float(),
    "soft": lambda n: torch.full((n, CLASSES), 1 / CLASSES),
    "soft of float64": lambda n: torch.full((n, CLASSES), 1 / CLASSES).double(),
    "soft of bfloat16": lambda n: torch.full((n, CLASSES), 1 / CLASSES).bfloat16(),
    "soft that do not sum to 1": lambda n: torch.ones(n, CLASSES),
    "soft with NaN": lambda n: torch.full((n, CLASSES), math.nan),
    "soft of more classes": lambda n: torch.full((n, CLASSES + 1), 1 / (CLASSES + 1)),
    "soft of one class": lambda n: torch.ones(n, 1),
    "soft with gradient": lambda n: torch.full((n, CLASSES), 1 / CLASSES).requires_grad_(),
    "masks": lambda n: torch.zeros(n, 6, 6).long(),
    "a number": lambda n: torch.tensor(1),
    "none": lambda n: None,
    "a list": lambda n: [0] * n,
    "on meta": lambda n: _labels(n).to("meta"),
    "complex": lambda n: _labels(n).to(torch.complex64),
    "made in inference mode": lambda n: _inference(lambda: _labels(n)),
}

INDEX: dict[str, Callable[[int], Any]] = {
    "rows": torch.arange,
    "none": lambda n: None,
    "int32": lambda n: torch.arange(n).int(),
    "float": lambda n: torch.arange(n).float(),
    "negative": lambda n: torch.arange(n) - 1,
    "beyond": lambda n: torch.arange(n) + 100,
    "far beyond": lambda n: torch.arange(n) + 2**60,
    "twice": lambda n: torch.zeros(n).long(),
    "too few": lambda n: torch.arange(max(n - 1, 0)),
    "a list": lambda n: list(range(n)),
    "a column": lambda n: torch.arange(n)[:, None],
    "bool": lambda n: torch.arange(n) > 1,
    "on meta": lambda n: torch.arange(n).to("meta"),
}

COMPANION: dict[str, Callable[[Any], Any]] = {
    "like x": lambda x: 0.01 * torch.rand_like(x),
    "of NaN": lambda x: torch.full_like(x, math.nan),
    "huge": lambda x: torch.full_like(x, 1e30),
    "of half the images": lambda x: torch.zeros_like(x)[: len(x) // 2],
    "of one image": lambda x: torch.zeros_like(x)[:1],
    "float64": lambda x: torch.zeros_like(x).double(),
    "int": lambda x: torch.zeros_like(x).long(),
    "bool": lambda x: torch.ones_like(x).bool(),
    "a number": lambda x: 0.1,
    "a text": lambda x: "8/255",
    "radii": lambda x: torch.full((len(x),), 0.05),
    "negative radii": lambda x: torch.full((len(x),), -0.05),
    "NaN radii": lambda x: torch.full((len(x),), math.nan),
    "int radii": lambda x: torch.zeros(len(x)).long(),
    "labels": lambda x: torch.zeros(len(x)).long(),
    "a mask": lambda x: torch.ones(1, 1, *x.shape[2:]).bool(),
    "a mask of another size": lambda x: torch.ones(1, 1, 2, 2).bool(),
    "an empty mask": lambda x: torch.zeros(1, 1, *x.shape[2:]).bool(),
    "complex": lambda x: torch.zeros_like(x).to(torch.complex64),
    "a list": lambda x: [0.1],
    "on meta": lambda x: torch.zeros_like(x).to("meta"),
    "a view": lambda x: fastadv.View(torch.zeros(len(x)).long(), *[torch.zeros(len(x)).long()] * 2),
}

VALUES: dict[str, Any] = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "3": 3,
    "2.5": 2.5,
    "0.0": 0.0,
    "-0.1": -0.1,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1e300": 1e300,
    "10**400": 10**400,
    "10**9": 10**9,
    "10**12": 10**12,
    "1e-300": 1e-300,
    "a text": "abc",
    "an empty text": "",
    "a fraction": "8/255",
    "0/0": "0/0",
    "a long text": "9" * 5000,
    "a list": [1, 2],
    "an empty list": [],
    "a tuple": (0.1,),
    "a dict": {"a": 1},
    "a set": {1},
    "bytes": b"8/255",
    "complex": 1 + 2j,
    "an object": object(),
    "a class": int,
    "a function": len,
    "a tensor": torch.tensor(0.1),
    "a tensor of ints": torch.tensor(3),
    "a vector": torch.tensor([0.1, 0.2]),
    "a tensor of NaN": torch.tensor(math.nan),
    "a module": nn.Identity(),
    "a device": torch.device("meta"),
    "a dtype": torch.float16,
    "cuda": "cuda",
    "markup": "[red]\x1b[31m\n",
    "a ramp": fastadv.Ramp(0, 0.1, epochs=2),
    "phases": fastadv.Phases({0: 0.1, 3: 0.2}),
    "a threat": fastadv.Threat("l2", 0.5),
    "l2": "l2",
}

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


class Outcome(NamedTuple):
    """``kind``: "good", "refused" or "wrong"."""

    kind: str
    said: str


def generated(number: int) -> Generated:
    """The call that belongs to ``number``."""
    draw = random.Random(number)
    makers = (_step, _step, _step, _attack, _attack, _evaluate, _build, _saved)
    return draw.choice(makers)(draw)


def outcome(call: Generated) -> Outcome:
    """Make the ``call``."""
    torch.manual_seed(0)
    began = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fault = call.run()
    except (UserError, TrainingError) as error:
        sentence = str(error)
        told = bool(sentence) and len(sentence) <= SENTENCE and "\n" not in sentence.strip()
        found = Outcome("refused" if told else "wrong", f"{type(error).__name__}: {sentence}")
    except TypeError as error:
        # What Python itself says of a call without an argument, or with an unknown one.
        python = "positional argument" in str(error) or "keyword argument" in str(error)
        found = Outcome("refused" if python else "wrong", f"TypeError: {error}")
    except ValueError as error:
        own = str(error) == "of the network's own"
        found = Outcome("refused" if own else "wrong", f"{type(error).__name__}: {error}")
    except Exception as error:
        found = Outcome("wrong", f"{type(error).__name__}: {error}")
    else:
        found = Outcome("wrong", fault) if fault else Outcome("good", "")
    seconds = time.monotonic() - began
    return found if seconds < SLOW else Outcome("wrong", f"took {seconds:.0f} s: {found.said}")


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
            base = x if isinstance(x, Tensor) and x.dim() == 4 and not x.is_sparse else _images()
            try:
                more[key] = make_one(base)
            except Exception:
                more[key] = make_one(_images())
            words.append(f"{key} {name}")
        between = draw.choice(list(CHANGES)) if draw.random() < 0.12 else None
        words.append(f"then {between}" if between else "")
        said.append(" ".join(words))
        calls.append((x, y, index, more, between))

    def run() -> str:
        step = fastadv.step(model, optimizer, **options)
        for x, y, index, more, between in calls:
            found = step(x, y, index, **more)
            fault = _fault_of_step(step, found)
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


def _fault_of_step(step: fastadv.Step, found: Any) -> str:
    if not isinstance(found, dict) or not {"loss"} <= found.keys():
        return f"returned {found!r}"
    if not step.healthy():
        return ""  # check() tells it
    for name, value in found.items():
        if not bool(value.isfinite()):
            return f"{name} is {float(value)}, and the step says it is healthy"
    if "accuracy" in found and not 0 <= float(found["accuracy"]) <= 1:
        return f"accuracy is {float(found['accuracy'])}"
    for name, weight in step.model.named_parameters():
        if not bool(weight.isfinite().all()):
            return f"{name} is not finite, and the step says it is healthy"
    return ""


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
        base = x if isinstance(x, Tensor) and x.dim() == 4 and not x.is_sparse else _images()
        try:
            options[key] = make_one(base)
        except Exception:
            options[key] = make_one(_images())
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
            fastadv.sanity(Net(), [(_images(), _labels())], **{option: VALUES[value]})
            return ""
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        step = fastadv.step(net, optimizer, method, mode="eager", num_samples=20)
        x, y, index = _images(), _labels(), torch.arange(4)
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
