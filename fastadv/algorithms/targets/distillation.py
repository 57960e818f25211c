"""KD: the student fits the labels and two teachers (Chen et al., 2021; KD-SWA, KDSA)."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from os import PathLike
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastadv.algorithms.contract import (
    FORWARD,
    Capabilities,
    Context,
    Pass,
    Setup,
    Target,
)
from fastadv.declared import NonNegative, Positive, SavedNetworks, option
from fastadv.errors import UserError, brief
from fastadv.storage.digests import digest


def soft_ce(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 * cross entropy (B,) of softmax(student/T) with softmax(teacher/T), both (B,classes).

    It differs from T^2 KL(teacher || student) by T^2 times the teacher's entropy, a constant.
    """
    taught = (teacher / temperature).softmax(1)
    return -(temperature**2) * (taught * (student / temperature).log_softmax(1)).sum(1)


def _are_teachers(given: Any) -> bool:
    if given is None:
        return True
    named = isinstance(given, Iterable) and not isinstance(given, (Tensor, nn.Module, Mapping))
    return named and all(isinstance(one, (nn.Module, str, PathLike)) for one in given)


class Distillation(Target):
    """w_0 CE(z', y) + w_1 KD(t_1, z') + w_2 KD(t_2, z'), t_k the teachers' logits on the same x'.

    ``teachers`` are a standard and a robust network, as modules (``fastadv.load_model`` reads one
    from a run folder). ``fastadv train`` takes paths of run folders or weight files, separated by
    commas. ``kd_weights`` are w_0 and one weight per teacher. KD is ``soft_ce`` at ``temperature``.

    An objective that fits f(x), such as TRADES, fits it to the teachers' predictions for x: every
    logits z' are taught on their own image.

    Teachers run in eval mode without gradients on the student's x'; only the student is attacked
    (VITA-Group/Alleviate-Robust-Overfitting). The modules stay changed: in eval mode, frozen, on
    the model's device and in the type of its images.
    """

    teachers: Annotated[str | Sequence[nn.Module | str] | None, SavedNetworks()] = option(
        None, "run folders or weight files of the teachers, separated by commas"
    )
    kd_weights: tuple[NonNegative, ...] = option(
        (0.3, 0.1, 0.6), "weight of the hard label, then one per teacher"
    )
    temperature: Positive = option(2.0, "temperature of the distilled predictions")

    _modules: list[nn.Module] = field(init=False, repr=False, default_factory=list)

    def requires(self) -> frozenset[str]:
        return frozenset({"teacher_logits"})

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        # A forward pass of a teacher counts as one of the network.
        count = len(self.kd_weights) - 1
        return Counter({Pass(FORWARD, "eval"): count * len(method.fits)})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.teachers, str):
            self.teachers = [path.strip() for path in self.teachers.split(",")]
        if not _are_teachers(self.teachers):
            raise UserError(
                "teachers are networks, run folders or weight files, such as "
                f"teachers=[standard, robust], not {brief(self.teachers)}."
            )
        if not any(self.kd_weights):
            raise UserError("kd_weights are all 0, so the loss is 0: make one of them positive.")
        if self.teachers and len(self.kd_weights) != len(self.teachers) + 1:
            raise UserError(
                f"kd_weights must hold {len(self.teachers) + 1} numbers, the label's and one per "
                f"teacher, not {len(self.kd_weights)}."
            )

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        if not self.teachers:
            raise UserError(
                "Distillation needs its teachers: pass teachers=, first a standard network, then "
                "a robust one (fastadv train: paths of run folders)."
            )
        for teacher in self.teachers:
            if not isinstance(teacher, nn.Module):
                raise UserError(
                    f"teachers are networks here, not paths: pass teachers=[fastadv.load_model("
                    f"{str(teacher)!r}), ...]."
                )
            self._modules.append(teacher.to(setup.device, setup.dtype).eval().requires_grad_(False))

    # See ``Teaches``.

    def networks(self) -> Sequence[nn.Module]:
        return self._modules

    def depends_on(self) -> dict[str, str]:
        return {
            f"teacher {n}": digest(dict(teacher.state_dict()))
            for n, teacher in enumerate(self.teachers or (), start=1)
            if isinstance(teacher, nn.Module)
        }

    def teach(self, x: Tensor) -> Tensor:
        logits = [self.net.logits_of(teacher, x) for teacher in self._modules]
        return torch.stack(logits)

    def fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        taught = context.teacher_logits
        if taught is None:
            raise UserError(
                "The teachers predict for the attacked images, which the attack has yet to find: "
                "take another attack_loss, such as ce."
            )
        loss = self.kd_weights[0] * functional.cross_entropy(logits, y, reduction="none")
        for teacher, weight in zip(taught, self.kd_weights[1:], strict=True):
            loss = loss + weight * soft_ce(teacher.to(logits.dtype), logits, self.temperature)
        return loss
