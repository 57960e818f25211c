"""One training step: the order in which the parts of a recipe act on one batch.

The walk: noise is named by the update's number; the adversary makes x_adv with the parameters
frozen; the weights part moves the weights; objective, target and regularizer give one scalar and
one backward; the optimizer steps; the weights come back; parts with state read what they need
from tensors already at hand. The model is left as it was found: train flags, requires_grad, mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastadv import checks, kernels
from fastadv.adversaries.weaken import weakened, weakening
from fastadv.contract import (
    NEEDS,
    Adversarial,
    Batch,
    Facts,
    Losses,
    Outputs,
    Setup,
)
from fastadv.data.view import View
from fastadv.engine import distributed, guard, noise
from fastadv.engine.averages import averaged_weights
from fastadv.engine.gradient import gradients_if_used
from fastadv.engine.network import Network
from fastadv.engine.precision import autocast, pass_dtype, surrounding
from fastadv.engine.runner import Runner
from fastadv.engine.taps import Taps
from fastadv.engine.update import Updater
from fastadv.errors import UserError
from fastadv.models.blocks import perturbable_blocks
from fastadv.models.wrapped import inner_module
from fastadv.plan import Plan, resolve
from fastadv.threat import Threat

USUAL_EPS = {"linf": 8 / 255, "l2": 128 / 255}


class Step:
    """A training step of one method; call it with each batch. Made by ``fastadv.step``."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        threat: Threat,
        *,
        amp: bool = False,
        amp_dtype: str = "bf16",
        attack_dtype: str | None = None,
        mode: str = "auto",
        backend: str = "inductor",
        num_samples: int | None = None,
        num_classes: int | None = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float | None = None,
        seed: int = 0,
        blocks: Iterable[str] | None = None,
    ) -> None:
        self.model = inner_module(model)
        self.plan = plan
        self.threat = threat
        parameter = next(self.model.parameters(), None)
        if parameter is None:
            raise UserError("The model has no parameters to train.")
        self.device = parameter.device
        self._amp = amp or attack_dtype is not None
        outer = pass_dtype(amp_dtype, self.device) if amp else None
        attack = pass_dtype(attack_dtype, self.device) if attack_dtype else outer
        if outer is torch.float16 and scaler is None:
            scaler = torch.amp.GradScaler(self.device.type)
        runner = Runner("eager" if mode == "auto" else mode, backend)
        self.net = Network(self.model, self.device, runner, outer, attack)
        if "block_gradients" in plan.needs:
            names = None if blocks is None else list(blocks)
            place = plan.options.get("block_noise_at", "conv1")
            tapped = perturbable_blocks(self.model, names, at=place)
            self.net.taps = Taps([module for _, module in tapped])
        self._named = dict(self.model.named_parameters())
        plan.layers.bind(self.model, optimizer)
        self._learns = {name for name in self._named if plan.layers.learns(name)}
        self.updater = Updater(optimizer, self.device, scaler, max_grad_norm)
        self.num_samples, self.num_classes, self.seed = num_samples, num_classes, seed
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.before_update: Callable[[int], None] | None = None
        self.calls = 0
        self._epoch: int | None = None
        self.offset = torch.zeros((), dtype=torch.int64, device=self.device)
        self._prepared = False
        self._pending: dict[str, Any] | None = None

    @property
    def updates_per_batch(self) -> int:
        """How many times one call updates the weights (Free-m: m)."""
        return self.plan.updates_per_batch

    @property
    def state(self) -> dict[str, Tensor]:
        """The live per-sample and learned tensors of all parts, by name; empty before a call."""
        return {
            name: tensor for part in self.plan.parts.values() for name, tensor in part.state.items()
        }

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor | None = None,
        *,
        view: View | None = None,
        start: Tensor | None = None,
        second: Tensor | None = None,
        update: bool = True,
    ) -> dict[str, Tensor]:
        """Train on one batch; returns 0-dim detached metrics, ``"loss"`` always.

        ``x`` (B,C,H,W) float in [0,1], ``y`` (B,) int64, ``index`` (B,) int64 rows of the
        training set. ``view`` is the crop and flip that made x (None: x was not augmented).
        ``start`` (B,C,H,W) is the initial perturbation in pixels instead of the random one.
        ``second`` (B,C,H,W) is another view of the same images, for methods that compare two.
        ``update=False`` adds this batch's gradient without stepping.
        """
        if not self._prepared:
            self._require_epochs()
            self._prepare(x, y, index)
        if not update:
            self._require_accumulation()
        if index is None:
            index = torch.arange(len(x), device=x.device)
        metrics: dict[str, Tensor] = {}
        # The caller may train inside autocast or under no_grad; the step's own passes decide.
        outer = surrounding(self.device)
        if not self._amp:
            self.net.outer_dtype = self.net.attack_dtype = outer
        # A backward run inside the caller's autocast would round where its forward did not.
        with autocast(self.device, None):
            for replay in range(self.updates_per_batch):
                self._fill_schedules(replay)
                given = start if replay == 0 else None
                batch = self._views(Batch(x.detach(), y, index, self.offset, view, given, second))
                metrics = self._update(batch, update)
                self.offset += 1
        self.calls += update
        self._close_epoch()
        return metrics

    # -- one update ---------------------------------------------------------------------------

    def _update(self, batch: Batch, update: bool) -> dict[str, Tensor]:
        plan = self.plan
        self.updater.begin()
        buffers = [buffer.clone() for buffer in self.net.buffers]
        facts = self._facts_before(batch)
        plan.target.before(batch, facts)
        with self.net.attacking(plan.adversary.attack_bn):
            made = plan.adversary.make(batch, facts)
            weak = weakening(plan.adversary, batch, self.seed)
            made = made._replace(facts=made.facts | weak)
            facts = facts | made.facts | self._neighbor(batch, facts)
        if "teacher_logits" in plan.needs:
            taught_on = self._weakened(made.x_adv, made)
            facts["teacher_logits"] = self.net.run(plan.target.teach, taught_on)
        weights = self._perturbed()
        with self.net.training():
            if weights and plan.weights is not None:
                plan.weights.perturb(weights, lambda: self._direction(batch, made, facts, weights))
            scale = self.updater.scale()
            loss, found, outputs = self.net.run(self._outer, batch, made, facts, scale)
        learning = self._learning()
        weight_gradients, others = found[: len(learning)], found[len(learning) :]
        distributed.average([g for g in found if g is not None])
        names = list(self._learning_named())
        plan.layers.before_update(self.updater.optimizer, names, weight_gradients)
        norm, ok = self.updater(learning, weight_gradients, loss, self.offset, update=update)
        with torch.no_grad():
            if weights and plan.weights is not None:
                plan.weights.restore(weights)
            self._after(batch, made, outputs, others, ok)
            if plan.averaging is not None and update:
                plan.averaging.update(learning, ok)
            self.updater.keep_if(ok, self.net.buffers, buffers)
        right = (outputs.adversarial.argmax(1) == batch.y).float().mean()
        return {"loss": loss, "accuracy": right, "grad_norm": norm}

    def _facts_before(self, batch: Batch) -> Facts:
        """What parts need from the unattacked images before the attack."""
        facts: Facts = {}
        modes = {"natural_logits_eval": "eval"}
        modes["natural_logits_attack"] = self.plan.adversary.attack_bn
        for need, bn in modes.items():
            if need not in self.plan.needs:
                continue
            same = next((facts[other] for other in facts if modes[other] == bn), None)
            if same is None:
                with self.net.attacking(bn):
                    same = self.net.run(self._natural, batch.x)
            facts[need] = same
        return facts

    def _views(self, batch: Batch) -> Batch:
        """Where a part compares two views: one batch of 2B images, the first views first."""
        if "second_view" not in self.plan.needs:
            return batch
        if batch.second is None or batch.second.shape != batch.x.shape:
            raise UserError(
                "This method compares two views of each image: pass second=, another "
                f"augmentation of x of the same shape {tuple(batch.x.shape)}."
            )
        return batch._replace(
            x=torch.cat([batch.x, batch.second.detach()]),
            y=batch.y.repeat(2),
            # The same sample twice must not draw the same noise twice.
            index=torch.cat([batch.index, batch.index + noise.SECOND_VIEW]),
            view=None,
            start=None if batch.start is None else batch.start.repeat(2, 1, 1, 1),
        )

    def _neighbor(self, batch: Batch, facts: Facts) -> Facts:
        """The second adversarial example of a regularizer that compares two."""
        regularizer = self.plan.regularizer
        images = None if regularizer is None else regularizer.neighbor(batch)
        if images is None:
            return {}
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

    def _outputs(self, batch: Batch, made: Adversarial, x_adv: Tensor, facts: Facts,
                 block_noise: list[Tensor] | None) -> Outputs:
        natural = None
        if "natural_logits_train" in self.plan.needs:
            natural = self.net.logits(made.center)
        return Outputs(self.net.logits(x_adv, block_noise), natural, facts)

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
        leaves = [leaf.detach().requires_grad_() for leaf in adversary.leaves()]
        x_adv, block_noise = adversary.outer_input(batch, made, leaves)
        regularizer = self.plan.regularizer
        wanted = adversary.wants_input_gradient
        if regularizer is not None:
            wanted = wanted or regularizer.wants_adversarial_gradient
            if regularizer.wants_center_gradient:
                made = made._replace(center=made.center.detach().requires_grad_())
        if wanted and not x_adv.requires_grad:
            x_adv = x_adv.detach().requires_grad_()
        trained_on = self._weakened(x_adv, made)
        outputs = self._outputs(batch, made, trained_on, facts, block_noise)
        loss = self._losses(outputs, batch.y).mean()
        if regularizer is not None:
            term = regularizer.term(batch, made, trained_on, outputs)
            loss = loss + regularizer.weight() * term
        inputs = [*self._learning(), *leaves]
        if adversary.wants_input_gradient:
            inputs.append(x_adv)
        found = gradients_if_used(loss * scale.to(loss.dtype), inputs)
        natural = None if outputs.natural is None else outputs.natural.detach()
        return loss.detach(), found, Outputs(outputs.adversarial.detach(), natural, facts)

    def _weakened(self, x_adv: Tensor, made: Adversarial) -> Tensor:
        return weakened(x_adv, made.center, made.facts, self.threat.low, self.threat.high)

    # -- perturbed weights --------------------------------------------------------------------

    def _perturbed(self) -> list[Tensor]:
        weights = self.plan.weights
        if weights is None or not weights.active:
            return []
        names, tensors = list(self._named), list(self._named.values())
        return [tensors[place] for place in weights.select(names, tensors)]

    def _direction(
        self, batch: Batch, made: Adversarial, facts: Facts, weights: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of the weights part's own loss at the present weights."""
        with self.net.keeping_buffers():
            found, count = self.net.run(self._weight_gradient, batch, made, facts)
        directions = [
            torch.zeros_like(weight) if gradient is None else gradient
            for gradient, weight in zip(found, weights, strict=True)
        ]
        distributed.average([*directions, count])
        return directions, count

    def _weight_gradient(
        self, batch: Batch, made: Adversarial, facts: Facts
    ) -> tuple[list[Tensor | None], Tensor]:
        """A region."""
        part = self.plan.weights
        if part is None:
            raise RuntimeError("this recipe perturbs no weights")
        with torch.enable_grad():
            leaves = [leaf.detach() for leaf in self.plan.adversary.leaves()]
            x_adv, block_noise = self.plan.adversary.outer_input(batch, made, leaves)
            trained_on = self._weakened(x_adv.detach(), made)
            outputs = self._outputs(batch, made, trained_on, facts, block_noise)
            adversarial = functional.cross_entropy(outputs.adversarial, batch.y, reduction="none")
            loss, count = part.reduce(Losses(self._losses(outputs, batch.y), adversarial))
            return gradients_if_used(loss, self._perturbed()), count

    # -- after the optimizer ------------------------------------------------------------------

    def _after(
        self, batch: Batch, made: Adversarial, outputs: Outputs,
        others: list[Tensor | None], ok: Tensor,
    ) -> None:
        """Let the parts with state read the pass; gradients come unscaled."""
        adversary = self.plan.adversary
        unscaled = [g if g is None else g / self.updater.scale().to(g.dtype) for g in others]
        count = len(adversary.leaves())
        leaf_gradients = [g for g in unscaled[:count] if g is not None]
        input_gradient = unscaled[count] if adversary.wants_input_gradient else None
        adversary.after(batch, made, leaf_gradients, input_gradient, ok)
        self.plan.target.after(batch, outputs, ok)

    def _learning(self) -> list[Tensor]:
        """The parameters that learn."""
        return list(self._learning_named().values())

    def _learning_named(self) -> dict[str, Tensor]:
        """Those the user lets learn and the recipe does not freeze, by name."""
        return {
            name: parameter
            for name, parameter in self._named.items()
            if parameter.requires_grad and name in self._learns
        }

    def _require_accumulation(self) -> None:
        for slot, part in self.plan.parts.items():
            if not part.accumulates:
                raise UserError(
                    f"update=False is not possible with {slot} {self.plan.slots[slot]!r}: it "
                    "changes its own state or the weights with every batch."
                )

    # -- time ---------------------------------------------------------------------------------

    @property
    def epoch(self) -> float:
        """The epoch as a number with a fraction where the length of an epoch is known."""
        if self.steps_per_epoch:
            return self.calls / self.steps_per_epoch
        return float(self._epoch or 0)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch (from 0) begins; implied by ``steps_per_epoch``."""
        if not self.steps_per_epoch and self._epoch is not None and epoch > self._epoch:
            self._end_epoch(self._epoch)
        self._epoch = epoch

    def _close_epoch(self) -> None:
        length = self.steps_per_epoch
        if length and self.calls and self.calls % length == 0:
            self._end_epoch(self.calls // length - 1)

    def _end_epoch(self, epoch: int) -> None:
        if self.plan.averaging is not None and self._prepared:
            self.plan.averaging.epoch_end(epoch, self._learning())

    def _fill_schedules(self, replay: int) -> None:
        update = self.calls * self.updates_per_batch + replay
        if self.before_update is not None:
            self.before_update(update)
        for part in self.plan.parts.values():
            part.schedule(update, self.epoch)

    # -- the first call -----------------------------------------------------------------------

    def _require_epochs(self) -> None:
        if self.steps_per_epoch or self._epoch is not None:
            return
        for slot, part in self.plan.parts.items():
            if part.follows_epochs():
                raise UserError(
                    f"{slot} {self.plan.slots[slot]!r} follows the epochs: pass total_steps= and "
                    "steps_per_epoch=, or call set_epoch(epoch) before the first batch of each."
                )

    def _prepare(self, x: Tensor, y: Tensor, index: Tensor | None) -> None:
        checks.check_batch(x, y, self.threat.low, self.threat.high)
        checks.check_index(index, x, self.num_samples, self.plan.per_sample_state)
        checks.check_batch_of_one(self.model, x)
        with torch.no_grad(), guard.train_flags(self.model, False):
            logits = self.net.logits(x[:2])
        classes = checks.check_classes(logits, y, self.num_classes)
        self._allocate((x.shape[1], x.shape[2], x.shape[3]), len(x), x.dtype, classes)

    def _allocate(
        self, shape: tuple[int, int, int], batch_size: int, dtype: torch.dtype, classes: int
    ) -> None:
        many = self.updates_per_batch
        setup = Setup(
            net=self.net,
            threat=self.threat,
            device=self.device,
            dtype=dtype,
            image_shape=shape,
            batch_size=batch_size,
            num_samples=self.num_samples,
            num_classes=classes,
            total_steps=self.total_steps * many if self.total_steps else None,
            steps_per_epoch=self.steps_per_epoch * many if self.steps_per_epoch else None,
            seed=self.seed,
            needs=self.plan.needs,
            attack_steps=int(self.plan.options.get("steps", 1)),
            fits=self.plan.objective.fits,
            attack_loss=self.attack_loss,
        )
        unknown_needs = self.plan.needs - NEEDS
        if unknown_needs:
            raise RuntimeError(f"parts ask for what no step provides: {sorted(unknown_needs)}")
        for part in self.plan.parts.values():
            part.prepare(setup)
        if self.plan.averaging is not None:
            self.plan.averaging.start(self._learning())
        self._prepared = True
        if self._pending is not None:
            self.load_state_dict(self._pending)

    # -- for the caller -----------------------------------------------------------------------

    def check(self) -> None:
        """Raise ``TrainingError`` if a loss or gradient was not finite; waits for the device."""
        self.updater.faults.check()

    def healthy(self) -> bool:
        """Whether every update so far was finite; waits for the device."""
        return self.updater.faults.healthy()

    def advice(self) -> list[str]:
        """Sentences about a run that looks wrong, from the parts; waits for the device."""
        update = self.calls * self.updates_per_batch
        found = [part.advice(update) for part in self.plan.parts.values()]
        return [sentence for sentence in found if sentence is not None]

    @contextmanager
    def evaluation_weights(self, batches: Iterable[Any] | None = None) -> Iterator[None]:
        """The weights to evaluate: SWA's or EMA's where the recipe averages, else the live ones.

        ``batches`` (of x, or tuples that start with it) re-estimate BatchNorm's statistics for
        the average. Everything is put back on exit.
        """
        averaging = self.plan.averaging
        average = averaging.average() if averaging is not None and self._prepared else None
        with averaged_weights(self.model, self._learning(), average, batches):
            yield

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside model and optimizer; tensors are live."""
        return {
            "method": self.plan.method,
            "slots": dict(self.plan.slots),
            "calls": self.calls,
            "epoch": self._epoch,
            "offset": self.offset,
            "parts": {slot: dict(part.state) for slot, part in self.plan.parts.items()},
            "updater": self.updater.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a ``state_dict`` of the same recipe; before the first call it is kept."""
        if state["slots"] != dict(self.plan.slots):
            raise UserError(
                f"This state is of {state['method']!r} with parts {state['slots']}, not of "
                f"{self.plan.method!r} with {dict(self.plan.slots)}."
            )
        self.calls, self._epoch = state["calls"], state["epoch"]
        self.offset.copy_(state["offset"])
        self.updater.load_state_dict(state["updater"])
        if not self._prepared:
            self._pending = state
            return
        self._pending = None
        for slot, part in self.plan.parts.items():
            part.load_state(state["parts"][slot])


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: str = "apart",
    *,
    eps: float | str | None = None,
    norm: str = "linf",
    amp: bool = False,
    mode: str = "auto",
    num_samples: int | None = None,
    num_classes: int | None = None,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    scaler: torch.amp.GradScaler | None = None,
    max_grad_norm: float | None = None,
    seed: int = 0,
    amp_dtype: str = "bf16",
    attack_dtype: str | None = None,
    blocks: Iterable[str] | None = None,
    **options: Any,
) -> Step:
    """A training step of ``method`` for your own loop, in place of ``backward`` and ``step``.

    ``step = fastadv.step(model, optimizer, method="apart", num_samples=50_000, total_steps=...)``
    and then ``metrics = step(x, y, index=i)`` for each batch. ``eps`` in pixels of [0,1] (a
    number or "8/255"; None: 8/255 in Linf, 128/255 in L2). ``total_steps`` and
    ``steps_per_epoch`` count calls. ``options`` are the parts' hyper-parameters, or a slot's name
    to swap a part (``weights="rwp"``). ``blocks`` names the first convolutions of the residual
    blocks in a network fastadv does not know. Raises ``UserError`` in one sentence for what
    cannot be done.
    """
    from fastadv.threat import parse_number

    radius = USUAL_EPS.get(norm, 0.0) if eps is None else parse_number(eps, "eps")
    return Step(
        model,
        optimizer,
        resolve(method, options),
        Threat(norm, radius),
        amp=amp,
        amp_dtype=amp_dtype,
        attack_dtype=attack_dtype,
        mode=mode,
        num_samples=num_samples,
        num_classes=num_classes,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        scaler=scaler,
        max_grad_norm=max_grad_norm,
        seed=seed,
        blocks=blocks,
    )
