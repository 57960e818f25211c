"""What a search is: an iterative attack that is told what the network said and names its next
point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastadv.errors import UserError
from fastadv.threat import Threat

State = dict[str, Tensor]
"""Tensors (n,...), one row for each image of the batch."""


class Images(NamedTuple):
    """Images ``x`` (n,C,H,W) with labels ``y`` (n,), their rows ``index`` (n,) in the noise
    streams, and the ``logits`` (n,classes) of the images themselves."""

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # also a method of tuples
    logits: Tensor


class Seen(NamedTuple):
    """What a pass at the points of a state has shown.

    ``logits`` (n,classes). ``loss`` (n,): the objective there. ``gradient`` (n,C,H,W) of the
    objective; zeros where ``Search.wants_gradient`` is false and the pass saved it. ``wrong`` (n,)
    bool: the attack has succeeded at the point, if the point counts. ``logits`` and ``gradient``
    are in the type of the images. ``steep``: False if the pass took no gradient at all.
    """

    logits: Tensor
    loss: Tensor
    gradient: Tensor
    wrong: Tensor
    steep: bool = True


class Search(ABC):
    """An iterative attack: one state per image, and a batch of states at a time.

    The engine evaluates the network at ``state["point"]`` and calls ``tell``, until
    ``state["done"]`` or until the image is fooled. Images of a batch may be in different
    iterations, so every number of a state is per image, and nothing may depend on the other rows:
    random numbers are drawn by ``Images.index``. ``tell`` is tensor arithmetic alone: it reads no
    values, so that it can be recorded as a CUDA graph.

    ``segments``: runs per image, one after another until one succeeds (restarts, or targets).
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # what it computes, for ``fastadv attacks``
    uses_gradient: ClassVar[bool] = True
    default_steps: ClassVar[int] = 100
    default_segments: ClassVar[int] = 1
    numbers: ClassVar[tuple[str, str]] = ("STEPS", "RESTARTS")
    """What the numbers behind the name mean: ``apgd-ce-50-5``."""
    aims: ClassVar[bool] = False
    """True if segments are target classes, of which there are ``classes`` - 1 at most."""
    phases: ClassVar[tuple[bool, ...]] = (True,)
    """Whether a pass has a gradient, if these take turns. A run begins in the first phase, so that
    all images of a batch are in the same one."""
    takes_numbers: ClassVar[bool] = True  # False: its steps and runs are part of its name
    takes_targets: ClassVar[bool] = True  # False: no targeted threat
    last_alone: bool = False
    """True if the last point of a run alone counts; it is judged in the network's own precision."""
    around: ClassVar[str | None] = None
    """The name of a point of the state from which the next one often differs in a small window."""
    options: ClassVar[tuple[str, ...]] = ()  # further ones of ``fastadv.attack``
    remembers: tuple[str, ...] = ()
    """What of the state stays with an image in its further runs; ``start`` gives values for the
    first one only."""
    least_classes: ClassVar[int] = 2

    def __init__(
        self,
        threat: Threat,
        seed: int = 0,
        segments: int | None = None,
        steps: int | None = None,
    ) -> None:
        self.threat = threat
        self.seed = seed
        self.segments = self.default_segments if segments is None else segments
        self.steps = self.default_steps if steps is None else steps

    @classmethod
    def check(cls, threat: Threat, name: str) -> None:
        """Raise ``UserError`` unless the attack, called ``name``, can be made in ``threat``."""
        eps = threat.eps
        if isinstance(eps, tuple) or (isinstance(eps, Tensor) and eps.dim()) or threat.by_channel:
            what = "one eps and one range for all images and channels"
        elif threat.mask is not None:
            what = "no mask"
        elif threat.targeted and not cls.takes_targets:
            what = "no targets of yours: it aims at classes by itself"
        else:
            return
        raise UserError(f"The attack {name!r} takes {what}; use 'pgd-100-10' instead.")

    @classmethod
    def of(
        cls,
        threat: Threat,
        seed: int,
        classes: int,
        steps: int | None,
        segments: int | None,
        **options: Any,
    ) -> Search:
        """The attack on a network of ``classes`` with its own ``options``. Raises ``UserError`` if
        the classes are too few."""
        if classes < cls.least_classes:
            raise UserError(
                f"The attack {cls.name!r} needs at least {cls.least_classes} classes and the model "
                f"has {classes}; use 'apgd-ce' or 'apgd-ce+fab-t+square' instead."
            )
        if cls.aims:
            segments = min(cls.default_segments if segments is None else segments, classes - 1)
        return cls(threat, seed, segments, steps, **options)

    @abstractmethod
    def start(self, images: Images, segment: int) -> State:
        """The first state of run number ``segment`` for n images, with the ``point`` (n,C,H,W) of
        the first pass. The engine adds ``x``, ``y`` and ``index``."""

    def objective(self, logits: Tensor, state: State) -> Tensor:
        """What the gradient is taken of, (n,); it is summed over the images."""
        raise NotImplementedError(f"{type(self).__name__} has no objective")

    def objectives(self, logits: Tensor, state: State) -> Sequence[Tensor]:
        """One or more objectives, each (n,). A pass takes a gradient of each and keeps, for each
        image, the objective and the gradient with the smallest ``distance``."""
        return [self.objective(logits, state)]

    def distance(self, loss: Tensor, gradient: Tensor) -> Tensor:
        """(n,): of several ``objectives`` the nearest is kept."""
        raise NotImplementedError(f"{type(self).__name__} cannot choose between objectives")

    @abstractmethod
    def tell(self, state: State, seen: Seen) -> State:
        """The values that change: new tensors, or tensors of ``state`` as they are. ``done`` (n,)
        bool says which runs have ended at the point just seen."""

    def wants_gradient(self, state: State) -> Tensor | None:
        """(n,) bool: where the gradient at ``point`` is needed. None: everywhere. Where it is
        false a pass may leave the gradient out."""
        return None

    def goes_on(self, state: State) -> Tensor | None:
        """(n,) bool: at the end of a run without success, whether the image has another one. None:
        as long as there are ``segments``."""
        return None

    def counts(self, state: State) -> Tensor | None:
        """(n,) bool: whether ``point`` is a result of the attack: inside the threat, and not an
        intermediate point of an attack whose last point alone counts. None: everywhere."""
        return None

    def strength(self, seen: Seen, margin: Tensor) -> Tensor:
        """(n,): of several points that do not fool the network, the one with the largest strength
        is kept. ``margin`` is the logit of the label over the largest other one."""
        return -margin


def by_image(values: Tensor, x: Tensor) -> Tensor:
    """``values`` (n,) in a shape that broadcasts with images ``x`` (n,...)."""
    return values.view(-1, *[1] * (x.dim() - 1))


def choose(condition: Tensor, if_true: Tensor, if_false: Tensor) -> Tensor:
    """For each image the row of ``if_true`` or of ``if_false``; ``condition`` (n,) bool."""
    return torch.where(by_image(condition, if_true), if_true, if_false)


def at(values: Tensor, place: Tensor) -> Tensor:
    """``values`` (n,m) at ``place`` (n,) of each row, at the last one if it is beyond it."""
    return values.gather(1, place.clamp(0, values.shape[1] - 1)[:, None]).squeeze(1)
