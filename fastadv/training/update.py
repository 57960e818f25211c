"""One update: the order in which the parts of a recipe act on one batch.

``compute_gradients``: the adversary makes x_adv with frozen parameters; the weights part perturbs
the weights; objective, target and regularizer give one scalar, which one backward pass
differentiates. Noise is drawn by the number of the update. ``apply_gradients``: the optimizer
steps. ``finish_update``: the perturbation of the weights is subtracted, and parts update their
state from the tensors computed before. Published code may forward x' at the end of its attack, and
x after its update, for a log (``LogsPasses``): these passes move BatchNorm's statistics, and are
made in the first and the last of the three. Both only launch tensor operations, so they can be
captured. What they compute is in ``regions.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract import (
    Adversarial,
    Batch,
    Context,
    Outcome,
    Outputs,
    SetsRates,
    SharesForward,
    returned,
)
from fastadv.algorithms.plan import READ_BY_ATTACKS, Plan
from fastadv.algorithms.weakening import weakening
from fastadv.engine import noise
from fastadv.engine.model import parameter_hooks
from fastadv.engine.model.buffers import Snapshot
from fastadv.engine.model.network import Network
from fastadv.engine.optimizer.faults import Fault, not_finite
from fastadv.engine.optimizer.replayed import ReplayedUpdate
from fastadv.engine.optimizer.updater import Updater
from fastadv.engine.process import distributed
from fastadv.threat import Threat
from fastadv.training.inputs import NOWHERE, Homes
from fastadv.training.parameters import Parameters
from fastadv.training.regions import Regions
from fastadv.training.results import Gradients, PassResults, share_right
from fastadv.training.unmoved import UnmovedCounter


class Update:
    """One update of ``plan`` on ``net``: its passes, the optimizer step, and its end."""

    def __init__(self, plan: Plan, net: Network, threat: Threat, seed: int) -> None:
        self.plan, self.net = plan, net
        self.parameters = Parameters(plan, net)
        self.regions = Regions(plan, net, self.parameters, threat, seed)
        self.scale = torch.ones((), device=net.device)  # loss scale, filled in place
        self.room = 0  # most rows of per-sample state that each process sends
        self._directions: list[Tensor] = []  # 0-dim bool per direction of this update: not finite
        self.unmoved = UnmovedCounter(net.device)

    def homes(self, x: Tensor, y: Tensor) -> Homes:
        """Where a batch like ``x`` (B,C,H,W) and ``y`` (B,...) is wanted: anywhere."""
        return NOWHERE

    def compute_gradients(self, batch: Batch, buffers: Snapshot | None = None) -> PassResults:
        """Attack, perturb the weights, and compute the gradients of the outer pass. ``buffers`` is
        a copy of the model's present buffers, if the caller has one."""
        plan = self.plan
        self.net.structure.distrust()  # the model's code runs
        buffers = buffers or Snapshot(self.net.kept_buffers)
        self._directions = []
        self.net.copies.invalidate()
        batch = self._with_targets(batch)
        context = plan.target.prepare_batch(batch, self._natural_logits(batch))
        center = self._joint_center(batch)
        if center is not None:
            with self.net.training():
                x_adv, factor, outer = self.net.run(
                    self.regions.joint, batch, center, context, self.scale
                )
            context = context._replace(weakening=factor)
            attacked = Adversarial(x_adv, center, context, center)
        else:
            attacked = self._attack(batch, context)
            if plan.repeats_attacked and not self.regions.stands_for_repetition:
                with self.net.training():
                    self.net.run(self.regions.logged, attacked.x_adv)
            weights = self.parameters.perturbed()
            if weights and plan.weights is not None:
                plan.weights.perturb(
                    list(weights.values()), lambda: self._direction(batch, attacked, weights)
                )
                self.net.copies.invalidate()
            with self.net.training():
                outer = self.net.run(self.regions.outer, batch, attacked, self.scale)
        loss, gradients, adversarial, natural, term = outer
        outputs = Outputs(adversarial, natural, attacked.context)
        accuracy = share_right(outputs.adversarial, batch.y, plan.labels)
        clean = None
        if natural is not None and not plan.capabilities.moves_center:  # forwarded in any case
            clean = share_right(natural, batch.y, plan.labels)
        hooked = parameter_hooks.through(self.parameters.learning(), gradients.weights)
        gradients = gradients._replace(weights=hooked)
        faults_found = self._faults_found(attacked, gradients, buffers)
        statistics = self._statistics() if distributed.sharing() > 1 else []
        return PassResults(
            batch, attacked, outputs, loss, term, accuracy, clean, gradients, faults_found,
            buffers, statistics,
        )  # fmt: skip

    def _statistics(self) -> list[Tensor]:
        """The model's floating-point buffers, which several processes average."""
        return [each for each in self.net.buffers if each.is_floating_point()]

    def _faults_found(
        self, attacked: Adversarial, gradients: Gradients, buffers: Snapshot
    ) -> dict[Fault, Tensor]:
        """Fault -> 0-dim bool, true if the update must not count although its loss is finite."""
        # A gradient that is not finite makes the images NaN, which a network may hide.
        near = attacked.context.neighbor_adv
        images = [attacked.x_adv, *([near] if near is not None else [])]
        faults_found = {Fault.ATTACK: not_finite(images)}
        others = [*gradients.leaves, gradients.x_adv]
        present = [gradient for gradient in others if gradient is not None]
        if present:
            faults_found[Fault.INPUT_GRADIENT] = not_finite(present)
        statistics = buffers.not_finite()
        if statistics is not None:
            faults_found[Fault.STATISTICS] = statistics
        if self._directions:
            bad = self._directions
            faults_found[Fault.DIRECTION] = bad[0] if len(bad) == 1 else torch.stack(bad).any()
        return faults_found

    def apply_gradients(
        self, results: PassResults, updater: Updater | ReplayedUpdate, number: Tensor, update: bool
    ) -> tuple[Tensor, Tensor]:
        """Step the optimizer with the gradients. Returns their norm, and true if the update counted
        (both 0-dim). ``number`` (0-dim int64) is the number of the update; with ``update`` False
        the gradients wait for the next call."""
        learning = self.parameters.learning_named()
        layers = self.plan.layers
        if update and isinstance(layers, SetsRates):
            layers.before_update(updater.optimizer, list(learning), results.gradients.weights)
        return updater(
            list(learning.values()),
            results.gradients.weights,
            results.loss,
            number,
            results.faults_found,
            images=len(results.batch.x),
            update=update,
        )

    @torch.no_grad()
    def finish_update(self, results: PassResults, ok: Tensor, update: bool) -> None:
        """Called after the optimizer: restore the weights, make the pass that the recipe ends with
        (``Plan.ends_with_clean``), and update the parts' state. Where ``ok`` (0-dim bool) is false,
        the state stays and the buffers are restored. ``update`` is False if the optimizer did not
        step."""
        plan = self.plan
        weights = list(self.parameters.perturbed().values())
        if weights and plan.weights is not None:
            plan.weights.restore(weights)
        if plan.ends_with_clean and update:
            self._forward_clean(results.batch.x)
        outcome = self._outcome(results)
        for part in plan.followers:
            part.after(outcome, ok)
        unmoved = plan.adversary.unmoved(results.batch, results.attacked)
        if unmoved is not None:
            self.unmoved.add(unmoved)
        if plan.keeps_sample_state:
            self._share_rows(results.batch.index)
        if not self.net.syncs_are_free:
            results.buffers.put_back_unless(ok)
        elif not ok:
            results.buffers.put_back()
        if plan.averaging is not None and update:  # buffers that were put back are finite
            plan.averaging.update(self.parameters.averaged(), ok, None)

    def _forward_clean(self, x: Tensor) -> None:
        """Move the model's buffers by ``x`` (B,C,H,W) at the present weights."""
        self.net.copies.invalidate()
        with self.net.training():
            self.net.run(self.regions.logged, x)
        if distributed.sharing() > 1:
            distributed.average(self._statistics(), len(x), self.room)

    def _outcome(self, results: PassResults) -> Outcome:
        """``results`` as the parts see them."""
        gradients = results.gradients
        at_x_adv = None if gradients.x_adv is None else self._unscaled(gradients.x_adv)
        leaves = [self._unscaled(g) for g in gradients.leaves if g is not None]
        return Outcome(
            results.batch, results.attacked, results.outputs, leaves, at_x_adv, results.term
        )

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient / self.scale.to(gradient.dtype)

    def _share_rows(self, index: Tensor) -> None:
        """Exchange the per-sample rows of this batch with the other processes."""
        if distributed.sharing() == 1:
            return
        for part in self.plan.parts.values():
            stores = [part.state[name] for name in part.sample_state() if name in part.state]
            distributed.share_rows(stores, index, self.room)

    def _natural_logits(self, batch: Batch) -> Context:
        """The logits of the clean images that parts need before the attack."""
        by_mode: dict[str, Tensor] = {}
        found: dict[str, Any] = {}
        for need, bn in self.plan.natural_modes.items():
            if not self.plan.wants(need):
                continue
            if bn not in by_mode:
                with self.net.attacking(bn):
                    by_mode[bn] = self.net.run(self.regions.natural, batch.x)
            found[need] = by_mode[bn]
        return Context(**found)

    def _attack(self, batch: Batch, context: Context) -> Adversarial:
        """The attack, and everything computed on its result before the outer pass."""
        plan = self.plan
        with self.net.attacking(plan.adversary.attack_bn):
            factor = weakening(plan.adversary, batch, self.regions.seed)
            attacked = plan.adversary.make(batch, context._replace(weakening=factor))
            returned.attacked(attacked, batch.x, plan.adversary)
            attacked = self._with_neighbor(batch, attacked)
        if plan.teacher is not None:
            attacked = attacked._replace(context=self._taught(batch, attacked))
        return attacked

    def _taught(self, batch: Batch, attacked: Adversarial) -> Context:
        """The context of ``attacked`` with the teachers' logits of the images that are fitted."""
        plan = self.plan
        if plan.teacher is None:
            raise RuntimeError("this recipe has no teachers")
        trained_on = self.regions.weakened(attacked.x_adv, batch, attacked)
        of = {"natural": attacked.center, "adversarial": trained_on}
        logits = {
            which: self.net.run(plan.teacher.teach, of[which]) for which in plan.objective.fits
        }
        return attacked.context._replace(
            teacher_logits=logits[plan.objective.fits[0]],
            natural_teacher_logits=logits.get("natural"),
        )

    def _joint_center(self, batch: Batch) -> Tensor | None:
        """The centre (B,C,H,W) of the ball if one forward pass there serves the attack and the
        outer pass, otherwise None."""
        alike = self.net.attack_dtype == self.net.outer_dtype
        alike = alike and self.net.bn_momenta.suffices(self.plan.bn_updates)
        # A targeted attack follows the loss of other labels than the regularizer's.
        alike = alike and not (self.plan.shares_gradient and batch.threat.targeted)
        adversary = self.plan.adversary
        if self.plan.shares_natural_forward and alike and isinstance(adversary, SharesForward):
            return adversary.joint_center(batch)
        return None

    def _with_targets(self, batch: Batch) -> Batch:
        """``batch`` with the labels that a targeted attack wants to reach: without the caller's,
        another class of each image, each with equal probability."""
        if not batch.threat.targeted or batch.targets is not None:
            return batch
        others = self.plan.adversary.setup.num_classes - 1
        where = (self.regions.seed, batch.offset, noise.TARGETS, torch.float32)
        drawn = kernels.noise_uniform(batch.index, (1,), *where).view(-1)
        # Uniform in [-1,1), so below ``others`` in exact arithmetic; float32 may round up.
        away = ((drawn + 1) * (others / 2)).long().clamp(max=others - 1)
        return batch._replace(targets=(batch.y + 1 + away) % (others + 1))

    def _with_neighbor(self, batch: Batch, attacked: Adversarial) -> Adversarial:
        """``attacked`` with the attacked second image, if the regularizer wants one."""
        neighbor = self.plan.neighbor
        if neighbor is None:
            return attacked
        images = neighbor.neighbor(batch)
        near = batch._replace(x=images, offset=batch.offset + noise.NEIGHBOR)
        found = attacked.context
        given = found
        read = self.plan.needs & READ_BY_ATTACKS
        if read:  # both in the attack's mode of BatchNorm
            logits = self.net.run(self.regions.natural, images)
            known: dict[str, Any] = dict.fromkeys(read, logits)
            given = found._replace(**known)
        near_adv = self.plan.adversary.make(near, given).x_adv
        return attacked._replace(context=found._replace(neighbor_adv=near_adv))

    def _direction(
        self, batch: Batch, attacked: Adversarial, weights: dict[str, Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """The gradients of the weights part's loss at the present weights, one per tensor of
        ``weights``, and the number of samples in it (0-dim); averaged over processes."""
        # In float16 a small gradient becomes zero unless the loss is scaled.
        scale = self.scale if self.net.outer_dtype is torch.float16 else None
        with self.net.training(), self.net.keeping_buffers():
            found, taken = self.net.run(self.regions.weight_gradient, batch, attacked, scale)
        self.net.copies.invalidate()
        count = taken.to(torch.float32)
        directions = [
            torch.zeros_like(weight) if gradient is None else gradient
            for gradient, weight in zip(found, weights.values(), strict=True)
        ]
        if scale is not None:
            torch._foreach_div_(directions, scale)
        distributed.average([*directions, count], len(batch.x), self.room)
        self._directions.append(not_finite(directions))
        return directions, count
