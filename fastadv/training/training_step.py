"""The training step that a user calls: it checks the batch, counts calls and epochs, and makes the
updates.

The order of one update is in ``update.py``. After a call the train flags and requires_grad of the
user's model, and the grad mode, are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastadv import ranges
from fastadv.algorithms.contract import RankLocal
from fastadv.algorithms.plan import Plan
from fastadv.by_epoch import ByEpoch
from fastadv.data.view import View
from fastadv.declared import CountOrZero, Positive, checked, coerce
from fastadv.engine.model.averaged_weights import averaged_weights
from fastadv.engine.model.outputs import Output
from fastadv.engine.process import distributed
from fastadv.errors import UserError, brief
from fastadv.models.wrapped import inner_module
from fastadv.threat import Threat
from fastadv.training import checks, saved
from fastadv.training.calls import Calls
from fastadv.training.divided import put_together
from fastadv.training.inputs import Given
from fastadv.training.internals import Internals
from fastadv.training.memory import full_memory_told
from fastadv.training.settings import Execution, Precision, RunLength


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
        self._calls = Calls(self.internals)
        for part in plan.parts.values():
            part.in_step = True

    def __repr__(self) -> str:
        threat = f"{self.threat.norm}, eps {self.threat.nominal:.4g}"
        precision = self.internals.precision
        return f"<fastadv.Step {self.plan.method}: {threat}, {precision}, {self.internals.runs_as}>"

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
                "step.threat is a fastadv.Threat, such as Threat('linf', 8/255), not "
                f"{brief(threat)}."
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
        """The part of ``state`` that differs between ranks; with ``bn="global"`` nothing does."""
        if self.internals.division is not None:
            return {}
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
        classes have none), "clean_accuracy" (the same at x, where the loss forwards x) and
        "grad_norm".

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
        the same holds for values out of range. If a call raises, everything is as before that call;
        on any device that is full it raises a ``torch.OutOfMemoryError``.
        """
        if not isinstance(update, bool):
            raise UserError(f"update is True or False, not {brief(update)}.")
        if view is not None and not isinstance(view, View):
            raise UserError(f"view is a fastadv.View of the images, not {brief(view)}.")
        given = Given(x, y, index, start, second, eps, alpha, mask, targets)
        if self.internals.division is None:
            return self._trained(given, view, update)
        with self.internals.in_division():
            whole, view = put_together(
                self.internals.division, given, view, update, self.internals.net.device
            )
            return self._trained(whole, view, update)

    def _trained(self, given: Given, view: View | None, update: bool) -> dict[str, Tensor]:
        """A call with the batch ``given`` (``__call__``)."""
        x, y, index, start, second, eps, alpha, mask, targets = given
        inner = self.internals
        keeps_rows = self._plan.keeps_sample_state
        inner.changes.follow_to_train(prepared=inner.allocated)
        labels = self._plan.labels
        if self._plan.class_reader:
            checks.check_labels_read(x, y, self._plan.class_reader)
        checks.check_shapes(inner.net.device, x, y, index, needs_index=keeps_rows, labels=labels)
        if labels == "classes" and y.ndim != 1:
            checks.refuse_soft(self._plan.hard_labels_only)
        checks.check_companions(x, start=start, second=second)
        adversary = self._plan.adversary
        checks.check_radii(x, takes_alpha=adversary.takes_alpha, eps=eps, alpha=alpha)
        threat = inner.update.regions.threat
        checks.check_own_threat(x, threat, eps, mask)
        checks.check_mask(x, mask)
        checks.check_targets(y, targets, targeted=threat.targeted)
        if update:
            checks.check_accumulation(self._optimizer)
        else:
            self._calls.require_accumulation()
        with torch.inference_mode(False):
            inputs = self._calls.checked(Given(*ranges.usable(*given)))
            if not inner.preparation.prepared:
                with inner.net.undivided():
                    inner.net.initialize(inputs.x[:2])
            known = inner.net.structure.trusted() if inner.preparation.prepared else nullcontext()
            rows = inputs.rows if keeps_rows else None
            around = inner.transaction.around(rows)
            with full_memory_told(inputs.x), known, around as buffers:
                return self._calls.run(inputs, buffers, view=view, update=update)

    # -- time ---------------------------------------------------------------------------------

    @property
    def epoch(self) -> float:
        """The position in the run in epochs, with a fraction if the length of an epoch is known."""
        return self.internals.clock.epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch`` (from 0). Not needed with ``steps_per_epoch``, which then decides. Raises
        ``UserError`` for another value."""
        epoch = coerce("epoch", epoch, CountOrZero)
        ended = self.internals.clock.begin(epoch)
        if ended is not None:
            self._calls.end_epoch(ended)

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
        self._calls.check()

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
        the average, unless the recipe averages them also. Everything is restored on exit.
        """
        inner, averaging = self.internals, self.plan.averaging
        inner.changes.follow(prepared=inner.allocated)
        started = averaging is not None and inner.allocated
        average = averaging.averaged() if averaging is not None and started else {}
        estimated = averaging is None or not averaging.averages_buffers
        with averaged_weights(self.model, average, batches if estimated else None, inner.division):
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
