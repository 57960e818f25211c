"""The training step that a user calls: it checks the batch, counts calls and epochs, and makes the
updates.

The order of one update is in ``update.py``. After a call the train flags and requires_grad of the
user's model, and the grad mode, are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastadv import ranges
from fastadv.algorithms.contract import Batch, RankLocal
from fastadv.algorithms.plan import Plan
from fastadv.by_epoch import ByEpoch
from fastadv.data.view import View
from fastadv.declared import CountOrZero, Positive, checked
from fastadv.engine.model.averaged_weights import averaged_weights
from fastadv.engine.model.buffers import Snapshot
from fastadv.engine.model.outputs import Output
from fastadv.engine.model.precision import autocast, surrounding
from fastadv.engine.process import distributed
from fastadv.errors import UserError, warn
from fastadv.models.wrapped import inner_module
from fastadv.threat import Threat
from fastadv.training import checks, saved
from fastadv.training.inputs import Given, Inputs, batch_of, looked_at, two_views
from fastadv.training.internals import Internals
from fastadv.training.preparation import Allocated
from fastadv.training.settings import Execution, Precision, RunLength
from fastadv.training.together import bring_together

NAME_EPOCHS = (
    "pass total_steps= and steps_per_epoch=, or call set_epoch(epoch) before the first batch of "
    "each."
)
CHECK_EVERY_CALLS = 100  # between two checks of the fault flag, each of which waits for the device


class Step:
    """A training step of one method, called with each batch. ``fastadv.step`` builds it.

    ``model``, ``optimizer``, ``plan`` (the parts of the method), ``threat``, ``mode``, ``state``
    and the methods below are public. ``internals`` is not: it may change with every version.
    ``output`` says where the logits are in what the model returns (``fastadv.step``).
    ``before_update`` is called before each update, with its number (for schedules). ``radius`` is
    an eps that changes with the epoch, in place of the threat's. Raises
    ``UserError`` for a model, an optimizer or settings that cannot be trained with.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        threat: Threat,
        *,
        precision: Precision | None = None,
        length: RunLength | None = None,
        execution: Execution | None = None,
        max_grad_norm: Positive | None = None,
        seed: CountOrZero = 0,
        blocks: tuple[str, ...] | None = None,
        output: Output = None,
        before_update: Callable[[int], None] | None = None,
        radius: ByEpoch | None = None,
    ) -> None:
        settings = checked(Step.__init__, max_grad_norm=max_grad_norm, seed=seed, blocks=blocks)
        self._model, self._optimizer, self._plan = inner_module(model), optimizer, plan
        if next(self.model.parameters(), None) is None:
            raise UserError("The model has no parameters to train.")
        checks.check_mode(self.model)
        self.internals = Internals(
            self.model,
            optimizer,
            plan,
            threat,
            precision or Precision(),
            length or RunLength(),
            execution or Execution(),
            output=output,
            before_update=before_update,
            radius=radius,
            **settings,
        )

    def __repr__(self) -> str:
        threat = f"{self.threat.norm}, eps {self.threat.nominal:.4g}"
        precision = self.internals.precision
        return f"<fastadv.Step {self.plan.method}: {threat}, {precision}, {self.mode}>"

    @property
    def model(self) -> nn.Module:
        """The model that is trained, without the wrapper of DDP or ``torch.compile``. For another
        one build another step; its modules and parameters may change."""
        return self._model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer given. For another one build another step; its groups may change."""
        return self._optimizer

    @property
    def plan(self) -> Plan:
        """The parts of the method."""
        return self._plan

    @property
    def mode(self) -> str:
        """One of "eager", "compiled" and "captured", or "auto" until the first call decides."""
        return self.internals.mode

    @property
    def threat(self) -> Threat:
        """The ball in which the attack searches; a new one holds from the next call on.

        Step sizes in units of eps (a usual alpha) change with it. Learning rates that a part took
        from the eps of the first call (``step_size_lr``) do not. A new one ends an eps that changes
        with the epoch. Setting it raises ``UserError`` for a ball in which a part of the method
        cannot work.
        """
        return self.internals.update.regions.threat

    @threat.setter
    def threat(self, threat: Threat) -> None:
        if not isinstance(threat, Threat):
            raise UserError(
                f"step.threat is a fastadv.Threat, such as Threat('linf', 8/255), not {threat!r}."
            )
        for part in self.plan.parts.values():
            part.check_threat(threat)
        inner = self.internals
        if threat == inner.update.regions.threat:
            return
        inner.update.regions.threat, inner.radius = threat, None
        inner.net.runner.forget()
        inner.preparation.follow_threat(threat)

    @property
    def updates_per_batch(self) -> int:
        """Updates of the weights per call (Free-m: m)."""
        return self.plan.updates_per_batch

    @property
    def calls(self) -> int:
        """The number of calls that have updated the weights."""
        return self.internals.clock.calls

    @property
    def state(self) -> dict[str, Tensor]:
        """Name -> live tensor of the state of all parts (per-sample and learned tensors); empty
        before the first call."""
        return {
            name: tensor for part in self.plan.parts.values() for name, tensor in part.state.items()
        }

    @property
    def rank_local_state(self) -> dict[str, Tensor]:
        """The part of ``state`` that differs between ranks."""
        parts = self.plan.parts.values()
        names = {n for part in parts if isinstance(part, RankLocal) for n in part.rank_local_state}
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
        eps: Tensor | None = None,
        alpha: Tensor | None = None,
        mask: Tensor | None = None,
        targets: Tensor | None = None,
        update: bool = True,
    ) -> dict[str, Tensor]:
        """Train on one batch; returns the 0-dim detached metrics "loss", "accuracy" (share of right
        predictions at x_adv; of soft labels the largest entry counts, and labels that are no
        classes have none) and "grad_norm".

        ``x`` (B,C,H,W) float in [0,1], ``y`` (B,) int64 labels, or soft labels (B,classes) that sum
        to 1 (mixup, cutmix), or with a criterion of your own any tensor (B,...). ``index`` (B,)
        int64 are the rows of the training set. ``view`` is the crop and flip that made ``x`` (None:
        ``x`` is not augmented). ``start`` (B,C,H,W) is an initial perturbation in pixels that
        replaces the random one. ``second`` (B,C,H,W) is another view of the same images, for
        methods that compare two.

        ``eps`` and ``alpha`` (B,) float are a radius and a step in pixels for each image, in place
        of the threat's and the method's. ``mask``, bool (B or 1,C or 1,H,W), is true for the pixels
        that may move. ``targets``, like ``y``, are the labels that the attack of a targeted threat
        wants to reach; without them it draws another class for each image and update.

        With ``update=False`` the gradient of this batch waits and the optimizer does not step; the
        next call that updates takes the mean over the images of all these batches. Its update is
        that of one call with all of them (noise, clipping and averages included), if the network
        treats each image alone, unlike BatchNorm in training, and no stored sample comes twice.
        Raises ``UserError`` for a method that couples the images. The metrics are those of each
        call; with several processes those of a call that does not update are of this process's
        images.

        Raises ``UserError`` for inputs that do not fit. After a loss or gradient that is not finite
        nothing is updated any more, and ``TrainingError`` is raised by ``check()``, which every
        ``CHECK_EVERY_CALLS``-th call calls. On a GPU, where reading values would stall the device,
        the same holds for values out of range. If a call raises, everything is as before that call.
        """
        inner = self.internals
        keeps_rows = self.plan.keeps_sample_state
        inner.changes.follow_to_train(prepared=inner.allocated)
        labels = self.plan.target.labels
        checks.check_shapes(inner.net.device, x, y, index, needs_index=keeps_rows, labels=labels)
        if labels == "classes" and y.ndim != 1:
            checks.refuse_soft(self.plan.hard_labels_only)
        checks.check_companions(x, start=start, second=second)
        adversary = self.plan.adversary
        checks.check_radii(x, takes_alpha=adversary.takes_alpha, eps=eps, alpha=alpha)
        checks.check_mask(x, mask)
        checks.check_targets(y, targets, targeted=self.threat.targeted)
        if update:
            checks.check_accumulation(self.optimizer)
        else:
            self._require_accumulation()
        with torch.inference_mode(False):
            given = Given(*ranges.usable(x, y, index, start, second, eps, alpha, mask, targets))
            inputs = self._checked(given)
            if not inner.preparation.prepared:
                inner.net.initialize(inputs.x[:2])
            with inner.transaction.around(inputs.rows if keeps_rows else None) as buffers:
                return self._call(inputs, buffers, view=view, update=update)

    @property
    def _views(self) -> int:
        """The number of images that are trained on for each image of a call."""
        return 2 if "second_view" in self.plan.needs else 1

    def _checked(self, given: Given) -> Inputs:
        inner = self.internals
        return looked_at(
            given,
            threat=inner.update.regions.threat,
            classes=inner.preparation.known_classes,
            labels=self.plan.target.labels,
            num_samples=inner.length.num_samples,
            faults=inner.updater.faults.before,
            syncs_are_free=inner.net.syncs_are_free,
            first=not inner.preparation.prepared,
            # Without index the images of all calls of an update are numbered one after another.
            first_row=inner.updater.images_waiting // self._views,
        )

    def _call(
        self, inputs: Inputs, buffers: Snapshot, *, view: View | None, update: bool
    ) -> dict[str, Tensor]:
        """A call with checked inputs; the caller restores what it changed if it raises."""
        inner, (x, y) = self.internals, inputs[:2]
        if inner.preparation.prepared:
            inner.preparation.look_again(x, y)
        else:
            self._prepare(x, y)
        two = self._views == 2
        batch = batch_of(inputs, inner.offset, self.threat, view, self.plan.target.labels)
        whole = batch._replace(view=None) if two else batch
        for part in self.plan.parts.values():
            part.check_images(whole)
        metrics: dict[str, Tensor] = {}
        # The caller may train inside autocast; a step without its own types takes that type.
        outer = surrounding(inner.net.device)
        if not inner.precision.is_own:
            inner.net.outer_dtype = inner.net.attack_dtype = outer
        # A backward pass inside the caller's autocast would round where its forward pass did not.
        with autocast(inner.net.device, None):
            for replay in range(self.plan.updates_per_batch):
                self._fill_schedules(replay)
                again = batch if replay == 0 else batch._replace(start=None)
                again = two_views(again) if two else again
                metrics = self._update(again, buffers if replay == 0 else None, update)
                # All calls of an update draw the noise that one call with their images would draw.
                inner.offset += int(update)
        if update:
            inner.clock.calls += 1
            if inner.clock.calls % CHECK_EVERY_CALLS == 0:
                self.check()
            self._close_epoch()
        return metrics

    def _update(self, batch: Batch, buffers: Snapshot | None, update: bool) -> dict[str, Tensor]:
        inner = self.internals
        passes, updater = inner.passes, inner.updater
        updater.begin(inner.update.scale)
        several = distributed.world_size() > 1
        if several:
            inner.agreement.keep(len(batch.x))
        results = passes.compute_gradients(batch, buffers)
        learning, images = inner.update.parameters.learning(), len(results.batch.x)
        images = updater.join(learning, results.gradients.weights, images)
        if several and update:
            # A process that met a fault in an earlier call of this update has told no other yet.
            earlier = updater.faults.by_kind() if updater.waits else {}
            flags = [*updater.faults.before.values(), *earlier.values()]
            bring_together(results, inner.update, flags, images)
            if earlier:
                updater.faults.record(earlier, inner.offset)
        norm, ok = passes.apply_gradients(results, updater, inner.offset, update)
        passes.finish_update(results, ok, update)
        # Copies, since a captured step overwrites its tensors at the next replay.
        metrics = {"loss": results.loss, "accuracy": results.accuracy, "grad_norm": norm}
        return {name: value.clone() for name, value in metrics.items() if value is not None}

    def _require_accumulation(self) -> None:
        for slot, part in self.plan.parts.items():
            reason = part.refuses_accumulation()
            if reason is not None:
                raise UserError(
                    f"update=False is not possible with {slot} {self.plan.slots[slot]!r}, since "
                    f"{reason}: give all images of an update to one call."
                )
        if self.internals.updater.scaler is not None and self.plan.keeps_sample_state:
            raise UserError(
                "update=False is not possible with a loss scale and state per sample: if a later "
                "call overflows, what an earlier one stored stays; use bf16 or float32."
            )

    # -- time ---------------------------------------------------------------------------------

    @property
    def epoch(self) -> float:
        """The position in the run in epochs, with a fraction if the length of an epoch is known."""
        return self.internals.clock.epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch`` (from 0). Not needed with ``steps_per_epoch``, which then decides."""
        ended = self.internals.clock.begin(epoch)
        if ended is not None:
            self._end_epoch(ended)

    def _close_epoch(self) -> None:
        ended = self.internals.clock.ended()
        if ended is not None:
            self._end_epoch(ended)

    def _end_epoch(self, epoch: int) -> None:
        inner, averaging = self.internals, self.plan.averaging
        if averaging is None or not inner.allocated:
            return
        faults = inner.updater.faults
        if inner.net.syncs_are_free and not faults.healthy():
            return
        inner.changes.follow(prepared=True)
        averaging.update(inner.update.parameters.named, faults.none_so_far(), epoch)

    def _fill_schedules(self, replay: int) -> None:
        inner = self.internals
        update, epoch = inner.clock.update + replay, inner.clock.epoch
        if inner.before_update is not None and not inner.updater.waits:
            inner.before_update(update)
        if inner.radius is not None:
            inner.update.regions.threat.eps.fill_(inner.radius.at(epoch))
        for part in self.plan.parts.values():
            part.schedule(update, epoch)

    # -- the first call -----------------------------------------------------------------------

    def _prepare(self, x: Tensor, y: Tensor) -> None:
        inner = self.internals
        self._require_epochs()
        checks.check_batch_of_one(self.model, x)
        classes = inner.preparation.look(x, y)
        inner.resolve_mode(x)
        if not inner.allocated:
            shape = (x.shape[1], x.shape[2], x.shape[3])
            inner.preparation.allocate(Allocated(shape, len(x), x.dtype, classes))
        inner.preparation.prepared = True

    def _require_epochs(self) -> None:
        if self.internals.clock.knows_epochs:
            return
        if self.internals.radius is not None:
            raise UserError(f"eps follows the epochs: {NAME_EPOCHS}")
        for slot, part in self.plan.parts.items():
            if part.follows_epochs():
                raise UserError(
                    f"{slot} {self.plan.slots[slot]!r} follows the epochs: {NAME_EPOCHS}"
                )

    def resolve_mode(self, x: Tensor) -> str:
        """Decide what mode "auto" means for batches like ``x`` (B,C,H,W), and return the mode. The
        first call of the step does it also."""
        return self.internals.resolve_mode(x)

    # -- for the caller -----------------------------------------------------------------------

    def check(self) -> None:
        """Raise ``TrainingError`` if a loss or gradient was not finite; waits for the device.

        Warns once if the gradient of the attack is zero for many images, so that it does not move
        them.
        """
        self.internals.updater.check()
        sentence = self.internals.update.unmoved.sentence_once()
        if sentence is not None:
            warn(sentence)

    def healthy(self) -> bool:
        """True if no update was bad so far; waits for the device."""
        return self.internals.updater.healthy()

    def advice(self) -> list[str]:
        """Warnings of the parts and of the attack about a run that looks wrong; waits for the
        device."""
        update = self.internals.clock.update
        sentences = [part.advice(update) for part in self.plan.parts.values()]
        sentences.append(self.internals.update.unmoved.sentence())
        return [sentence for sentence in sentences if sentence is not None]

    @contextmanager
    def evaluation_weights(self, batches: Iterable[Any] | None = None) -> Iterator[None]:
        """Within this context the model has the averaged weights, if the recipe averages and there
        is an average, otherwise the live ones.

        ``batches`` (of x, or tuples that start with it) re-estimate BatchNorm's statistics for
        the average. Everything is restored on exit.
        """
        inner, averaging = self.internals, self.plan.averaging
        inner.changes.follow(prepared=inner.allocated)
        started = averaging is not None and inner.allocated
        average = averaging.averaged() if averaging is not None and started else {}
        with averaged_weights(self.model, average, batches):
            yield

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside model and optimizer. The tensors are live, not
        copies."""
        return saved.state_of(self.internals)

    def load_state_dict(
        self, state: dict[str, Any], rank_local_state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Load a ``state_dict`` of the same recipe; also possible before the first call.

        With several processes only one saves its ``state_dict``; ``rank_local_state`` is what
        the method of that name returned in this process. Raises ``UserError`` for a state of other
        parts, another model or another data set.
        """
        saved.take_over(self.internals, state, rank_local_state)
