"""One update: the order in which the parts of a recipe act on one batch.

``compute_gradients``: the adversary makes x_adv with frozen parameters; the weights part perturbs
the weights; objective, target and regularizer give one scalar, which one backward pass
differentiates. Noise is drawn by the number of the update. ``apply_gradients``: the optimizer
steps. ``finish_update``: the perturbation of the weights is subtracted, and parts update their
state from the tensors computed before. The first and the last only launch tensor operations, so
they can be captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastadv import kernels
from fastadv.algorithms.adversaries.weaken import weakened, weakening
from fastadv.algorithms.contract import (
    Adversarial,
    Batch,
    Context,
    Losses,
    Outputs,
    required,
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
from fastadv.training.results import Gradients, OuterPass, PassResults
from fastadv.training.still import Still


class Update:
    """The passes of one update of ``plan`` on ``net``."""

    def __init__(self, plan: Plan, net: Network, threat: Threat, seed: int) -> None:
        self.plan, self.net, self.threat, self.seed = plan, net, threat, seed
        self.scale = torch.ones((), device=net.device)  # loss scale, filled in place
        self.named: dict[str, Tensor] = {}  # name -> parameter of the present model
        self._learns: set[str] = set()
        self.room = 0  # most rows of per-sample state that each process sends
        self._directions: list[Tensor] = []  # 0-dim bool per direction of this update: is it finite
        self.still = Still(net.device)
        self.follow()

    def follow(self) -> None:
        """Take over the parameters of the present model."""
        self.named = dict(self.net.structure.parameters)
        self._learns = {name for name in self.named if self.plan.layers.learns(name)}

    def compute_gradients(self, batch: Batch, buffers: Snapshot | None = None) -> PassResults:
        """Attack, perturb the weights, and compute the gradients of the outer pass. ``buffers`` is
        a copy of the model's present buffers, if the caller has one."""
        plan = self.plan
        buffers = buffers or Snapshot(self.net.kept_buffers)
        self._directions = []
        self.net.copies.invalidate()
        context = plan.target.prepare_batch(batch, self._natural_logits(batch))
        center = self._joint_center(batch)
        if center is not None:
            with self.net.training():
                x_adv, factor, outer = self.net.run(self._joint, batch, center, context, self.scale)
            context = context._replace(weakening=factor)
            attacked = Adversarial(x_adv, center, context, center)
        else:
            attacked = self._attack(batch, context)
            weights = self._perturbed()
            if weights and plan.weights is not None:
                plan.weights.perturb(
                    list(weights.values()), lambda: self._direction(batch, attacked, weights)
                )
                self.net.copies.invalidate()
            with self.net.training():
                outer = self.net.run(self._outer, batch, attacked, self.scale)
        loss, gradients, adversarial, natural = outer
        outputs = Outputs(adversarial, natural, attacked.context)
        accuracy = (outputs.adversarial.argmax(1) == batch.y).float().mean()
        hooked = parameter_hooks.through(self.learning(), gradients.weights)
        gradients = gradients._replace(weights=hooked)
        doubts = self._doubts(attacked, gradients, buffers)
        statistics = []
        if distributed.world_size() > 1:
            statistics = [each for each in self.net.buffers if each.is_floating_point()]
        return PassResults(
            batch, attacked, outputs, loss, accuracy, gradients, doubts, buffers, statistics
        )

    def _doubts(
        self, attacked: Adversarial, gradients: Gradients, buffers: Snapshot
    ) -> dict[Fault, Tensor]:
        """Fault -> 0-dim bool, true if the update must not count although its loss is finite."""
        # A gradient that is not finite makes the images NaN, which a network may hide.
        near = attacked.context.neighbor_adv
        images = [attacked.x_adv, *([near] if near is not None else [])]
        doubts = {Fault.ATTACK: ~all_finite(images)}
        others = [*gradients.leaves, gradients.x_adv]
        present = [gradient for gradient in others if gradient is not None]
        if present:
            doubts[Fault.INPUT_GRADIENT] = ~all_finite(present)
        spoilt = buffers.spoilt()
        if spoilt is not None:
            doubts[Fault.STATISTICS] = spoilt
        if self._directions:
            doubts[Fault.DIRECTION] = ~torch.stack(self._directions).all()
        return doubts

    def apply_gradients(
        self, results: PassResults, updater: Updater | ReplayedUpdate, number: Tensor, update: bool
    ) -> tuple[Tensor, Tensor]:
        """Step the optimizer with the gradients. Returns their norm, and true if the update counted
        (both 0-dim). ``number`` (0-dim int64) is the number of the update; ``update`` False only
        accumulates the gradients."""
        learning = self.learning_named()
        self.plan.layers.before_update(updater.optimizer, list(learning), results.gradients.weights)
        return updater(
            list(learning.values()),
            results.gradients.weights,
            results.loss,
            number,
            results.doubts,
            images=len(results.batch.x),
            update=update,
        )

    @torch.no_grad()
    def finish_update(self, results: PassResults, ok: Tensor, update: bool) -> None:
        """Called after the optimizer: restore the weights and update the parts' state. Where ``ok``
        (0-dim bool) is false, the state stays and the buffers are restored. ``update`` is False if
        the optimizer did not step."""
        plan = self.plan
        weights = list(self._perturbed().values())
        if weights and plan.weights is not None:
            plan.weights.restore(weights)
        adversary = plan.adversary
        leaf_gradients = [self._unscaled(g) for g in results.gradients.leaves if g is not None]
        x_adv = results.gradients.x_adv
        input_gradient = None if x_adv is None else self._unscaled(x_adv)
        adversary.after(results.batch, results.attacked, leaf_gradients, input_gradient, ok)
        plan.target.after(results.batch, results.outputs, ok)
        unmoved = adversary.unmoved(results.attacked)
        if unmoved is not None:
            self.still.add(unmoved)
        self._share_rows(results.batch.index)
        if plan.averaging is not None and update:
            plan.averaging.update(self.named, ok)
        if not self.net.syncs_are_free:
            results.buffers.put_back_unless(ok)
        elif not ok:
            results.buffers.put_back()

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient / self.scale.to(gradient.dtype)

    def _share_rows(self, index: Tensor) -> None:
        """Exchange the per-sample rows of this batch with the other processes."""
        if distributed.world_size() == 1:
            return
        for part in self.plan.parts.values():
            stores = [part.state[name] for name in part.sample_state() if name in part.state]
            distributed.share_rows(stores, index, self.room)

    def learning(self) -> list[Tensor]:
        """The parameters that learn, in the order of ``learning_named``."""
        return list(self.learning_named().values())

    def learning_named(self) -> dict[str, Tensor]:
        """Name -> parameter, for all that require grad and that the recipe does not freeze."""
        return {
            name: parameter
            for name, parameter in self.named.items()
            if parameter.requires_grad and name in self._learns
        }

    def _natural_logits(self, batch: Batch) -> Context:
        """The logits of the clean images that parts need before the attack."""
        needs = {"natural_logits_eval": "eval"}
        needs["natural_logits_attack"] = self.plan.adversary.attack_bn
        by_mode: dict[str, Tensor] = {}
        found: dict[str, Any] = {}
        for need, bn in needs.items():
            if not self.plan.wants(need):
                continue
            if bn not in by_mode:
                with self.net.attacking(bn):
                    by_mode[bn] = self.net.run(self._natural, batch.x)
            found[need] = by_mode[bn]
        return Context(**found)

    def _attack(self, batch: Batch, context: Context) -> Adversarial:
        """The attack, and everything computed on its result before the outer pass."""
        plan = self.plan
        with self.net.attacking(plan.adversary.attack_bn):
            factor = weakening(plan.adversary, batch, self.seed)
            attacked = plan.adversary.make(batch, context._replace(weakening=factor))
            attacked = self._with_neighbor(batch, attacked)
        if "teacher_logits" in plan.needs:
            logits = self.net.run(plan.target.teach, self._weakened(attacked.x_adv, attacked))
            found = attacked.context._replace(teacher_logits=logits)
            attacked = attacked._replace(context=found)
        return attacked

    def _joint_center(self, batch: Batch) -> Tensor | None:
        """The centre (B,C,H,W) of the ball if one forward pass there serves the attack and the
        outer pass, otherwise None."""
        alike = self.net.attack_dtype == self.net.outer_dtype
        alike = alike and self.net.bn_momenta.suffices(self.plan.objective.passes())
        return (
            self.plan.adversary.joint_center(batch)
            if self.plan.shares_natural_forward and alike
            else None
        )

    def _with_neighbor(self, batch: Batch, attacked: Adversarial) -> Adversarial:
        """``attacked`` with the attacked second image, if the regularizer wants one."""
        regularizer = self.plan.regularizer
        if regularizer is None or not regularizer.wants_neighbor:
            return attacked
        images = regularizer.neighbor(batch)
        near = batch._replace(x=images, offset=batch.offset + noise.NEIGHBOR)
        found = attacked.context
        given = found
        if "natural_logits_attack" in self.plan.needs:
            given = found._replace(natural_logits_attack=self.net.run(self._natural, images))
        near_adv = self.plan.adversary.make(near, given).x_adv
        return attacked._replace(context=found._replace(neighbor_adv=near_adv))

    def _natural(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net.logits(x)

    def attack_loss(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """The scalar that an attack maximises: its objective plus the target's term, times the loss
        scale. ``logits`` are (B,classes), ``y`` is (B,) int64."""
        term = self.plan.target.attack_term(logits, context)
        if self.plan.adversary.attack_objective == "kl":
            losses = kernels.trades_kl(required(context.natural_logits_attack), logits)
            if term is not None:
                losses = self.plan.objective.attack_scale() * losses + term
            loss = losses.mean()
        elif term is not None:
            loss = (functional.cross_entropy(logits, y, reduction="none") + term).mean()
        else:
            loss = functional.cross_entropy(logits, y)
        scale = self.net.loss_scale(len(y))
        return loss if scale == 1.0 else loss * scale

    def _outputs(
        self,
        batch: Batch,
        attacked: Adversarial,
        x_adv: Tensor,
        block_noise: list[Tensor] | None,
        needs: frozenset[str],
    ) -> Outputs:
        context = attacked.context
        if "natural_logits_train" not in needs:
            return Outputs(self.net.logits(x_adv, block_noise), None, context)
        passes = self.plan.objective.passes()
        natural, logits = self.net.bn_momenta.forwards(passes, attacked.center, x_adv, block_noise)
        return Outputs(logits, natural, context)

    def _losses(self, outputs: Outputs, y: Tensor) -> Tensor:
        """The objective and the target's penalty, per sample (B,)."""
        plan = self.plan
        losses = plan.objective.per_sample(outputs, y, plan.target.fit)
        fitted = outputs.adversarial
        if plan.objective.fits == "natural" and outputs.natural is not None:
            fitted = outputs.natural
        penalty = plan.target.penalty(fitted, outputs.adversarial, outputs.context)
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
        outputs = self._outputs(batch, attacked, trained_on, block_noise, self.plan.needs)
        at = x_adv if adversary.wants_input_gradient else None
        return self._loss_and_gradients(batch, attacked, trained_on, outputs, scale, leaves, at)

    def _joint(
        self, batch: Batch, center: Tensor, context: Context, scale: Tensor
    ) -> tuple[Tensor, Tensor | None, OuterPass]:
        """A one-step attack and the outer pass with one shared forward pass at ``center``. Returns
        x_adv, the factor of ``weakening`` and the outer pass; a region."""
        factor = weakening(self.plan.adversary, batch, self.seed)
        context = context._replace(weakening=factor)
        center = leaf(center)
        passes = self.plan.objective.passes()
        with self.net.bn_momenta.updates_as(passes, NATURAL):
            natural = self.net.logits(center)
        x_adv = self.plan.adversary.joint_step(center, natural, batch.y, context)
        attacked = Adversarial(x_adv, center.detach(), context, center.detach())
        trained_on = self._weakened(x_adv, attacked)
        with self.net.bn_momenta.updates_as(passes, ADVERSARIAL):
            logits = self.net.logits(trained_on)
        outputs = Outputs(logits, natural, context)
        outer = self._loss_and_gradients(batch, attacked, trained_on, outputs, scale)
        return x_adv, factor, outer

    def _loss_and_gradients(
        self,
        batch: Batch,
        attacked: Adversarial,
        trained_on: Tensor,
        outputs: Outputs,
        scale: Tensor,
        leaves: Sequence[Tensor] = (),
        x_adv: Tensor | None = None,
    ) -> OuterPass:
        """The outer loss of ``outputs`` and its gradients with respect to the weights, the
        adversary's ``leaves`` and ``x_adv``, if it is given."""
        loss = self._losses(outputs, batch.y).mean()
        regularizer = self.plan.regularizer
        if regularizer is not None:
            term = regularizer.term(batch, attacked, trained_on, outputs)
            loss = loss + regularizer.weight() * term
        weights = self.learning_named()
        others = [*leaves, *([] if x_adv is None else [x_adv])]
        found = self.net.gradients(loss * scale.to(loss.dtype), weights, others)
        first, last = len(weights), len(weights) + len(leaves)
        at_x_adv = None if x_adv is None else found[last]
        gradients = Gradients(found[:first], found[first:last], at_x_adv)
        natural = None if outputs.natural is None else outputs.natural.detach()
        # Before torch 2.13 a compiled graph cannot return a tuple that _replace made.
        return OuterPass(loss.detach(), gradients, outputs.adversarial.detach(), natural)

    def _weakened(self, x_adv: Tensor, attacked: Adversarial) -> Tensor:
        return weakened(
            x_adv,
            attacked.center,
            attacked.context.weakening,
            self.threat.low,
            self.threat.high,
        )

    # -- perturbed weights --------------------------------------------------------------------

    def _perturbed(self) -> dict[str, Tensor]:
        """Name -> weight that is perturbed: selected by the weights part, and requires grad."""
        weights = self.plan.weights
        if weights is None or not weights.active:
            return {}
        names, tensors = list(self.named), list(self.named.values())
        selected = [(names[place], tensors[place]) for place in weights.select(names, tensors)]
        return {name: tensor for name, tensor in selected if tensor.requires_grad}

    def _direction(
        self, batch: Batch, attacked: Adversarial, weights: dict[str, Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """The gradients of the weights part's loss at the present weights, one per tensor of
        ``weights``, and the number of samples in it (0-dim); averaged over processes."""
        # In float16 a small gradient becomes zero unless the loss is scaled.
        scale = self.scale if self.net.outer_dtype is torch.float16 else None
        with self.net.training(), self.net.keeping_buffers():
            found, taken = self.net.run(self._weight_gradient, batch, attacked, scale)
        self.net.copies.invalidate()
        count = taken.to(torch.float32)
        directions = [
            torch.zeros_like(weight) if gradient is None else gradient
            for gradient, weight in zip(found, weights.values(), strict=True)
        ]
        if scale is not None:
            torch._foreach_div_(directions, scale)
        distributed.average([*directions, count])
        self._directions.append(all_finite(directions))
        return directions, count

    def _weight_gradient(
        self, batch: Batch, attacked: Adversarial, scale: Tensor | None
    ) -> tuple[list[Tensor | None], Tensor]:
        """The gradients for ``_direction`` in this process, times ``scale``; a region."""
        part = self.plan.weights
        if part is None:
            raise RuntimeError("this recipe perturbs no weights")
        with torch.enable_grad():
            leaves = [tensor.detach() for tensor in self.plan.adversary.leaves()]
            x_adv, block_noise = self.plan.adversary.outer_input(batch, attacked, leaves)
            trained_on = self._weakened(x_adv.detach(), attacked)
            # The direction is that of the objective, without the regularizer.
            needs = self.plan.objective.requires()
            outputs = self._outputs(batch, attacked, trained_on, block_noise, needs)
            plain_losses = functional.cross_entropy(outputs.adversarial, batch.y, reduction="none")
            plain = self.plan.objective.is_plain() and self.plan.target.is_plain()
            total = self._losses(outputs, batch.y)
            loss, count = part.reduce(
                Losses(total, plain_losses, outputs.adversarial, batch.y, plain)
            )
            if scale is not None:
                loss = loss * scale.to(loss.dtype)
            return self.net.gradients(loss, self._perturbed()), count
