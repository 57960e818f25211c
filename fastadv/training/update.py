"""The order in which the parts of a recipe act on one batch.

1. ``compute_gradients``: the adversary makes x_adv with the parameters frozen; the weights part
   perturbs the weights; objective, target and regularizer give one scalar and one backward.
2. ``apply_gradients``: the optimizer steps.
3. ``finish_update``: the weights are restored, and parts with state update it from tensors that
   are already computed.

The first and the last are straight tensor code, which can be captured. Noise is drawn by the
number of the update.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.adversaries.weaken import perturbation_factor, weakened
from fastadv.algorithms.attack_loss import AttackLoss
from fastadv.algorithms.contract import (
    Adversarial,
    Batch,
    Gradients,
    Intermediates,
    Losses,
    Outputs,
    Regularizer,
)
from fastadv.algorithms.plan import Plan
from fastadv.engine import noise
from fastadv.engine.gradient import leaf
from fastadv.engine.model import parameter_hooks
from fastadv.engine.model.bn_momentum import ADVERSARIAL, NATURAL
from fastadv.engine.model.buffers import Snapshot
from fastadv.engine.model.network import Network
from fastadv.engine.optimizer.faults import Fault, all_finite
from fastadv.engine.optimizer.replayed import ReplayedUpdate
from fastadv.engine.optimizer.updater import Updater
from fastadv.engine.process import distributed
from fastadv.threat import Threat
from fastadv.training.still import Still


class PassResults(NamedTuple):
    """What the passes of one update computed, before the optimizer steps.

    ``loss`` and ``accuracy`` are 0-dim. ``gradients`` are multiplied by the loss scale. ``faults``
    (0-dim bool) say which reasons there are that the update must not count. ``buffers`` are the
    model's before the update; ``statistics`` those after the passes, which several processes
    average.
    """

    batch: Batch
    attacked: Adversarial
    outputs: Outputs
    loss: Tensor
    accuracy: Tensor
    gradients: Gradients
    faults: dict[Fault, Tensor]
    buffers: Snapshot
    statistics: list[Tensor]


class OuterPass(NamedTuple):
    """What the outer pass computes: the 0-dim loss, its gradients, and the logits; detached."""

    loss: Tensor
    gradients: Gradients
    outputs: Outputs


class Update:
    """The passes of one update of ``plan`` on ``net``."""

    def __init__(self, plan: Plan, net: Network, threat: Threat, seed: int) -> None:
        self.plan, self.net, self.threat, self.seed = plan, net, threat, seed
        self.attack_loss = AttackLoss(plan, net)
        self.scale = torch.ones((), device=net.device)  # of the outer loss, filled in place
        self.named: dict[str, Tensor] = {}  # the model's parameters
        self._learns: set[str] = set()
        self.room = 0  # rows of memory about samples that each process sends
        self._finite: list[Tensor] = []  # 0-dim bool, one per weight direction of this update
        self.still = Still(net.device)
        self.follow()

    def follow(self) -> None:
        """The parameters are those of the model of this moment."""
        self.named = dict(self.net.structure.parameters)
        self._learns = {name for name in self.named if self.plan.layers.learns(name)}

    def compute_gradients(self, batch: Batch, buffers: Snapshot | None = None) -> PassResults:
        """Attack, perturb the weights, and take the outer pass's gradients. ``buffers`` are the
        model's of this moment, where the caller has copied them already."""
        buffers = buffers or Snapshot(self.net.kept_buffers)
        self._finite = []
        self.net.copies.invalidate()
        intermediates = self.plan.target.prepare_batch(batch, self._natural_logits(batch))
        center = self._joint_center(batch)
        if center is not None:
            with self.net.training():
                attacked, outer = self.net.run(
                    self._joint, batch, center, intermediates, self.scale
                )
        else:
            attacked = self._attack(batch, intermediates)
            self._perturb(batch, attacked)
            with self.net.training():
                outer = self.net.run(self._outer, batch, attacked, self.scale)
        loss, gradients, outputs = outer
        gradients = gradients._replace(
            weights=parameter_hooks.through(list(self.trainable().values()), gradients.weights)
        )
        accuracy = (outputs.adversarial.argmax(1) == batch.y).float().mean()
        faults = self._faults(attacked, gradients, buffers)
        statistics = []
        if distributed.world_size() > 1:
            statistics = [each for each in self.net.buffers if each.is_floating_point()]
        return PassResults(
            batch, attacked, outputs, loss, accuracy, gradients, faults, buffers, statistics
        )

    def _faults(
        self, attacked: Adversarial, gradients: Gradients, buffers: Snapshot
    ) -> dict[Fault, Tensor]:
        """The reasons why the update must not count although its loss may be finite."""
        # A step along a gradient that is not finite leads to NaN, which a network may hide.
        neighbor = attacked.intermediates.neighbor_adv
        images = [attacked.x_adv, *([neighbor] if neighbor is not None else [])]
        faults = {Fault.ATTACK: ~all_finite(images)}
        present = [each for each in (*gradients.leaves, gradients.x_adv) if each is not None]
        if present:
            faults[Fault.INPUT_GRADIENT] = ~all_finite(present)
        spoilt = buffers.spoilt()
        if spoilt is not None:
            faults[Fault.STATISTICS] = spoilt
        if self._finite:
            faults[Fault.DIRECTION] = ~torch.stack(self._finite).all()
        return faults

    def apply_gradients(
        self, results: PassResults, updater: Updater | ReplayedUpdate, number: Tensor, update: bool
    ) -> tuple[Tensor, Tensor]:
        """Hand the gradients to the optimizer: their norm, and whether the update counted."""
        trainable, gradients = self.trainable(), results.gradients.weights
        self.plan.layers.before_update(updater.optimizer, list(trainable), gradients)
        return updater(
            list(trainable.values()),
            gradients,
            results.loss,
            number,
            results.faults,
            images=len(results.batch.x),
            update=update,
        )

    @torch.no_grad()
    def finish_update(self, results: PassResults, ok: Tensor, update: bool) -> None:
        """After the optimizer: weights restored, state updated where ``ok``, else buffers back."""
        plan, batch, attacked = self.plan, results.batch, results.attacked
        if plan.weights is not None:
            weights = list(self._perturbed().values())
            if weights:
                plan.weights.restore(weights)
        plan.adversary.after(batch, attacked, self._unscaled(results.gradients), ok)
        plan.target.after(batch, results.outputs, ok)
        unmoved = plan.adversary.unmoved(attacked)
        if unmoved is not None:
            self.still.add(unmoved)
        self._share_rows(batch.index)
        if plan.averaging is not None and update:
            plan.averaging.update(self.named, ok)
        if not self.net.syncs_are_free:
            results.buffers.put_back_unless(ok)
        elif not ok:
            results.buffers.put_back()

    def _unscaled(self, gradients: Gradients) -> Gradients:
        """The adversary's gradients without the loss scale; it does not look at the weights'."""
        leaves = [g if g is None else g / self.scale.to(g.dtype) for g in gradients.leaves]
        x_adv = gradients.x_adv
        if x_adv is not None:
            x_adv = x_adv / self.scale.to(x_adv.dtype)
        return Gradients([], leaves, x_adv)

    def _share_rows(self, index: Tensor) -> None:
        """What every process remembers about the samples of the others' batches."""
        if distributed.world_size() == 1:
            return
        for part in self.plan.parts.values():
            stores = [part.state[name] for name in part.sample_state() if name in part.state]
            distributed.share_rows(stores, index, self.room)

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that the user lets learn and the recipe does not freeze, by name."""
        return {
            name: parameter
            for name, parameter in self.named.items()
            if parameter.requires_grad and name in self._learns
        }

    def _natural_logits(self, batch: Batch) -> Intermediates:
        """The logits of the unattacked images that parts need before the attack."""
        wants, attack_bn = self.plan.wants, self.plan.adversary.attack_bn
        in_eval = in_attack = None
        if wants("natural_logits_eval"):
            in_eval = self._logits_in(batch.x, "eval")
        if wants("natural_logits_attack"):
            same = in_eval is not None and attack_bn == "eval"
            in_attack = in_eval if same else self._logits_in(batch.x, attack_bn)
        return Intermediates(natural_logits_eval=in_eval, natural_logits_attack=in_attack)

    def _logits_in(self, x: Tensor, bn: str) -> Tensor:
        with self.net.attacking(bn):
            logits: Tensor = self.net.run(self._natural, x)
        return logits

    def _attack(self, batch: Batch, intermediates: Intermediates) -> Adversarial:
        """The adversary's example, and what else is computed with it before the outer pass."""
        plan = self.plan
        with self.net.attacking(plan.adversary.attack_bn):
            attacked = plan.adversary.make(batch, intermediates)
            known = attacked.intermediates._replace(
                perturbation_factor=perturbation_factor(plan.adversary, batch, self.seed)
            )
            regularizer = plan.regularizer
            if regularizer is not None and regularizer.wants_neighbor:
                known = known._replace(neighbor_adv=self._neighbor(batch, known, regularizer))
        attacked = attacked._replace(intermediates=known)
        if "teacher_logits" in plan.needs:
            taught_on = self._weakened(attacked.x_adv, attacked)
            known = known._replace(teacher_logits=self.net.run(plan.target.teach, taught_on))
        return attacked._replace(intermediates=known)

    def _joint_center(self, batch: Batch) -> Tensor | None:
        """The centre of the ball, where one forward pass serves the attack and the outer pass."""
        alike = self.net.attack_dtype == self.net.outer_dtype
        alike = alike and self.net.one_pass_suffices(self.plan.objective.passes())
        return (
            self.plan.adversary.joint_center(batch)
            if self.plan.shares_natural_forward and alike
            else None
        )

    def _neighbor(
        self, batch: Batch, intermediates: Intermediates, regularizer: Regularizer
    ) -> Tensor:
        """The adversarial example (B,C,H,W) of the regularizer's second image."""
        images = regularizer.neighbor(batch)
        near = batch._replace(x=images, offset=batch.offset + noise.NEIGHBOR)
        if "natural_logits_attack" in self.plan.needs:
            logits = self.net.run(self._natural, images)
            intermediates = intermediates._replace(natural_logits_attack=logits)
        return self.plan.adversary.make(near, intermediates).x_adv

    def _natural(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net.logits(x)

    def _outputs(
        self,
        attacked: Adversarial,
        x_adv: Tensor,
        block_noise: list[Tensor] | None,
        needs: frozenset[str],
    ) -> Outputs:
        known = attacked.intermediates
        if "natural_logits_train" not in needs:
            return Outputs(self.net.logits(x_adv, block_noise), None, known)
        passes = self.plan.objective.passes()
        natural, adversarial = self.net.forwards(passes, attacked.center, x_adv, block_noise)
        return Outputs(adversarial, natural, known)

    def _losses(self, outputs: Outputs, y: Tensor) -> Tensor:
        """The objective and the target's penalty, per sample (B,)."""
        plan = self.plan
        losses = plan.objective.per_sample(outputs, y, plan.target.fit)
        fitted = outputs.adversarial
        if plan.objective.fits == "natural" and outputs.natural is not None:
            fitted = outputs.natural
        penalty = plan.target.penalty(fitted, outputs.adversarial, outputs.intermediates)
        return losses if penalty is None else losses + penalty

    def _outer(self, batch: Batch, attacked: Adversarial, scale: Tensor) -> OuterPass:
        """The outer pass; a region."""
        adversary = self.plan.adversary
        leaves = [leaf(tensor) for tensor in adversary.leaves()]
        x_adv, block_noise = adversary.outer_input(batch, attacked, leaves)
        regularizer = self.plan.regularizer
        wanted = adversary.wants_input_gradient
        if regularizer is not None:
            wanted = wanted or regularizer.wants_adversarial_gradient
            if regularizer.wants_center_gradient:
                attacked = attacked._replace(center=leaf(attacked.center))
        if wanted and not x_adv.requires_grad:
            x_adv = leaf(x_adv)
        trained_on = self._weakened(x_adv, attacked)
        outputs = self._outputs(attacked, trained_on, block_noise, self.plan.needs)
        differentiated = x_adv if adversary.wants_input_gradient else None
        return self._loss_and_gradients(
            batch, attacked, trained_on, outputs, leaves, differentiated, scale
        )

    def _joint(
        self, batch: Batch, center: Tensor, intermediates: Intermediates, scale: Tensor
    ) -> tuple[Adversarial, OuterPass]:
        """A one-step attack and the outer pass over one forward of the centre; a region."""
        adversary = self.plan.adversary
        known = intermediates._replace(
            perturbation_factor=perturbation_factor(adversary, batch, self.seed)
        )
        center = leaf(center)
        passes = self.plan.objective.passes()
        with self.net.bn_updates_as(passes, NATURAL):
            natural = self.net.logits(center)
        x_adv = adversary.joint_step(center, natural, batch.y, known)
        attacked = Adversarial(x_adv, center.detach(), known, center.detach())
        trained_on = self._weakened(x_adv, attacked)
        with self.net.bn_updates_as(passes, ADVERSARIAL):
            adversarial = self.net.logits(trained_on)
        outputs = Outputs(adversarial, natural, known)
        outer = self._loss_and_gradients(batch, attacked, trained_on, outputs, [], None, scale)
        return attacked, outer

    def _loss_and_gradients(
        self,
        batch: Batch,
        attacked: Adversarial,
        trained_on: Tensor,
        outputs: Outputs,
        leaves: list[Tensor],
        x_adv: Tensor | None,
        scale: Tensor,
    ) -> OuterPass:
        """The outer loss of ``outputs`` and its gradients at the weights, at the adversary's
        ``leaves`` and at ``x_adv``."""
        loss = self._losses(outputs, batch.y).mean()
        regularizer = self.plan.regularizer
        if regularizer is not None:
            term = regularizer.term(batch, attacked, trained_on, outputs)
            loss = loss + regularizer.weight() * term
        weights = self.trainable()
        others = leaves if x_adv is None else [*leaves, x_adv]
        flat = self.net.gradients(loss * scale.to(loss.dtype), weights, others)
        count = len(weights)
        gradients = Gradients(
            flat[:count],
            flat[count : count + len(leaves)],
            None if x_adv is None else flat[-1],
        )
        natural = None if outputs.natural is None else outputs.natural.detach()
        outputs = Outputs(outputs.adversarial.detach(), natural, outputs.intermediates)
        return OuterPass(loss.detach(), gradients, outputs)

    def _weakened(self, x_adv: Tensor, attacked: Adversarial) -> Tensor:
        factor = attacked.intermediates.perturbation_factor
        return weakened(x_adv, attacked.center, factor, self.threat.low, self.threat.high)

    # -- perturbed weights --------------------------------------------------------------------

    def _perturbed(self) -> dict[str, Tensor]:
        """The weights that are moved: of those the part selects, the ones the user lets learn."""
        weights = self.plan.weights
        if weights is None or not weights.active:
            return {}
        names, tensors = list(self.named), list(self.named.values())
        selected = [(names[place], tensors[place]) for place in weights.select(names, tensors)]
        return {name: tensor for name, tensor in selected if tensor.requires_grad}

    def _perturb(self, batch: Batch, attacked: Adversarial) -> None:
        """Move the weights to where the outer pass is taken."""
        weights = self._perturbed()
        if weights and self.plan.weights is not None:
            self.plan.weights.perturb(
                list(weights.values()), lambda: self._direction(batch, attacked, weights)
            )
            self.net.copies.invalidate()

    def _direction(
        self, batch: Batch, attacked: Adversarial, weights: dict[str, Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of the weights part's own loss at the present weights, which it then moves."""
        # float16 flushes a small gradient to zero, unless the loss is large.
        scale = self.scale if self.net.outer_dtype is torch.float16 else None
        with self.net.training(), self.net.keeping_buffers():
            gradients, taken = self.net.run(self._weight_gradient, batch, attacked, scale)
        self.net.copies.invalidate()
        count = taken.to(torch.float32)
        directions = [
            torch.zeros_like(weight) if gradient is None else gradient
            for gradient, weight in zip(gradients, weights.values(), strict=True)
        ]
        if scale is not None:
            torch._foreach_div_(directions, scale)
        distributed.average([*directions, count])
        self._finite.append(all_finite(directions))
        return directions, count

    def _weight_gradient(
        self, batch: Batch, attacked: Adversarial, scale: Tensor | None
    ) -> tuple[list[Tensor | None], Tensor]:
        """A region."""
        part = self.plan.weights
        if part is None:
            raise RuntimeError("this recipe perturbs no weights")
        with torch.enable_grad():
            leaves = [tensor.detach() for tensor in self.plan.adversary.leaves()]
            x_adv, block_noise = self.plan.adversary.outer_input(batch, attacked, leaves)
            trained_on = self._weakened(x_adv.detach(), attacked)
            # The direction is that of the objective; what only a regularizer compares is not in it.
            needs = self.plan.objective.requires()
            outputs = self._outputs(attacked, trained_on, block_noise, needs)
            adversarial = functional.cross_entropy(outputs.adversarial, batch.y, reduction="none")
            plain = self.plan.objective.is_plain() and self.plan.target.is_plain()
            total = self._losses(outputs, batch.y)
            loss, count = part.reduce(
                Losses(total, adversarial, outputs.adversarial, batch.y, plain)
            )
            if scale is not None:
                loss = loss * scale.to(loss.dtype)
            return self.net.gradients(loss, self._perturbed()), count
