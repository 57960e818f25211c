"""The user's model as the parts see it: forward passes in the present precision and BN mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastadv.engine.compiled import Runner
from fastadv.engine.gradient import backward_within, gradients_if_used
from fastadv.engine.model import fused_norm as norms
from fastadv.engine.model import guard, parameter_hooks, pending
from fastadv.engine.model.agreement import agree, draws_kept, host_draws_kept
from fastadv.engine.model.block_hooks import BlockHooks
from fastadv.engine.model.bn_counters import BatchNormCounters
from fastadv.engine.model.bn_fold import Fold
from fastadv.engine.model.bn_fold_search import seen_folds
from fastadv.engine.model.bn_momentum import DEFAULT_BN_UPDATES, BatchNormMomenta
from fastadv.engine.model.buffers import Layout, ModelLayout, copy_into, kept
from fastadv.engine.model.compiled_forward import CompiledForward
from fastadv.engine.model.double_backward import cheap_double_backward
from fastadv.engine.model.outputs import Output, check_output, logits_in
from fastadv.engine.model.padded_channels import image_convolutions
from fastadv.engine.model.padded_channels import is_on as pads_channels
from fastadv.engine.model.plain_errors import in_words
from fastadv.engine.model.precision import autocast
from fastadv.engine.model.recomputed import moves_buffers_backward
from fastadv.engine.model.strided_pointwise import pointwise, strides_taken_first
from fastadv.engine.model.structure import Structure
from fastadv.engine.model.untouched import untouched
from fastadv.engine.model.weight_copies import WeightCopies
from fastadv.engine.model.whole_norm import norms_of_probe
from fastadv.engine.process.division import Division
from fastadv.engine.process.host_memory import keep_freed_memory
from fastadv.errors import UserError, warn

Result = TypeVar("Result")


class Network:
    """``model`` with one forward function for every pass of a step.

    ``outer_dtype`` and ``attack_dtype`` are autocast dtypes (None: the model's own type). Logits
    are in float32, or in float64 if the model is. ``differentiates_twice`` is True if the outer
    pass differentiates a gradient. ``output`` says where the logits are in what the model returns
    (``outputs.py``); raises ``UserError`` if it cannot. ``fused_norm`` is True if BatchNorm, ReLU
    and residual sums run in own kernels where that is exact (``fused_norm_choice.py``).
    ``compiled`` compiles the passes of attacks (None: they are called as written). With a
    ``division`` every process is given the whole batch and computes the passes of its own rows;
    what comes out of a pass is that of the whole batch again.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        runner: Runner,
        outer_dtype: torch.dtype | None = None,
        attack_dtype: torch.dtype | None = None,
        *,
        differentiates_twice: bool = False,
        output: Output = None,
        fused_norm: bool = False,
        compiled: CompiledForward | None = None,
        division: Division | None = None,
    ) -> None:
        self.model = model
        self.output = check_output(output)
        self.device = device
        self.runner = runner
        self.outer_dtype = outer_dtype
        self.attack_dtype = attack_dtype
        self.block_hooks: BlockHooks | None = None
        self.differentiates_twice = differentiates_twice
        self.fused_norm = fused_norm
        self.compiled = compiled
        self._division = division
        self._attacks = False  # True within ``attacking``
        self._dtype = outer_dtype
        self.copies = WeightCopies(model)
        self.counters = BatchNormCounters(model)
        self.bn_momenta = BatchNormMomenta(self)
        self._fuses_anything = False  # True also once it was looked for
        self.looks = 0  # number of probes; a recording belongs to one of them
        self._recomputes = False  # True if a backward pass moves buffers (``recomputed``)
        self._spoils_input: bool | None = None  # True if the forward changes its input in place
        self._pads_channels = pads_channels()
        self.structure = Structure(model)
        self._pointwise = pointwise(self.structure.modules, device)
        self._is_compiled = norms.is_compiled(self.structure.modules)
        self._layout = ModelLayout()
        if device.type == "cpu":
            keep_freed_memory()

    def initialize(self, x: Tensor) -> None:
        """Let lazy modules create their parameters, by a pass of ``x`` (B,C,H,W) in eval mode."""
        if any(is_lazy(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())):
            with torch.no_grad(), guard.train_flags(self.model, False):
                self.logits(x)
            self._pointwise = pointwise(self.model.modules(), self.device)

    def probe(self, x: Tensor, bn_updates: Sequence[str] = DEFAULT_BN_UPDATES) -> Tensor:
        """The logits (B,classes) of ``x`` (B,C,H,W) in eval mode, from passes that also find out
        which BatchNorms can be folded in attacks with running statistics, which are called once,
        and if one pass of each kind is equivalent to all ``bn_updates``. The model and the
        generators are as before."""
        self.looks += 1
        self.bn_momenta.follow()
        with (
            untouched(self.model), kept(Layout(self.buffers)),
            draws_kept(self.device), host_draws_kept(), self._hooks_on(),
        ):  # fmt: skip
            logits = self._find_folds(x)
            if self.counters.any and not self._counters_are_unread(x):
                self.counters.leave()
            self.bn_momenta.probe(x, bn_updates)
            parameters = self.structure.parameters.values()
            with self.in_own_dtype(), guard.frozen(self.model, parameters, True):
                weight = next(p for p in self.model.parameters() if p.is_floating_point())
                self._recomputes = moves_buffers_backward(
                    self.model, self.logits, x.to(weight.dtype)
                )
        return logits

    def probe_evaluation(self, x: Tensor) -> None:
        """Find out with ``x`` (B,C,H,W) which BatchNorms can be folded in attacks with running
        statistics, from passes in eval mode alone and without gradients of weights. The model and
        the generators are as before."""
        self.looks += 1
        with (
            untouched(self.model), kept(Layout(self.buffers)),
            draws_kept(self.device), host_draws_kept(),
            guard.frozen(self.model, self.structure.parameters.values()),
        ):  # fmt: skip
            self._find_folds(x)

    def _find_folds(self, x: Tensor) -> Tensor:
        """The logits (B,classes) of ``x`` (B,C,H,W) in eval mode; finds what can be folded and
        padded in passes of this mode."""
        with guard.train_flags(self.model, False):
            logits, self.copies.folds = self._seen(x)
            if self._pads_channels:
                self._find_padded(x)
        if self.copies.folds and not self._folds_agree(x):
            self.copies.folds = []
        return logits

    def _find_padded(self, x: Tensor) -> None:
        """Find the convolutions whose images can be padded; none if the model cannot be asked."""
        self.copies.padded = []
        with suppress(Exception), torch.no_grad():
            self.copies.padded = image_convolutions(self.structure.modules, self.logits, x)
        self.copies.invalidate()

    def _counters_are_unread(self, x: Tensor) -> bool:
        """True if the model computes the same while the counters of its BatchNorms are
        detached."""

        def seen() -> Tensor:
            with draws_kept(self.device), host_draws_kept():
                return self.logits(x)

        try:
            with guard.train_flags(self.model, False), torch.no_grad():
                self.counters.move(7)  # the counters of a new model are 0, which would hide a read
                plain = seen()
                with self.counters.detached():
                    return torch.equal(plain, seen())
        except Exception:  # a model that fails here takes the slower, safe way
            return False

    def follow(self) -> bool:
        """True if the model has other modules or parameters than at the last call. Everything
        derived from the old ones is then dropped, and ``probe`` must be called."""
        changed = self.structure.look()
        if changed:
            self.bn_momenta.follow()
            self._pointwise = pointwise(self.structure.modules, self.device)
            self._is_compiled = norms.is_compiled(self.structure.modules)
            self.copies.invalidate()
            self.runner.forget()
        return changed

    def _backward_keeps_buffers(self) -> AbstractContextManager[None]:
        return backward_within(self.keeping_buffers) if self._recomputes else nullcontext()

    def _hooks_on(self) -> AbstractContextManager[None]:
        return nullcontext() if self.block_hooks is None else self.block_hooks.on()

    def _seen(self, x: Tensor) -> tuple[Tensor, list[Fold]]:
        try:
            with self.counters.calibrating():
                return seen_folds(self.model, self.logits, x)
        except UserError:
            raise
        except Exception:  # an error of the model comes again; one of the stand-ins does not
            with self.counters.calibrating(), torch.enable_grad():
                return self.logits(x.detach().requires_grad_()).detach(), []

    def _folds_agree(self, x: Tensor) -> bool:
        weight: Any = self.copies.folds[0].convolution.weight
        try:
            with self.in_own_dtype(), guard.frozen(self.model, self.structure.parameters.values()):
                return agree(
                    self.copies.folds,
                    self.logits,
                    lambda: self.copies.installed(None, folded=True),
                    x.to(weight.dtype),
                )
        except Exception:  # if they cannot be compared, nothing is folded
            return False

    @property
    def buffers(self) -> list[Tensor]:
        """The model's buffers, with the counters that are detached now."""
        return [*self.model.buffers(), *self.counters.tensors]

    @property
    def kept_buffers(self) -> Layout:
        """``buffers`` with their places, in which a forward pass may put another tensor."""
        return self._layout.of(self.structure.registries, self.counters.tensors)

    @property
    def syncs_are_free(self) -> bool:
        """True on CPU, where reading a tensor's value does not stall a device."""
        return self.device.type == "cpu"

    def loss_scale(self, batch_size: int) -> float:
        """The factor for a mean loss over ``batch_size`` images before its input gradient is
        computed, which would be zero in float16.

        The direction of an attack does not depend on it. Divide the gradient by it if its size
        matters.
        """
        return 128.0 * batch_size if self._dtype is torch.float16 else 1.0

    def run(self, region: Callable[..., Result], *inputs: Any) -> Result:
        """Call ``region``, or its compiled form if the step's mode compiles."""
        return self.runner(region, *inputs)

    def logits(self, x: Tensor, block_noise: list[Tensor] | None = None) -> Tensor:
        """The logits (B,classes) of ``x`` (B,C,H,W), with ``block_noise[b]`` added to the input of
        block b. Raises ``UserError`` if there are none in what the model returns."""
        own = x if self._division is None else self._division.own_rows(x)
        with autocast(self.device, self._dtype):
            logits = self._output(own, block_noise)
        self.counters.count()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self._division is None else self._division.all_rows(logits, len(x))

    def _output(self, x: Tensor, block_noise: list[Tensor] | None) -> Tensor:
        """The logits of the model, computed from a copy of ``x`` if it changes its input in
        place, or if that is not known yet."""
        given = x if self._spoils_input is False else x.clone()
        if torch.compiler.is_compiling():
            return self._forward(given, block_noise)
        folding = self.copies.folding
        version = 0 if given.is_inference() else given._version
        try:
            output = self._forward(given, block_noise)
            if self.fused_norm:
                pending.settle()
            repeat = bool(folding.folds) and folding.misread()
        except Exception as error:
            repeat = folding.misread(ended=False)
            if not repeat:
                sentence = in_words(error, self.model, x) or norms.of_compiled_code(error)
                if sentence is None:
                    raise
                raise sentence from error
        if repeat:
            return self._output(x, block_noise)
        spoils = not given.is_inference() and given._version != version
        if spoils and self._spoils_input is False:
            raise UserError(
                "The model's forward changes its input in place, which it did not do in its first "
                "pass: write x = x - mean in place of x.sub_(mean)."
            )
        self._spoils_input = self._spoils_input or spoils
        return output

    def _forward(self, x: Tensor, block_noise: list[Tensor] | None) -> Tensor:
        if block_noise is None or self.block_hooks is None:
            if self.compiled is None or not self._attacks:
                found = self.model(x)
            else:
                found = self.compiled(self.model, x, self._dtype)
            plain = isinstance(found, Tensor) and found.is_floating_point()
            if self.output is None and plain and found.layout is torch.strided:
                return found  # the usual case, without a call
            return logits_in(found, self.output)
        with self.block_hooks.adding(block_noise):
            return logits_in(self.model(x), self.output)

    def logits_of(self, model: nn.Module, x: Tensor) -> Tensor:
        """The logits (B,classes) of another network on ``x`` (B,C,H,W), in the precision of the
        outer pass, without a graph. They are at the same place in what it returns. Raises
        ``UserError`` if they are not (B,classes)."""
        own = x if self._division is None else self._division.own_rows(x)
        with torch.no_grad(), autocast(self.device, self.outer_dtype):
            logits = logits_in(model(own), self.output)
        if logits.ndim == 2 and len(logits) == len(own):
            logits = self.all_rows(logits, len(x))
        if logits.ndim != 2 or len(logits) != len(x):
            raise UserError(
                f"A teacher must return logits ({len(x)},classes) at the same place as the model, "
                f"not {tuple(logits.shape)}: wrap it."
            )
        return logits if logits.dtype == torch.float64 else logits.float()

    def all_rows(self, own: Tensor, total: int) -> Tensor:
        """What a pass of ``total`` images has seen in the network: ``own`` (b,...) itself, or with
        several processes that share a batch the rows (B,...) of all."""
        return own if self._division is None else self._division.all_rows(own, total)

    def for_own_rows(self, whole: Tensor) -> Tensor:
        """``whole``, of which something inside the network is computed; its gradient is then that
        of the whole batch."""
        return whole if self._division is None else self._division.for_own_rows(whole)

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Passes within this context are computed whole in every process, which send nothing: the
        few images of a probe."""
        around, self._division = self._division, None
        try:
            with norms_of_probe():
                yield
        finally:
            self._division = around

    def logits_and_block_inputs(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The logits (B,classes) of ``x`` (B,C,H,W), and the input of each block with a hook: those
        of the rows of this process."""
        if self.block_hooks is None:
            raise RuntimeError("no part asked for block_gradients, so no block has a hook")
        with self.block_hooks.reading() as seen:
            logits = self.logits(x)
        return logits, [seen[block] for block in range(self.block_hooks.count)]

    @contextmanager
    def in_own_dtype(self) -> Iterator[None]:
        """Passes within this context compute in the model's own type, so that rounding does not
        hide a difference."""
        around, self._dtype = self._dtype, None
        try:
            yield
        finally:
            self._dtype = around
            self.copies.invalidate()

    @contextmanager
    def attacking(self, bn: str) -> Iterator[None]:
        """Within this context parameters are frozen, the mode is ``bn`` ("train" or "eval"), and
        passes have the attack's precision."""
        train = bn == "train"
        self._dtype, self._attacks = self.attack_dtype, True
        try:
            with (
                guard.frozen(self.model, self.structure.parameters.values(), train),
                self.counters.detached(),
                self._hooks_on(),
                self.copies.installed(self.attack_dtype, folded=self._folds(train)),
                self._fusing(),  # after the folds, which want PyTorch's own BatchNorm
                self._backward_keeps_buffers(),
                nullcontext() if self.compiled is None else self.compiled.at_work(),
            ):
                yield
        finally:
            self._dtype, self._attacks = self.outer_dtype, False

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """Passes within this context, which is in ``attacking``, call the model and no compiled
        code."""
        around, self._attacks = self._attacks, False
        try:
            yield
        finally:
            self._attacks = around

    def _folds(self, train: bool) -> bool:
        # A compiler fuses BatchNorm itself, and stand-ins do not work inside a compiled graph.
        return not train and not self.runner.compiles

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within this context the model is in training mode, with gradients, for the outer pass."""
        self._dtype, fused_before = self.outer_dtype, norms.taken
        with (
            torch.enable_grad(),
            guard.train_flags(self.model, True),
            parameter_hooks.detached(self.structure.parameters.values()),
            self.counters.detached(),
            self._hooks_on(),
            self.copies.installed(self.outer_dtype, learn=self.structure.parameters),
            strides_taken_first(self._pointwise),
            self._norms(),
            self._backward_keeps_buffers(),
        ):
            yield
        if self.fused_norm and not self._fuses_anything:
            self._fuses_anything = True
            if norms.taken == fused_before and not self.runner.fused:
                self._tell_that_nothing_fuses()

    def _tell_that_nothing_fuses(self) -> None:
        warn(
            "fused_norm is on, but no BatchNorm of this model runs in fastadv's own kernels: they "
            "take (B,C,H,W) in channels_last and no float64; convert model and images by "
            ".to(memory_format=torch.channels_last)."
        )

    def _fusing(self) -> AbstractContextManager[object]:
        # A compiled region is changed as a graph, and the user's compiled code takes plain tensors.
        if not self.fused_norm or self.runner.compiles or self._is_compiled:
            return nullcontext()
        return norms.fusing(self.device)

    def _norms(self) -> AbstractContextManager[object]:
        if self.fused_norm:
            return self._fusing()
        # A compiler fuses the operations of PyTorch's own double backward.
        if not self.differentiates_twice or self.runner.compiles:
            return nullcontext()
        return cheap_double_backward(self.device)

    def gradients(
        self, loss: Tensor, weights: dict[str, Tensor], others: Sequence[Tensor] = ()
    ) -> list[Tensor | None]:
        """The gradients of the scalar ``loss`` with respect to the model's ``weights`` and to
        ``others``, in their shapes and types; None if the loss does not depend on the tensor.

        A weight with a low-precision copy in the model gets its gradient from the copy. With
        several processes that share a batch the gradients are those of the whole batch.
        """
        if self._division is not None:
            found = self._own_gradients(loss, weights, others)
            summed = self._division.add_up(found[: len(weights)], list(weights.values()))
            return [*summed, *found[len(weights) :]]
        if not self.copies.learning:
            return gradients_if_used(loss, [*weights.values(), *others])
        return self._own_gradients(loss, weights, others)

    def _own_gradients(
        self, loss: Tensor, weights: dict[str, Tensor], others: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """``gradients`` of the images of this process."""
        names = [name for name in weights if name in self.copies.learning]
        copies = [self.copies.learning[name] for name in names]
        padded = {n: w for n, w in self.copies.learning_padded.items() if n in weights}
        found = gradients_if_used(loss, [*weights.values(), *others, *copies, *padded.values()])
        count = len(weights) + len(others)
        own = dict(zip(weights, found, strict=False))
        of_copies, of_padded = found[count : count + len(copies)], found[count + len(copies) :]
        low = {n: g for n, g in zip(names, of_copies, strict=True) if g is not None}
        wide = [torch.empty_like(weights[name]) for name in low]
        copy_into(wide, list(low.values()))
        found_wide = list(zip(low, wide, strict=True))
        for name, of_all in zip(padded, of_padded, strict=True):
            if of_all is not None:
                # A slice has gaps in memory: copied together with others, each would be a launch.
                of_own = of_all[:, : weights[name].shape[1]]
                found_wide.append((name, torch.empty_like(weights[name]).copy_(of_own)))
        for name, gradient in found_wide:
            also = own[name]
            own[name] = gradient if also is None else gradient + also
        return [*own.values(), *found[len(weights) : count]]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Passes within this context use BatchNorm's running statistics; gradients are not
        changed."""
        with guard.train_flags(self.model, False):
            yield

    @contextmanager
    def keeping_buffers(self) -> Iterator[None]:
        """Passes within this context do not change the model's buffers, such as BatchNorm's running
        statistics."""
        with kept(self.kept_buffers):
            yield
