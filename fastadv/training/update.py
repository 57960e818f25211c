"""The order in which the parts of a recipe act on one batch.

The walk: noise is named by the update's number; the adversary makes x_adv with the parameters
frozen; the weights part moves the weights; objective, target and regularizer give one scalar and
one backward (``gather``). The optimizer steps. The weights come back and parts with state read
what they need from tensors already at hand (``settle``). Both halves are straight tensor code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastadv import kernels
from fastadv.algorithms.adversaries.weaken import weakened, weakening
from fastadv.algorithms.contract import Adversarial, Batch, Facts, Losses, Outputs
from fastadv.algorithms.plan import Plan
from fastadv.engine import noise
from fastadv.engine.gradient import leaf
from fastadv.engine.model import parameter_hooks
from fastadv.engine.model.bn_momentum import ADVERSARIAL, NATURAL
from fastadv.engine.model.buffers import Snapshot
from fastadv.engine.model.network import Network
from fastadv.engine.optimizer.faults import Fault, all_finite
from fastadv.engine.process import distributed
from fastadv.threat import Threat
from fastadv.training.still import Still

if TYPE_CHECKING:
    from fastadv.engine.optimizer.replayed import ReplayedUpdate
    from fastadv.engine.optimizer.updater import Updater


class Found(NamedTuple):
    """What the passes of one update found, before the optimizer steps.

    ``weights`` and ``others`` are gradients times the loss scale: of the learning parameters, and
    of the adversary's leaves and input. ``doubts`` are what must not be for the update to count,
    0-dim bool. ``buffers`` are the model's before the update; ``statistics`` those of the passes,
    which several processes average.
    """

    batch: Batch
    made: Adversarial
    outputs: Outputs
    loss: Tensor
    accuracy: Tensor
    weights: list[Tensor | None]
    others: list[Tensor | None]
    doubts: dict[Fault, Tensor]
    buffers: Snapshot
    statistics: list[Tensor]


class Walk:
    """The passes of one update of ``plan`` on ``net``."""

    def __init__(self, plan: Plan, net: Network, threat: Threat, seed: int) -> None:
        self.plan, self.net, self.threat, self.seed = plan, net, threat, seed
        self.scale = torch.ones((), device=net.device)  # of the outer loss, filled in place
        self.named: dict[str, Tensor] = {}  # what stands in the model
        self._learns: set[str] = set()
        self.room = 0  # rows of memory about samples that each process sends
        self._directions: list[Tensor] = []  # whether those of this update were finite
        self.still = Still(net.device)
        self.follow()

    def follow(self) -> None:
        """The parameters are those of the model of this moment."""
        self.named = dict(self.net.structure.parameters)
        self._learns = {name for name in self.named if self.plan.layers.learns(name)}

    def gather(self, batch: Batch, buffers: Snapshot | None = None) -> Found:
        """Attack, perturb the weights, and take the outer pass's gradients. ``buffers`` are the
        model's of this moment, where somebody has copied them already."""
        plan = self.plan
        buffers = buffers or Snapshot(self.net.kept_buffers)
        self._directions = []
        self.net.copies.invalidate()
        facts = self._facts_before(batch)
        plan.target.before(batch, facts)
        center = self._joint_center(batch)
        if center is not None:
            with self.net.training():
                passed = self.net.run(self._joint, batch, center, facts, self.scale)
        else:
            made = self._attack(batch, facts)
            facts = facts | made.facts
            weights = self._perturbed()
            if weights and plan.weights is not None:
                plan.weights.perturb(
                    list(weights.values()), lambda: self._direction(batch, made, facts, weights)
                )
                self.net.copies.invalidate()
            with self.net.training():
                passed = made, *self.net.run(self._outer, batch, made, facts, self.scale)
        made, loss, found, outputs = passed
        learning = self.learning()
        count = len(learning)
        right = (outputs.adversarial.argmax(1) == batch.y).float().mean()
        taken, others = parameter_hooks.through(learning, found[:count]), found[count:]
        doubts = self._doubts(made, others, buffers)
        statistics = []
        if distributed.world_size() > 1:
            statistics = [each for each in self.net.buffers if each.is_floating_point()]
        return Found(batch, made, outputs, loss, right, taken, others, doubts, buffers, statistics)

    def _doubts(
        self, made: Adversarial, others: list[Tensor | None], buffers: Snapshot
    ) -> dict[Fault, Tensor]:
        """What shows that the update must not count although its loss may be finite."""
        # A step along a gradient that is not finite leads to NaN, which a network may hide.
        near = made.facts.get("neighbor_adv")
        attacked = [made.x_adv, *([near] if near is not None else [])]
        doubts = {Fault.ATTACK: ~all_finite(attacked)}
        present = [gradient for gradient in others if gradient is not None]
        if present:
            doubts[Fault.INPUT_GRADIENT] = ~all_finite(present)
        spoilt = buffers.spoilt()
        if spoilt is not None:
            doubts[Fault.STATISTICS] = spoilt
        if self._directions:
            doubts[Fault.DIRECTION] = ~torch.stack(self._directions).all()
        return doubts

    def descend(
        self, found: Found, updater: Updater | ReplayedUpdate, number: Tensor, update: bool
    ) -> tuple[Tensor, Tensor]:
        """Hand the gradients to the optimizer: their norm, and whether the update counted."""
        learning = self.learning_named()
        self.plan.layers.before_update(updater.optimizer, list(learning), found.weights)
        return updater(
            list(learning.values()),
            found.weights,
            found.loss,
            number,
            found.doubts,
            images=len(found.batch.x),
            update=update,
        )

    @torch.no_grad()
    def settle(self, found: Found, ok: Tensor, update: bool) -> None:
        """After the optimizer: weights restored, state updated where ``ok``, else buffers back."""
        plan = self.plan
        weights = list(self._perturbed().values())
        if weights and plan.weights is not None:
            plan.weights.restore(weights)
        adversary = plan.adversary
        unscaled = [g if g is None else g / self.scale.to(g.dtype) for g in found.others]
        count = len(adversary.leaves())
        leaf_gradients = [g for g in unscaled[:count] if g is not None]
        input_gradient = unscaled[count] if adversary.wants_input_gradient else None
        adversary.after(found.batch, found.made, leaf_gradients, input_gradient, ok)
        plan.target.after(found.batch, found.outputs, ok)
        unmoved = adversary.unmoved(found.made)
        if unmoved is not None:
            self.still.add(unmoved)
        self._share_rows(found.batch.index)
        if plan.averaging is not None and update:
            plan.averaging.update(self.named, ok)
        if not self.net.syncs_are_free:
            found.buffers.put_back_unless(ok)
        elif not ok:
            found.buffers.put_back()

    def _share_rows(self, index: Tensor) -> None:
        """What every process remembers about the samples of the others' batches."""
        if distributed.world_size() == 1:
            return
        for part in self.plan.parts.values():
            stores = [part.state[name] for name in part.sample_state() if name in part.state]
            distributed.share_rows(stores, index, self.room)

    def learning(self) -> list[Tensor]:
        """The parameters that learn."""
        return list(self.learning_named().values())

    def learning_named(self) -> dict[str, Tensor]:
        """Those the user lets learn and the recipe does not freeze, by name."""
        return {
            name: parameter
            for name, parameter in self.named.items()
            if parameter.requires_grad and name in self._learns
        }

    def _facts_before(self, batch: Batch) -> Facts:
        """What parts need from the unattacked images before the attack."""
        facts: Facts = {}
        modes = {"natural_logits_eval": "eval"}
        modes["natural_logits_attack"] = self.plan.adversary.attack_bn
        for need, bn in modes.items():
            if not self.plan.wants(need):
                continue
            same = next((facts[other] for other in facts if modes[other] == bn), None)
            if same is None:
                with self.net.attacking(bn):
                    same = self.net.run(self._natural, batch.x)
            facts[need] = same
        return facts

    def _attack(self, batch: Batch, facts: Facts) -> Adversarial:
        """The adversary's example, and what else is found on it before the outer pass."""
        plan = self.plan
        with self.net.attacking(plan.adversary.attack_bn):
            made = plan.adversary.make(batch, facts)
            made = made._replace(facts=made.facts | self._weakening(batch))
            more = self._neighbor(batch, facts | made.facts)
        if "teacher_logits" in plan.needs:
            taught_on = self._weakened(made.x_adv, made)
            more["teacher_logits"] = self.net.run(plan.target.teach, taught_on)
        return made._replace(facts=made.facts | more)

    def _weakening(self, batch: Batch) -> Facts:
        return weakening(self.plan.adversary, batch, self.seed)

    def _joint_center(self, batch: Batch) -> Tensor | None:
        """The centre of the ball, where one forward pass serves the attack and the outer pass."""
        alike = self.net.attack_dtype == self.net.outer_dtype
        alike = alike and self.net.one_pass_suffices(self.plan.objective.passes())
        return (
            self.plan.adversary.joint_center(batch)
            if self.plan.shares_natural_forward and alike
            else None
        )

    def _neighbor(self, batch: Batch, facts: Facts) -> Facts:
        """The second adversarial example of a regularizer that compares two."""
        regularizer = self.plan.regularizer
        if regularizer is None or not regularizer.wants_neighbor:
            return {}
        images = regularizer.neighbor(batch)
        near = batch._replace(x=images, offset=batch.offset + noise.NEIGHBOR)
        if "natural_logits_attack" in self.plan.needs:
            facts = facts | {"natural_logits_attack": self.net.run(self._natural, images)}
        return {"neighbor_adv": self.plan.adversary.make(near, facts).x_adv}

    def _natural(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net.logits(x)

    def attack_loss(self, logits: Tensor, y: Tensor, facts: Facts) -> Tensor:
        """The scalar an attack maximises: the recipe's objective plus the target's own term."""
        if self.plan.adversary.attack_objective == "kl":
            loss = kernels.trades_kl(facts["natural_logits_attack"], logits)
        else:
            loss = functional.cross_entropy(logits, y, reduction="none")
        term = self.plan.target.attack_term(logits, facts)
        if term is not None and self.plan.adversary.attack_objective == "kl":
            loss = self.plan.objective.attack_scale() * loss + term
        elif term is not None:
            loss = loss + term
        return loss.mean() * self.net.loss_scale(len(y))

    def _outputs(
        self,
        batch: Batch,
        made: Adversarial,
        x_adv: Tensor,
        facts: Facts,
        block_noise: list[Tensor] | None,
        needs: frozenset[str],
    ) -> Outputs:
        if "natural_logits_train" not in needs:
            return Outputs(self.net.logits(x_adv, block_noise), None, facts)
        passes = self.plan.objective.passes()
        natural, adversarial = self.net.forwards(passes, made.center, x_adv, block_noise)
        return Outputs(adversarial, natural, facts)

    def _losses(self, outputs: Outputs, y: Tensor) -> Tensor:
        """The objective and the target's penalty, per sample (B,)."""
        plan = self.plan
        losses = plan.objective.per_sample(outputs, y, plan.target.fit)
        fitted = outputs.adversarial
        if plan.objective.fits == "natural" and outputs.natural is not None:
            fitted = outputs.natural
        penalty = plan.target.penalty(fitted, outputs.adversarial, outputs.facts)
        return losses if penalty is None else losses + penalty

    def _outer(
        self, batch: Batch, made: Adversarial, facts: Facts, scale: Tensor
    ) -> tuple[Tensor, list[Tensor | None], Outputs]:
        """The outer pass: loss, gradients (weights, leaves, x_adv), logits; a region."""
        adversary = self.plan.adversary
        leaves = [leaf(tensor) for tensor in adversary.leaves()]
        x_adv, block_noise = adversary.outer_input(batch, made, leaves)
        regularizer = self.plan.regularizer
        wanted = adversary.wants_input_gradient
        if regularizer is not None:
            wanted = wanted or regularizer.wants_adversarial_gradient
            if regularizer.wants_center_gradient:
                made = made._replace(center=leaf(made.center))
        if wanted and not x_adv.requires_grad:
            x_adv = leaf(x_adv)
        trained_on = self._weakened(x_adv, made)
        outputs = self._outputs(batch, made, trained_on, facts, block_noise, self.plan.needs)
        others = [*leaves, x_adv] if adversary.wants_input_gradient else leaves
        return self._descend(batch, made, trained_on, outputs, others, scale)

    def _joint(
        self, batch: Batch, center: Tensor, facts: Facts, scale: Tensor
    ) -> tuple[Adversarial, Tensor, list[Tensor | None], Outputs]:
        """A one-step attack and the outer pass over one forward of the centre; a region."""
        facts = facts | self._weakening(batch)
        center = leaf(center)
        passes = self.plan.objective.passes()
        with self.net.bn_updates_as(passes, NATURAL):
            natural = self.net.logits(center)
        x_adv = self.plan.adversary.joint_step(center, natural, batch.y, facts)
        made = Adversarial(x_adv, center.detach(), facts, center.detach())
        trained_on = self._weakened(x_adv, made)
        with self.net.bn_updates_as(passes, ADVERSARIAL):
            adversarial = self.net.logits(trained_on)
        outputs = Outputs(adversarial, natural, facts)
        passed = self._descend(batch, made, trained_on, outputs, [], scale)
        return made, *passed

    def _descend(
        self,
        batch: Batch,
        made: Adversarial,
        trained_on: Tensor,
        outputs: Outputs,
        others: list[Tensor],
        scale: Tensor,
    ) -> tuple[Tensor, list[Tensor | None], Outputs]:
        """The outer loss of ``outputs``, its gradients at the weights and at ``others``, and the
        logits detached."""
        loss = self._losses(outputs, batch.y).mean()
        regularizer = self.plan.regularizer
        if regularizer is not None:
            term = regularizer.term(batch, made, trained_on, outputs)
            loss = loss + regularizer.weight() * term
        found = self.net.gradients(loss * scale.to(loss.dtype), self.learning_named(), others)
        natural = None if outputs.natural is None else outputs.natural.detach()
        return loss.detach(), found, Outputs(outputs.adversarial.detach(), natural, outputs.facts)

    def _weakened(self, x_adv: Tensor, made: Adversarial) -> Tensor:
        return weakened(x_adv, made.center, made.facts, self.threat.low, self.threat.high)

    # -- perturbed weights --------------------------------------------------------------------

    def _perturbed(self) -> dict[str, Tensor]:
        """The weights that are moved: of those the part selects, the ones the user lets learn."""
        weights = self.plan.weights
        if weights is None or not weights.active:
            return {}
        names, tensors = list(self.named), list(self.named.values())
        selected = [(names[place], tensors[place]) for place in weights.select(names, tensors)]
        return {name: tensor for name, tensor in selected if tensor.requires_grad}

    def _direction(
        self, batch: Batch, made: Adversarial, facts: Facts, weights: dict[str, Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of the weights part's own loss at the present weights, which it then moves."""
        # float16 flushes a small gradient to zero, unless the loss is large.
        scale = self.scale if self.net.outer_dtype is torch.float16 else None
        with self.net.training(), self.net.keeping_buffers():
            found, taken = self.net.run(self._weight_gradient, batch, made, facts, scale)
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
        self, batch: Batch, made: Adversarial, facts: Facts, scale: Tensor | None
    ) -> tuple[list[Tensor | None], Tensor]:
        """A region."""
        part = self.plan.weights
        if part is None:
            raise RuntimeError("this recipe perturbs no weights")
        with torch.enable_grad():
            leaves = [tensor.detach() for tensor in self.plan.adversary.leaves()]
            x_adv, block_noise = self.plan.adversary.outer_input(batch, made, leaves)
            trained_on = self._weakened(x_adv.detach(), made)
            # The direction is that of the objective; what only a regularizer compares is not in it.
            needs = self.plan.objective.requires()
            outputs = self._outputs(batch, made, trained_on, facts, block_noise, needs)
            adversarial = functional.cross_entropy(outputs.adversarial, batch.y, reduction="none")
            plain = self.plan.objective.is_plain() and self.plan.target.is_plain()
            total = self._losses(outputs, batch.y)
            loss, count = part.reduce(
                Losses(total, adversarial, outputs.adversarial, batch.y, plain)
            )
            if scale is not None:
                loss = loss * scale.to(loss.dtype)
            return self.net.gradients(loss, self._perturbed()), count
