"""The regions of an update: tensor code that does not wait for the device, which a compiled mode
compiles one by one and a captured mode records as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.contract import Adversarial, Batch, Context, Losses, Outputs, SharesForward
from fastadv.algorithms.contract.returned import fitted, number, per_image
from fastadv.algorithms.plan import Plan
from fastadv.algorithms.weakening import weakened, weakening
from fastadv.engine.gradient import leaf
from fastadv.engine.model.bn_momentum import ADVERSARIAL, NATURAL
from fastadv.engine.model.network import Network
from fastadv.threat import Threat
from fastadv.training.parameters import Parameters
from fastadv.training.results import Gradients, OuterPass

_AT_INPUT = frozenset({"input_gradient", "differentiable_input"})


class Regions:
    """Forward passes, losses and gradients of ``plan`` on ``net`` against ``threat``.

    ``natural``, ``logged``, ``outer``, ``joint`` and ``weight_gradient`` are run by ``net.run``.
    """

    def __init__(
        self, plan: Plan, net: Network, parameters: Parameters, threat: Threat, seed: int
    ) -> None:
        self.plan, self.net, self.parameters = plan, net, parameters
        self.threat, self.seed = threat, seed
        # Read here: a compiler cannot enter the lock of a cached property.
        self._learned, self._needs, self._bn_updates = plan.learned, plan.needs, plan.bn_updates
        self._penalizing = plan.penalizing
        self._folds_repetition = plan.folds_repetition

    def natural(self, x: Tensor) -> Tensor:
        """Logits (B,classes) of ``x`` (B,C,H,W) without a graph; a region."""
        with torch.no_grad():
            return self.net.logits(x)

    def logged(self, x: Tensor) -> None:
        """A forward pass of ``x`` (B,C,H,W) that only moves the model's buffers; a region."""
        with torch.no_grad():
            self.net.logits(x)

    @property
    def stands_for_repetition(self) -> bool:
        """True if the outer pass moves BatchNorm's statistics also for the pass at the end of the
        attack (``Plan.repeats_attacked``)."""
        return self._folds_repetition and self.net.bn_momenta.suffices(self._bn_updates)

    def outer(self, batch: Batch, attacked: Adversarial, scale: Tensor) -> OuterPass:
        """The outer pass; ``scale`` (0-dim) is the loss scale. A region."""
        learned, needs = self._learned, self._needs
        leaves = [] if learned is None else [leaf(tensor) for tensor in learned.leaves()]
        x_adv, block_noise = self._outer_input(batch, attacked, leaves)
        if "differentiable_center" in needs:
            attacked = attacked._replace(center=leaf(attacked.center))
        if needs & _AT_INPUT and not x_adv.requires_grad:
            x_adv = leaf(x_adv)
        trained_on = self.weakened(x_adv, batch, attacked)
        at = x_adv if "input_gradient" in needs else None
        if "start_gradient" in needs and attacked.start is not None:
            at = leaf(attacked.start)
            attacked = attacked._replace(start=at)
        outputs = self._outputs(batch, attacked, trained_on, block_noise, needs)
        return self._loss_and_gradients(batch, attacked, trained_on, outputs, scale, leaves, at)

    def joint(
        self, batch: Batch, center: Tensor, context: Context, scale: Tensor
    ) -> tuple[Tensor, Tensor | None, OuterPass]:
        """A one-step attack and the outer pass with one shared forward pass at ``center``. Returns
        x_adv, the factor of ``weakening`` and the outer pass; a region."""
        factor = weakening(self.plan.adversary, batch, self.seed)
        context = context._replace(weakening=factor)
        center = leaf(center)
        bn_updates = self._bn_updates
        with self.net.bn_momenta.updates_as(bn_updates, NATURAL):
            natural = self.net.logits(center)
        adversary = self.plan.adversary
        if not isinstance(adversary, SharesForward):
            raise RuntimeError("this adversary has no pass to share")
        x_adv, gradient = adversary.joint_step(center, natural, batch, context)
        context = context._replace(center_gradient=gradient)
        attacked = Adversarial(x_adv, center.detach(), context, center.detach())
        trained_on = self.weakened(x_adv, batch, attacked)
        with self.net.bn_momenta.updates_as(bn_updates, ADVERSARIAL):
            logits = self.net.logits(trained_on)
        outputs = Outputs(logits, natural, context)
        outer = self._loss_and_gradients(batch, attacked, trained_on, outputs, scale)
        return x_adv, factor, outer

    def weight_gradient(
        self, batch: Batch, attacked: Adversarial, scale: Tensor | None
    ) -> tuple[list[Tensor | None], Tensor]:
        """The gradients of the weights part's loss in this process, times ``scale`` (0-dim; None:
        1), and the number of samples in it (0-dim); a region."""
        part = self.plan.weights
        if part is None:
            raise RuntimeError("this recipe perturbs no weights")
        with torch.enable_grad():
            learned = self._learned
            leaves = [] if learned is None else [tensor.detach() for tensor in learned.leaves()]
            x_adv, block_noise = self._outer_input(batch, attacked, leaves)
            trained_on = self.weakened(x_adv.detach(), batch, attacked)
            # The direction is that of the objective, without the regularizer.
            needs = self.plan.objective.requires()
            outputs = self._outputs(batch, attacked, trained_on, block_noise, needs)
            target = self.plan.target
            if target.labels == "any":
                plain_losses = self._fit(outputs.adversarial, batch.y, outputs.context)
            else:
                plain_losses = functional.cross_entropy(
                    outputs.adversarial, batch.y, reduction="none"
                )
            plain = self.plan.objective.is_plain() and target.is_plain() and batch.y.ndim == 1
            total = self._losses(outputs, batch.y)
            loss, count = part.reduce(
                Losses(total, plain_losses, outputs.adversarial, batch.y, plain)
            )
            if scale is not None:
                loss = loss * scale.to(loss.dtype)
            return self.net.gradients(loss, self.parameters.perturbed()), count

    def _outer_input(
        self, batch: Batch, attacked: Adversarial, leaves: list[Tensor]
    ) -> tuple[Tensor, list[Tensor] | None]:
        """x_adv (B,C,H,W), differentiable in ``leaves``, and the noise of each block, if any."""
        learned = self._learned
        if learned is None:
            return attacked.x_adv, None
        return learned.outer_input(batch, attacked, leaves)

    def weakened(self, x_adv: Tensor, batch: Batch, attacked: Adversarial) -> Tensor:
        """The input (B,C,H,W) of the outer pass: ``x_adv``, with its perturbation weakened by the
        adversary's options ``shrink`` and ``flip_signs``."""
        return weakened(x_adv, attacked.center, attacked.context.weakening, batch.threat)

    def _outputs(
        self,
        batch: Batch,
        attacked: Adversarial,
        x_adv: Tensor,
        block_noise: list[Tensor] | None,
        needs: frozenset[str],
    ) -> Outputs:
        context = attacked.context
        bn_updates = self._bn_updates
        if "natural_logits_train" not in needs:
            if not self.stands_for_repetition:
                return Outputs(self.net.logits(x_adv, block_noise), None, context)
            with self.net.bn_momenta.updates_as(bn_updates, ADVERSARIAL):
                return Outputs(self.net.logits(x_adv, block_noise), None, context)
        natural, logits = self.net.bn_momenta.forwards(
            bn_updates, attacked.center, x_adv, block_noise
        )
        return Outputs(logits, natural, context)

    def _losses(self, outputs: Outputs, y: Tensor) -> Tensor:
        """The objective and the target's penalty, per sample (B,)."""
        plan = self.plan
        losses = plan.objective.per_sample(outputs, y, self._fit)
        count = len(outputs.adversarial)
        if not isinstance(losses, Tensor) or losses.shape != (count,):
            per_image(losses, count, plan.objective, "per_sample")  # raises
        at = outputs.adversarial
        if plan.objective.fits[0] == "natural" and outputs.natural is not None:
            at = outputs.natural
        if self._penalizing is None:
            return losses
        penalty = self._penalizing.penalty(at, outputs.adversarial, outputs.context)
        if penalty is None:
            return losses
        return losses + per_image(penalty, count, plan.target, "penalty")

    def _fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        return fitted(self.plan.target, logits, y, context)

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
        adversary's ``leaves`` and ``x_adv`` or the attack's start, if one is given."""
        loss = self._losses(outputs, batch.y).mean()
        regularizer, term = self.plan.regularizer, None
        if regularizer is not None:
            term = regularizer.term(batch, attacked, trained_on, outputs)
            term = number(term, regularizer, "term")
            loss = loss + regularizer.weight() * term
        weights = self.parameters.learning_named()
        others = [*leaves, *([] if x_adv is None else [x_adv])]
        found = self.net.gradients(loss * scale.to(loss.dtype), weights, others)
        first, last = len(weights), len(weights) + len(leaves)
        at_x_adv = None if x_adv is None else found[last]
        gradients = Gradients(found[:first], found[first:last], at_x_adv)
        natural = None if outputs.natural is None else outputs.natural.detach()
        # Before torch 2.13 a compiled graph cannot return a tuple that _replace made.
        told = None if term is None else term.detach()
        return OuterPass(loss.detach(), gradients, outputs.adversarial.detach(), natural, told)
