"""HAT: images beyond x' get the label that a standard network has there (Rade and
Moosavi-Dezfooli, ICLR 2022)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import field
from os import PathLike
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastadv.algorithms.contract import (
    FORWARD,
    TRAINING,
    Adversarial,
    Batch,
    Capabilities,
    Conflict,
    Outputs,
    Pass,
    Regularizer,
    Setup,
    required,
)
from fastadv.declared import NonNegative, SavedNetworks, option
from fastadv.errors import UserError, brief
from fastadv.storage.digests import digest


class Helper(Regularizer):
    """mean_i CE(f(x + h (x' - x)), argmax t(x')), t the ``helper``, h ``helper_scale``.

    The helper is a network of standard training, which mostly predicts another class at x' than at
    x. f learns to predict that class, too, but only beyond x'. The helper is a module
    (``fastadv.load_model`` reads one from a run folder); ``fastadv train`` takes the path of a run
    folder or of a weight file. It runs in eval mode without gradients, and stays so. The image
    beyond x' is not clipped (imrahulr/hat).
    """

    reg_weight: NonNegative = option(0.5, "weight of the regularizer in the loss")
    helper: Annotated[str | nn.Module | Sequence[nn.Module | str] | None, SavedNetworks()] = option(
        None, "run folder or weight file of a network of standard training"
    )
    helper_scale: NonNegative = option(
        2.0, "length of the helper's perturbation, in units of the attack's"
    )

    _modules: list[nn.Module] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.helper
        if given is not None:
            listed: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
            if len(listed) != 1 or not isinstance(listed[0], (nn.Module, str, PathLike)):
                raise UserError(
                    f"helper is one network, run folder or weight file, not {brief(given)}."
                )
            self.helper = listed

    def _given(self) -> Sequence[nn.Module | str]:
        return self.helper if isinstance(self.helper, list) else []

    def requires(self) -> frozenset[str]:
        return frozenset({"teacher_logits"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.attacks:
            yield Conflict("adversary", "without an attack x' = x and there is nothing beyond it.")

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        # A forward pass of the helper counts as one of the network.
        return Counter({Pass(FORWARD, "eval"): 1, Pass(TRAINING, "train"): 1})

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        for network in self._given():
            if not isinstance(network, nn.Module):
                raise UserError(
                    f"helper is a network here, not a path: pass helper=fastadv.load_model("
                    f"{str(network)!r})."
                )
            taken = network.to(setup.device, setup.dtype).eval().requires_grad_(False)
            self._modules.append(taken)
        if not self._modules:
            raise UserError(
                "HAT needs its helper: pass helper=, a network of standard training (fastadv "
                "train: the path of its run folder)."
            )

    # See ``Teaches``.

    def networks(self) -> Sequence[nn.Module]:
        return self._modules

    def depends_on(self) -> dict[str, str]:
        return {
            f"helper {n}": digest(dict(network.state_dict()))
            for n, network in enumerate(self._given(), start=1)
            if isinstance(network, nn.Module)
        }

    def teach(self, x_adv: Tensor) -> Tensor:
        return torch.stack([self.net.logits_of(network, x_adv) for network in self._modules])

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        beyond = torch.lerp(attacked.center, x_adv, self.helper_scale)
        labels = required(outputs.context.teacher_logits)[0].argmax(1)
        return functional.cross_entropy(self.net.logits(beyond), labels)
