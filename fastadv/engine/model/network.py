"""The user's model as the parts see it: forward passes in the moment's precision and BN mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastadv.engine.compiled import Runner
from fastadv.engine.gradient import gradients_if_used
from fastadv.engine.model import guard, parameter_hooks
from fastadv.engine.model.agreement import agree, draws_kept, host_draws_kept
from fastadv.engine.model.block_hooks import BlockHooks
from fastadv.engine.model.bn_counters import BatchNormCounters
from fastadv.engine.model.bn_folding import Fold, seen_folds
from fastadv.engine.model.bn_momentum import DEFAULT_BN_UPDATES, BatchNormMomenta
from fastadv.engine.model.buffers import Layout, ModelLayout, copy_into, kept
from fastadv.engine.model.double_backward import cheap_double_backward
from fastadv.engine.model.plain_errors import in_words
from fastadv.engine.model.precision import autocast
from fastadv.engine.model.strided_pointwise import pointwise, strides_taken_first
from fastadv.engine.model.structure import Structure
from fastadv.engine.model.untouched import untouched
from fastadv.engine.model.weight_copies import WeightCopies
from fastadv.engine.process.host_memory import keep_freed_memory
from fastadv.errors import UserError

Result = TypeVar("Result")


class Network:
    """``model`` with one forward function for every pass of a step.

    ``outer_dtype`` and ``attack_dtype`` are autocast dtypes (None: the model's own). Logits come
    back in float32, or wider where the model is. ``differentiates_twice``: the outer pass
    differentiates a gradient.
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
    ) -> None:
        self.model = model
        self.device = device
        self.runner = runner
        self.outer_dtype = outer_dtype
        self.attack_dtype = attack_dtype
        self.taps: BlockHooks | None = None
        self.differentiates_twice = differentiates_twice
        self._dtype = outer_dtype
        self.copies = WeightCopies(model)
        self.counters = BatchNormCounters(model)
        self.bn_momenta = BatchNormMomenta(self)
        self.looks = 0  # how often the model was looked at; a recording belongs to one of them
        self._spoils_input: bool | None = None  # whether the forward changes it in place
        self.structure = Structure(model)
        self._pointwise = pointwise(self.structure.modules, device)
        self._layout = ModelLayout()
        if device.type == "cpu":
            keep_freed_memory()

    def initialize(self, x: Tensor) -> None:
        """Lazy modules have their parameters after this pass of ``x`` (B,C,H,W) in eval mode."""
        if any(is_lazy(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())):
            with torch.no_grad(), guard.train_flags(self.model, False):
                self.logits(x)
            self._pointwise = pointwise(self.model.modules(), self.device)

    def probe(self, x: Tensor, passes: Sequence[str] = DEFAULT_BN_UPDATES) -> Tensor:
        """Logits of ``x`` (B,C,H,W) in eval mode, to learn the network by: their number of
        classes, which BatchNorms fold away in attacks that use running statistics, which are
        called once, and whether one pass of each kind can stand for all ``passes``. It leaves no
        trace in the model and in generators."""
        self.looks += 1
        self.bn_momenta.follow()
        with (
            untouched(self.model), kept(Layout(self.buffers)),
            draws_kept(self.device), host_draws_kept(), self._tapped(),
        ):  # fmt: skip
            with guard.train_flags(self.model, False):
                logits, self.copies.folds = self._seen(x)
            if self.copies.folds and not self._folds_agree(x):
                self.copies.folds = []
            if self.counters.any and not self._counters_are_unread(x):
                self.counters.leave()
            self.bn_momenta.probe(x, passes)
        return logits

    def _counters_are_unread(self, x: Tensor) -> bool:
        """True if the model computes the same while the BatchNorms' counters are detached."""

        def seen() -> Tensor:
            with draws_kept(self.device), host_draws_kept():
                return self.logits(x)

        try:
            with guard.train_flags(self.model, False), torch.no_grad():
                self.counters.move(7)  # a counter of a new model may look like none
                plain = seen()
                with self.counters.detached():
                    return torch.equal(plain, seen())
        except Exception:  # a model that fails here takes the slower, safe way
            return False

    def follow(self) -> bool:
        """True if the model has other modules or parameters than at the last call; what was learnt
        from the old ones is forgotten then, and ``probe`` is due."""
        changed = self.structure.look()
        if changed:
            self.bn_momenta.follow()
            self._pointwise = pointwise(self.structure.modules, self.device)
            self.copies.invalidate()
            self.runner.forget()
        return changed

    def _tapped(self) -> AbstractContextManager[None]:
        return nullcontext() if self.taps is None else self.taps.on()

    def _seen(self, x: Tensor) -> tuple[Tensor, list[Fold]]:
        try:
            with self.counters.calibrating():
                return seen_folds(self.model, self.logits, x)
        except UserError:
            raise
        except Exception:  # of the model, and then again, or of what is no tensor like others
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
        except Exception:  # not known to agree
            return False

    @property
    def buffers(self) -> list[Tensor]:
        return [*self.model.buffers(), *self.counters.tensors]

    @property
    def kept_buffers(self) -> Layout:
        """``buffers``, with the places where a forward pass may hang another tensor."""
        return self._layout.of(self.structure.modules, self.counters.tensors)

    @property
    def syncs_are_free(self) -> bool:
        """True on CPU, where reading a tensor's value does not stall a device."""
        return self.device.type == "cpu"

    def loss_scale(self, batch_size: int) -> float:
        """What to multiply a mean loss by for its input gradient, which float16 flushes to zero.

        An attack's direction does not depend on it; divide by it where the size is needed.
        """
        return 128.0 * batch_size if self._dtype is torch.float16 else 1.0

    def run(self, region: Callable[..., Result], *inputs: Any) -> Result:
        """Run a region of straight tensor code in the step's mode."""
        return self.runner(region, *inputs)

    def logits(self, x: Tensor, block_noise: list[Tensor] | None = None) -> Tensor:
        """Logits (B,classes) of ``x`` (B,C,H,W), with ``block_noise[b]`` added inside block b."""
        with autocast(self.device, self._dtype):
            logits = self._output(x, block_noise)
        self.counters.count()
        if not isinstance(logits, Tensor):
            raise UserError(
                f"The model must return logits (B,classes), not a {type(logits).__name__}; wrap it."
            )
        return logits if logits.dtype == torch.float64 else logits.float()

    def _output(self, x: Tensor, block_noise: list[Tensor] | None) -> Any:
        """What the model returns, computed from a copy of ``x`` where it changes that in place."""
        given = x if self._spoils_input is False else x.clone()
        if torch.compiler.is_compiling():
            return self._forward(given, block_noise)
        folding = self.copies.folding
        version = 0 if given.is_inference() else given._version
        try:
            output = self._forward(given, block_noise)
            repeat = bool(folding.folds) and folding.misread()
        except Exception as error:
            repeat = folding.misread(ended=False)
            if not repeat:
                sentence = in_words(error, self.model, x)
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

    def _forward(self, x: Tensor, block_noise: list[Tensor] | None) -> Any:
        if block_noise is None or self.taps is None:
            return self.model(x)
        with self.taps.adding(block_noise):
            return self.model(x)

    def logits_of(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits of another network, in the outer pass's precision, without a graph."""
        with torch.no_grad(), autocast(self.device, self.outer_dtype):
            logits = model(x)
        return logits if logits.dtype == torch.float64 else logits.float()

    def logits_and_block_inputs(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the tensor entering each tapped block."""
        if self.taps is None:
            raise RuntimeError("no part asked for block_gradients, so no block is tapped")
        with self.taps.reading() as seen:
            logits = self.logits(x)
        return logits, [seen[block] for block in range(self.taps.count)]

    @contextmanager
    def in_own_dtype(self) -> Iterator[None]:
        """Passes inside compute in the model's own type, where rounding hides no difference."""
        around, self._dtype = self._dtype, None
        try:
            yield
        finally:
            self._dtype = around
            self.copies.invalidate()

    @contextmanager
    def attacking(self, bn: str) -> Iterator[None]:
        """Parameters frozen, BN in mode ``bn`` ("train" or "eval"), the attack's precision."""
        train = bn == "train"
        self._dtype = self.attack_dtype
        try:
            with (
                guard.frozen(self.model, self.structure.parameters.values(), train),
                self.counters.detached(),
                self._tapped(),
                self.copies.installed(self.attack_dtype, folded=self._folds(train)),
            ):
                yield
        finally:
            self._dtype = self.outer_dtype

    def _folds(self, train: bool) -> bool:
        # A compiler fuses what BatchNorm is made of; it could not see who else reads a fold.
        return not train and not self.runner.compiles

    @contextmanager
    def training(self) -> Iterator[None]:
        """Training mode and gradients for the outer pass."""
        self._dtype = self.outer_dtype
        with (
            torch.enable_grad(),
            guard.train_flags(self.model, True),
            parameter_hooks.detached(self.structure.parameters.values()),
            self.counters.detached(),
            self._tapped(),
            self.copies.installed(self.outer_dtype, learn=self.structure.parameters),
            strides_taken_first(self._pointwise),
            self._norms(),
        ):
            yield

    def _norms(self) -> AbstractContextManager[object]:
        # A compiler fuses what PyTorch's own is made of.
        if not self.differentiates_twice or self.runner.compiles:
            return nullcontext()
        return cheap_double_backward(self.device)

    def gradients(
        self, loss: Tensor, weights: dict[str, Tensor], others: Sequence[Tensor] = ()
    ) -> list[Tensor | None]:
        """Gradients of the scalar ``loss`` at the model's ``weights`` and at ``others``, in their
        shapes and types; None where the loss does not depend on it.

        A weight that a low-precision copy stands for has its gradient from there.
        """
        if not self.copies.learning:
            return gradients_if_used(loss, [*weights.values(), *others])
        names = [name for name in weights if name in self.copies.learning]
        copies = [self.copies.learning[name] for name in names]
        found = gradients_if_used(loss, [*weights.values(), *others, *copies])
        count = len(weights) + len(others)
        own = dict(zip(weights, found, strict=False))
        low = {n: g for n, g in zip(names, found[count:], strict=True) if g is not None}
        wide = [torch.empty_like(weights[name]) for name in low]
        copy_into(wide, list(low.values()))
        for name, gradient in zip(low, wide, strict=True):
            also = own[name]
            own[name] = gradient if also is None else gradient + also
        return [*own.values(), *found[len(weights) : count]]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Running BatchNorm statistics for the passes inside, gradients as they are."""
        with guard.train_flags(self.model, False):
            yield

    @contextmanager
    def keeping_buffers(self) -> Iterator[None]:
        """Passes inside do not move BatchNorm's running statistics."""
        with kept(self.kept_buffers):
            yield
