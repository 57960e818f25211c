"""One call of a step, with checked inputs: the updates that it makes, and what begins and ends with
them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.algorithms.contract import Batch
from fastadv.data.view import View
from fastadv.engine.model.buffers import Snapshot
from fastadv.engine.model.precision import autocast, surrounding
from fastadv.engine.process import distributed
from fastadv.errors import UserError, warn
from fastadv.training import checks
from fastadv.training.divided import require_group_before
from fastadv.training.inputs import Given, Inputs, batch_of, looked_at, two_views
from fastadv.training.internals import Internals
from fastadv.training.preparation import Allocated
from fastadv.training.together import bring_together

CHECK_EVERY_CALLS = 100  # between two checks of the fault flag, each of which waits for the device
# More than the images of an update in one process; rows without index are numbered in steps of it.
ROWS_OF_A_PROCESS = 1 << 22
NAME_EPOCHS = (
    "pass total_steps= and steps_per_epoch=, or call set_epoch(epoch) before the first batch of "
    "each."
)


class Calls:
    """Makes the updates of each call with the pieces ``internals``."""

    def __init__(self, internals: Internals) -> None:
        self.internals, self.plan = internals, internals.plan
        called = [*map(type, self.plan.parts.values()), internals.before_update]
        known = [getattr(each, "__module__", "") or "" for each in called if each is not None]
        # True if no code of the user runs before the passes of an update.
        self._only_own = all(module.startswith("fastadv.") for module in known)

    @property
    def _views(self) -> int:
        """The number of images that are trained on for each image of a call."""
        return 2 if "second_view" in self.plan.needs else 1

    def checked(self, given: Given) -> Inputs:
        """``given`` with values in range; see ``looked_at``."""
        inner, others = self.internals, 0
        if given.index is None and distributed.sharing() > 1:
            others = distributed.rank() * ROWS_OF_A_PROCESS
        return looked_at(
            given,
            threat=inner.update.regions.threat,
            classes=inner.preparation.known_classes,
            labels=self.plan.labels,
            num_samples=inner.length.num_samples,
            faults=inner.updater.faults.before,
            syncs_are_free=inner.net.syncs_are_free,
            first=not inner.preparation.prepared,
            # Without index the images of all calls of an update are numbered one after another,
            # and those of each process after those of the one before.
            first_row=inner.updater.images_waiting // self._views + others,
            homes=inner.passes.homes(given.x, given.y),
        )

    def run(
        self, inputs: Inputs, buffers: Snapshot, *, view: View | None, update: bool
    ) -> dict[str, Tensor]:
        """A call with checked inputs; the caller restores what it changed if it raises."""
        inner, (x, y) = self.internals, inputs[:2]
        if inner.preparation.prepared:
            inner.preparation.look_again(x, y)
        else:
            self.prepare(x, y)
        two = self._views == 2
        batch = batch_of(inputs, inner.offset, inner.update.regions.threat, view, self.plan.labels)
        whole = batch._replace(view=None) if two else batch
        for part in self.plan.sized:
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
                if not self._only_own:
                    inner.net.structure.distrust()
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
        several = distributed.sharing() > 1
        if several or inner.division is not None:
            require_group_before(inner.division, inner.bn)
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
        metrics = {
            "loss": results.loss,
            "accuracy": results.accuracy,
            "clean_accuracy": results.clean_accuracy,
            "grad_norm": norm,
        }
        return _copied({name: value for name, value in metrics.items() if value is not None})

    def require_accumulation(self) -> None:
        """Raise ``UserError`` if a call cannot leave its gradient for a later one."""
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

    def _close_epoch(self) -> None:
        ended = self.internals.clock.ended()
        if ended is not None:
            self.end_epoch(ended)

    def end_epoch(self, epoch: int) -> None:
        """Average the weights at the end of ``epoch`` (from 0)."""
        inner, averaging = self.internals, self.plan.averaging
        if averaging is None or not inner.allocated:
            return
        faults = inner.updater.faults
        if inner.net.syncs_are_free and not faults.healthy():
            return
        inner.changes.follow(prepared=True)
        averaging.update(inner.update.parameters.averaged(), faults.none_so_far(), epoch)

    def _fill_schedules(self, replay: int) -> None:
        inner = self.internals
        update, epoch = inner.clock.update + replay, inner.clock.epoch
        if inner.before_update is not None and not inner.updater.waits:
            inner.before_update(update)
        if inner.radius is not None:
            inner.update.regions.threat.eps.fill_(inner.radius.at(epoch))
        for part in self.plan.scheduled:
            part.schedule(update, epoch)

    def prepare(self, x: Tensor, y: Tensor) -> None:
        """Get ready for batches like ``x`` (B,C,H,W) and ``y`` in the first call."""
        inner = self.internals
        self._require_epochs()
        checks.check_batch_of_one(inner.net.model, x)
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

    def check(self) -> None:
        """See ``Step.check``."""
        self.internals.updater.check()
        sentence = self.internals.update.unmoved.sentence_once()
        if sentence is not None:
            warn(sentence)


def _copied(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of 0-dim tensors; one launch if they have one type."""
    values = list(metrics.values())
    if values[0].device.type == "cpu" or len({value.dtype for value in values}) > 1:
        return {name: value.clone() for name, value in metrics.items()}
    return dict(zip(metrics, torch.stack(values).unbind(), strict=True))
