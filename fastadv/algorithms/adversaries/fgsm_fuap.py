"""FGSM-FUAP: one step from a perturbation that images with like features share (Pan et al., AAAI
2024)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import field
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastadv import kernels
from fastadv.algorithms.adversaries.fgsm_uap import FGSMUAP
from fastadv.algorithms.contract import FORWARD, Batch, Capabilities, Context, Pass, Setup
from fastadv.algorithms.start_points import in_ball
from fastadv.declared import Count, option
from fastadv.engine.gradient import gradients, leaf
from fastadv.engine.noise import noise_stream
from fastadv.errors import UserError
from fastadv.threat import Threat

INITIAL = noise_stream("fgsm-fuap.initial")
GROUPER, UPDATES = "universal_grouper", "universal_updates"
# Adam with its defaults.
RATE, FIRST, SECOND, SMALL = 1e-3, 0.9, 0.999, 1e-8


class FGSMFUAP(FGSMUAP):
    """FGSM-UAP with u and m for each of ``universal_groups`` groups; x0 = box(ball(box(x + eta) +
    eps u)), eta uniform in the ball.

    The group of an image is the largest of A h + a, h the input of the network's classifier at
    box(x + eta), in the attack's mode of BatchNorm. A and a are learned in each update: by Adam
    (rate 0.001), from the attack's loss of the logits C relu(A h + a) + c
    (fzjcdt/FastAT_Benchmark, fast_at/fgsm_fuap.py). They begin as torch's linear layers do.
    """

    rank_local_state: ClassVar[tuple[str, ...]] = (*FGSMUAP.rank_local_state, GROUPER, UPDATES)
    hard_labels_only: ClassVar[str] = "its groups are learned from classes"

    universal_groups: Count = option(50, "groups of images that share a perturbation")

    classifier: nn.Linear = field(init=False, repr=False)

    def requires(self) -> frozenset[str]:
        return super().requires() | {"class_logits"}

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        return super().extra_passes(method) + Counter({Pass(FORWARD, self.attack_bn): 1})

    def check_threat(self, threat: Threat) -> None:
        super().check_threat(threat)
        if threat.targeted:
            raise UserError("FGSM-FUAP groups images by their own class: it cannot aim at another.")

    def groups(self) -> int:
        return self.universal_groups

    def prepare(self, setup: Setup) -> None:
        self.classifier = classifier_of(setup.net.model, setup.num_classes)
        super().prepare(setup)

    def follow_model(self) -> None:
        self.classifier = classifier_of(self.net.model, self.setup.num_classes)

    def schedule(self, update: int, epoch: float) -> None:
        super().schedule(update, epoch)
        if self.state[GROUPER].shape[1] != sum(rows * (into + 1) for rows, into in self._layers()):
            self._make_room()

    def _layers(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Outputs and inputs of the two layers, A and C."""
        groups = self.universal_groups
        return (groups, self.classifier.in_features), (self.setup.num_classes, groups)

    def _make_room(self) -> None:
        super()._make_room()
        setup, parts = self.setup, []
        row = torch.zeros(1, dtype=torch.int64, device=setup.device)
        for number, (rows, into) in enumerate(self._layers()):
            key = (setup.seed, INITIAL.shift + number, INITIAL.number)
            drawn = kernels.noise_uniform(row, (rows * (into + 1),), *key, setup.dtype)
            parts.append(drawn[0] / sqrt(into))
        weights = torch.cat(parts)
        # The weights of both layers, and Adam's two averages of their gradients.
        self.state[GROUPER] = torch.stack([weights, 0 * weights, 0 * weights])
        self.state[UPDATES] = torch.zeros((), dtype=setup.dtype, device=setup.device)

    def assigned(self, batch: Batch, context: Context) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        noisy = in_ball(batch, self.setup)
        features = self._features(noisy)
        group, *others = self.net.run(
            self._learned, features, self.state[GROUPER], self.state[UPDATES], batch, context
        )
        return group, noisy, tuple(others)

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        """What enters the classifier (B,features) at images ``x`` (B,C,H,W)."""
        seen: list[Tensor] = []
        hook = self.classifier.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            with self.net.as_written():
                self.net.logits(x)
        finally:
            hook.remove()
        return self.net.all_rows(seen[-1].flatten(1), len(x)).to(x.dtype)

    def _learned(
        self, features: Tensor, grouper: Tensor, updates: Tensor, batch: Batch, context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The groups (B,), and the state of the two layers after their update; a region."""
        weights = leaf(grouper[0])
        a, bias_a, c, bias_c = self._split(weights)
        scores = features @ a.t() + bias_a
        logits = scores.relu() @ c.t() + bias_c
        loss = self.setup.attack_loss(logits, batch.y, context)
        slope = gradients(loss / self.net.loss_scale(len(features)), [weights])[0]
        count = updates + 1
        first = torch.lerp(slope, grouper[1], FIRST)
        second = torch.lerp(slope.square(), grouper[2], SECOND)
        length = (second / (1 - SECOND**count)).sqrt() + SMALL
        later = grouper[0] - RATE * first / (1 - FIRST**count) / length
        return scores.argmax(1), torch.stack([later, first, second]), count

    def _split(self, weights: Tensor) -> Iterator[Tensor]:
        """A (groups,features), a, C (classes,groups) and c."""
        begin = 0
        for rows, into in self._layers():
            end = begin + rows * into
            yield weights[begin:end].view(rows, into)
            begin = end + rows
            yield weights[end:begin]


def classifier_of(model: nn.Module, classes: int) -> nn.Linear:
    """The last linear layer with ``classes`` outputs. Raises ``UserError`` if there is none."""
    found = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not found:
        raise UserError(
            "FGSM-FUAP groups images by what enters the network's last linear layer, and this "
            "model has none with an output per class: take 'fgsm-cuap'."
        )
    return found[-1]
