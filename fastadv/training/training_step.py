"""The training step a user calls: it prepares, keeps time, and hands each batch to the walk.

What happens to a batch is in ``walk.py``. The user's model is left as it was found: train flags,
requires_grad and grad mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastadv import ranges
from fastadv.algorithms import cost
from fastadv.algorithms.contract import NEEDS, Batch, Setup
from fastadv.algorithms.plan import Plan
from fastadv.algorithms.resolution import resolve
from fastadv.data.view import View
from fastadv.declared import Count, CountOrZero, Positive, checked
from fastadv.engine import noise
from fastadv.engine.compiled import Runner
from fastadv.engine.model import parameter_hooks
from fastadv.engine.model.averaged_weights import averaged_weights
from fastadv.engine.model.buffers import Snapshot
from fastadv.engine.model.network import Network
from fastadv.engine.model.precision import autocast, pass_dtype, surrounding
from fastadv.engine.optimizer.faults import Fault
from fastadv.engine.optimizer.updater import Updater
from fastadv.engine.process import distributed
from fastadv.errors import UserError, warn
from fastadv.models.blocks import perturbable_blocks
from fastadv.models.wrapped import inner_module
from fastadv.threat import Threat, usual_threat
from fastadv.training import checks
from fastadv.training import mode as choice
from fastadv.training.captured import Captured
from fastadv.training.changes import Changes
from fastadv.training.together import Agreement, bring_together
from fastadv.training.transaction import Transaction
from fastadv.training.update import Update

CHECK_EVERY = 100  # calls between two looks at the fault flag, each of which waits


class Step:
    """A training step of one method; call it with each batch. Made by ``fastadv.step``.

    ``strict``: whether a ``mode`` that turns out to be impossible is an error, and not given up for
    a simpler one with a warning; None: unless it is "auto".
    """

    @torch.inference_mode(False)
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
        num_samples: Count | None = None,
        num_classes: Count | None = None,
        total_steps: Count | None = None,
        steps_per_epoch: Count | None = None,
        scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: Positive | None = None,
        seed: CountOrZero = 0,
        blocks: tuple[str, ...] | None = None,
        strict: bool | None = None,
    ) -> None:
        given = checked(
            Step.__init__,
            num_samples=num_samples,
            num_classes=num_classes,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            max_grad_norm=max_grad_norm,
            seed=seed,
            blocks=blocks,
        )
        self.model = inner_module(model)
        self.plan = plan
        parameter = next(self.model.parameters(), None)
        if parameter is None:
            raise UserError("The model has no parameters to train.")
        checks.check_mode(self.model)
        if not isinstance(amp, bool):
            raise UserError(f"amp is True or False, not {amp!r}; the type is amp_dtype='fp16'.")
        if amp_dtype != "bf16" and not amp:
            raise UserError(f"amp_dtype={amp_dtype!r} is for mixed precision: pass amp=True, too.")
        self.device = parameter.device
        self._amp = amp or attack_dtype is not None
        outer = pass_dtype(amp_dtype, self.device) if amp else None
        attack = pass_dtype(attack_dtype, self.device) if attack_dtype else outer
        if outer is torch.float16 and scaler is None:
            scaler = torch.amp.GradScaler(self.device.type)
        self.mode = choice.first_mode(mode, self.device)
        strict = mode != "auto" if strict is None else strict
        runner = Runner(choice.compiles(self.mode, given["total_steps"]), backend, strict=strict)
        self.net = Network(self.model, self.device, runner, outer, attack)
        self.net.differentiates_twice = plan.differentiates_twice
        tapped = None
        if "block_gradients" in plan.needs:
            names = None if given["blocks"] is None else list(given["blocks"])
            place = plan.options.get("block_noise_at", "conv1")
            tapped = partial(perturbable_blocks, self.model, names, at=place)
        for part in plan.parts.values():
            part.check_threat(threat)
        self.walk = Update(plan, self.net, threat, given["seed"])
        self.changes = Changes(plan, self.net, self.walk, optimizer, tapped)
        self.passes: Update | Captured = self.walk
        if self.mode == "captured":
            self.passes = Captured(self.walk, strict=strict)
        self.updater = Updater(optimizer, self.device, scaler, given["max_grad_norm"])
        self.num_samples, self.num_classes = given["num_samples"], given["num_classes"]
        self.total_steps, self.steps_per_epoch = given["total_steps"], given["steps_per_epoch"]
        self.seed = given["seed"]
        self.before_update: Callable[[int], None] | None = None
        self.calls = 0
        self._epoch: int | None = None
        self.offset = torch.zeros((), dtype=torch.int64, device=self.device)
        self._prepared = False  # whether a batch has been looked at
        self._looked_at = -1  # the version of the model's structure that has seen a batch
        # Image shape, batch size, type and classes that the parts' state is for.
        self._made_for: list[Any] = []
        self._transaction = Transaction(self)
        self._agreement = Agreement(self.walk)

    @property
    def threat(self) -> Threat:
        """What is trained against; another one counts from the next call on.

        Sizes that follow eps (a usual alpha) follow it; rates that parts took from the eps of the
        first call (APART's and FGSM+'s ``step_size_lr``) stay. Raises ``UserError`` for a norm that
        a part of the method does not know.
        """
        return self.walk.threat

    @threat.setter
    def threat(self, threat: Threat) -> None:
        if not isinstance(threat, Threat):
            raise UserError(
                f"step.threat is a fastadv.Threat, such as Threat('linf', 8/255), not {threat!r}."
            )
        for part in self.plan.parts.values():
            part.check_threat(threat)
        if threat == self.walk.threat:
            return
        self.walk.threat = threat
        self.net.runner.forget()
        if self._made_for:
            for part in self.plan.parts.values():
                part.follow_threat(threat)

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

    @property
    def rank_local_state(self) -> dict[str, Tensor]:
        """What of ``state`` is another in every process that trains."""
        names = {name for part in self.plan.parts.values() for name in part.rank_local_state}
        return {name: tensor for name, tensor in self.state.items() if name in names}

    @distributed.failure_told()
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
        ``update=False`` keeps this batch's gradient without stepping: the next call that updates
        takes the mean over the images of all these batches.

        Raises ``UserError`` for inputs that do not fit. After a loss or gradient that is not finite
        nothing is updated any more; every ``CHECK_EVERY`` calls, and ``check()``, raise
        ``TrainingError`` then. On a GPU, where a look would stall it, the same holds for values
        out of range. Whatever a call raises, everything is as it was before that call.
        """
        remembers = self.plan.keeps_sample_state
        self.changes.follow_to_train(prepared=bool(self._made_for))
        checks.check_shapes(self.device, x, y, index, needs_index=remembers)
        checks.check_companions(x, start=start, second=second)
        if not update:
            self._require_accumulation()
        with torch.inference_mode(False):
            inputs = self._checked(*ranges.usable(x, y, index, start, second))
            if not self._prepared:
                self.net.initialize(inputs[0][:2])
            with self._transaction.around(inputs[2] if remembers else None) as buffers:
                return self._call(*inputs, buffers, view=view, update=update)

    def _call(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        start: Tensor | None,
        second: Tensor | None,
        buffers: Snapshot,
        *,
        view: View | None,
        update: bool,
    ) -> dict[str, Tensor]:
        """A call on inputs that were looked at; what it changes is put back if it breaks off."""
        if not self._prepared:
            self._require_epochs()
            self._prepare(x, y)
        elif self._looked_at != self.net.structure.inner:
            self._look_again(x, y)
        for part in self.plan.parts.values():
            cut = None if "second_view" in self.plan.needs else view
            part.check_images(Batch(x, y, index, self.offset, cut))
        metrics: dict[str, Tensor] = {}
        # The caller may train inside autocast or under no_grad; the step's own passes decide.
        outer = surrounding(self.device)
        if not self._amp:
            self.net.outer_dtype = self.net.attack_dtype = outer
        # A backward run inside the caller's autocast would round where its forward did not.
        with autocast(self.device, None):
            for replay in range(self.updates_per_batch):
                self._fill_schedules(replay)
                given, before = (start, buffers) if replay == 0 else (None, None)
                batch = self._views(Batch(x, y, index, self.offset, view, given, second))
                metrics = self._update(batch, before, update)
                self.offset += 1
        self.calls += update
        if update and self.calls % CHECK_EVERY == 0:
            self.check()
        self._close_epoch()
        return metrics

    def _checked(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor | None,
        start: Tensor | None,
        second: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The inputs, their values looked at: at once where Python may look, else by the device,
        which masks the update."""
        low, high = self.threat.low, self.threat.high
        x, second = x.detach(), None if second is None else second.detach()
        rows = torch.arange(len(x), device=x.device) if index is None else index
        # A model that has changed since is looked at first.
        known = self._made_for and self._looked_at == self.net.structure.inner
        classes: int | None = self._made_for[3] if known else None
        found = self.updater.faults.before
        images = [images for images in (x, second) if images is not None]
        if not self.net.syncs_are_free:
            bad = torch.stack([ranges.outside(each, low, high) for each in images]).any()
            found[Fault.IMAGES].copy_(bad)
        if self.net.syncs_are_free or classes is None:
            x, finite = ranges.within_if_finite("x", x, low, high)
            if second is not None:
                second, also = ranges.within_if_finite("second", second, low, high)
                finite = finite and also
            if self.net.syncs_are_free:
                found[Fault.IMAGES].fill_(not finite)
            if not self._prepared and found[Fault.IMAGES]:
                raise UserError("x holds values that are not finite; look at the data.")
            if classes is not None:
                ranges.require_labels(y, classes)
            if index is not None:
                ranges.require_rows(index, self.num_samples)
            ranges.require_finite("start", start)
            return x, y, rows, start, second
        # A label or row out of range would end a CUDA process; the update is masked instead.
        most = self.num_samples or torch.iinfo(torch.int64).max
        if start is not None:
            found[Fault.IMAGES].logical_or_(~start.isfinite().all())
        found[Fault.LABELS].copy_(((y < 0) | (y >= classes)).any())
        found[Fault.ROWS].copy_(((rows < 0) | (rows >= most)).any())
        second = None if second is None else second.clamp(low, high)
        y, rows = y.clamp(0, classes - 1), rows.clamp(0, most - 1)
        return x.clamp(low, high), y, rows, start, second

    # -- one update ---------------------------------------------------------------------------

    def _update(self, batch: Batch, buffers: Snapshot | None, update: bool) -> dict[str, Tensor]:
        self.updater.begin(self.walk.scale)
        several = distributed.world_size() > 1
        if several:
            self._agreement.keep(len(batch.x))
        results = self.passes.compute_gradients(batch, buffers)
        if several:
            bring_together(results, self.walk, self.updater.faults.before)
        norm, ok = self.passes.apply_gradients(results, self.updater, self.offset, update)
        self.passes.finish_update(results, ok, update)
        # Fresh tensors: a captured step overwrites its own at the next replay.
        metrics = {"loss": results.loss, "accuracy": results.accuracy, "grad_norm": norm}
        return {name: value.clone() for name, value in metrics.items()}

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
        averaging, faults = self.plan.averaging, self.updater.faults
        if averaging is None or not self._made_for:
            return
        if self.net.syncs_are_free and not faults.healthy():
            return
        self.changes.follow(prepared=True)
        averaging.epoch_end(epoch, self.walk.named, faults.none_so_far())

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

    def _prepare(self, x: Tensor, y: Tensor) -> None:
        checks.check_batch_of_one(self.model, x)
        classes = self._look(x, y)
        self.resolve_mode(x)
        if not self._made_for:
            self._allocate((x.shape[1], x.shape[2], x.shape[3]), len(x), x.dtype, classes)
        self._prepared = True

    def _look(self, x: Tensor, y: Tensor) -> int:
        """The number of classes, from the first forward of this structure."""
        self._looked_at = -1  # unless it goes well
        logits = self.net.probe(x[:2], self.plan.objective.passes())
        classes = checks.check_classes(logits, y, self.num_classes)
        self._looked_at = self.net.structure.inner
        return classes

    def _look_again(self, x: Tensor, y: Tensor) -> None:
        """After a change of the model."""
        classes, before = self._look(x, y), self._made_for[3]
        if classes == before:
            return
        if self.plan.target.sample_state() or "teacher_logits" in self.plan.needs:
            self._looked_at = -1
            raise UserError(
                f"The model returns {classes} logits and returned {before} when the step began; "
                "this method remembers predictions of those: build the step again."
            )
        for part in self.plan.parts.values():
            part.setup = replace(part.setup, num_classes=classes)
        self._made_for[3] = classes

    def resolve_mode(self, x: Tensor) -> str:
        """Decide what ``mode="auto"`` means for batches like ``x``; called by the first step."""
        if self.mode == "auto":
            units = cost.units(self.plan) * self.updates_per_batch
            # Inductor took ten minutes for a double backward on two cores: no run wins that back.
            known = None if self.plan.differentiates_twice else self.total_steps
            self.mode = choice.pick_mode(self.net, x, units, known)
            self.net.runner.compiles = choice.compiles(self.mode, self.total_steps)
        return self.mode

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
            attack_loss=self.walk.attack_loss,
            sound=self.updater.faults.none_so_far,
        )
        unknown_needs = self.plan.needs - NEEDS
        if unknown_needs:
            raise RuntimeError(f"parts ask for what no step provides: {sorted(unknown_needs)}")
        for part in self.plan.parts.values():
            part.prepare(setup)
        if self.plan.averaging is not None:
            self.plan.averaging.start(self.walk.named)
        self._made_for = [list(shape), batch_size, str(dtype).removeprefix("torch."), classes]

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle goes on bit for bit; what torch does not copy is refused."""
        hooked = parameter_hooks.first_hooked(self.net.structure.parameters)
        if hooked is not None:
            raise UserError(
                f"A copy of this step would lose the hook on {hooked}, which torch does not copy: "
                "copy the model, put the hook on the copy and build a step of it."
            )
        if self.updater.waits:
            raise UserError(
                "A copy of this step would lose the gradient that waits for an update "
                "(update=False): copy it after the next update."
            )
        return vars(self)

    # -- for the caller -----------------------------------------------------------------------

    def check(self) -> None:
        """Raise ``TrainingError`` if a loss or gradient was not finite; waits for the device.

        Warns once where the attack moves nothing: its gradient is zero for many images.
        """
        self.updater.check()
        sentence = self.walk.still.sentence_once()
        if sentence is not None:
            warn(sentence)

    def healthy(self) -> bool:
        """Whether every update so far was finite; waits for the device."""
        return self.updater.healthy()

    def moment(self) -> tuple[Any, ...]:
        """What ``return_to`` needs to undo what calls have noted since."""
        return self.calls, self._epoch, self._prepared, self._looked_at, list(self._made_for)

    def return_to(self, moment: tuple[Any, ...]) -> None:
        """Undo what calls have noted since ``moment``."""
        self.calls, self._epoch, self._prepared, self._looked_at, self._made_for = moment

    def advice(self) -> list[str]:
        """Sentences about a run that looks wrong, from the parts; waits for the device."""
        update = self.calls * self.updates_per_batch
        found = [part.advice(update) for part in self.plan.parts.values()]
        found.append(self.walk.still.sentence())
        return [sentence for sentence in found if sentence is not None]

    @contextmanager
    def evaluation_weights(self, batches: Iterable[Any] | None = None) -> Iterator[None]:
        """The weights to evaluate: SWA's or EMA's where the recipe averages, else the live ones.

        ``batches`` (of x, or tuples that start with it) re-estimate BatchNorm's statistics for
        the average. Everything is put back on exit.
        """
        averaging = self.plan.averaging
        self.changes.follow(prepared=bool(self._made_for))
        started = averaging is not None and self._made_for
        average = averaging.averaged() if averaging is not None and started else {}
        with averaged_weights(self.model, average, batches):
            yield

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside model and optimizer; tensors are live."""
        self.changes.follow(prepared=bool(self._made_for))
        bn_momenta = self.net.bn_momenta
        return {
            "method": self.plan.method,
            "slots": dict(self.plan.slots),
            "calls": self.calls,
            "epoch": self._epoch,
            "offset": self.offset,
            "parts": {slot: dict(part.state) for slot, part in self.plan.parts.items()},
            "updater": self.updater.state_dict(),
            "made_for": self._made_for,
            "one_pass_stands": bn_momenta.stands if self._prepared else bn_momenta.known_to_stand,
        }

    def load_state_dict(
        self, state: dict[str, Any], own: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take over a ``state_dict`` of the same recipe, before the first call, too.

        Of several processes one saves its ``state_dict``; ``own`` is the
        ``rank_local_state`` of this one.
        """
        if own:
            parts = {
                slot: {name: own.get(name, tensor) for name, tensor in found.items()}
                for slot, found in state["parts"].items()
            }
            state = {**state, "parts": parts}
        if state["slots"] != dict(self.plan.slots):
            raise UserError(
                f"This state is of {state['method']!r} with parts {state['slots']}, not of "
                f"{self.plan.method!r} with {dict(self.plan.slots)}."
            )
        self.changes.follow(prepared=bool(self._made_for))
        self.calls, self._epoch = state["calls"], state["epoch"]
        self.offset.copy_(state["offset"])
        self.updater.load_state_dict(state["updater"])
        if not state["made_for"]:
            return  # of a step that had not been called
        self.net.bn_momenta.stands = state["one_pass_stands"]
        if not self._prepared:
            self.net.bn_momenta.known_to_stand = self.net.bn_momenta.stands
        if not self._made_for:
            shape, size, dtype, classes = state["made_for"]
            self._allocate(tuple(shape), size, getattr(torch, dtype), classes)
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
    plan = resolve(method, options)
    checks.check_optimizer(inner_module(model), optimizer)
    return Step(
        model,
        optimizer,
        plan,
        usual_threat(norm, eps),
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
        blocks=None if blocks is None else tuple([blocks] if isinstance(blocks, str) else blocks),
    )
