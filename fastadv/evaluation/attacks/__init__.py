"""Evaluation attacks: measure the robust accuracy of a trained model.

The files here are attacks on one batch; ``evaluation.search`` has the searches, whose batches an
image enters and leaves alone. PGD and CW are both: on one batch they take labels, losses and starts
of any kind; as searches they keep their batches full and can be joined with others.

``algorithms.adversaries`` also computes adversarial examples. Both packages exist because they
answer different questions under different constraints:

- An adversary of training must be fast. It may share forward passes with the loss, run with
  BatchNorm in training mode, keep perturbations per sample, attack intermediate layers, and it must
  be recordable as a CUDA graph (no branch on a tensor's value). Of several restarts it keeps the
  one with the largest loss.
- An attack of evaluation must be strong and comparable. The model is frozen and in eval mode; every
  sample's result is independent of the batch; a sample that a restart fooled counts as wrong, so
  restarts stop there (published forms that judge otherwise have names: ``names.WORDS``). It refuses
  models it cannot attack.

Shared is what must be equal: the threat model with its step, projection, random start and usual
step size (``fastadv.threat``), the input gradient (``engine.gradient``), the loss scaling of
float16 (``engine.model.network``) and the loss kernels (``kernels``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastadv.algorithms.user_loss import UserLoss, check_function
from fastadv.declared import coerce, parse_number
from fastadv.engine.model.outputs import Output
from fastadv.errors import NotFiniteError, UserError, brief
from fastadv.evaluation.attacks import clean, cw, fgsm, gaussian, inputs, pgd, searched
from fastadv.evaluation.attacks.names import AttackSpec, parse_attack
from fastadv.evaluation.attacks.problem import Problem
from fastadv.evaluation.attacks.watch import Watch
from fastadv.evaluation.search.engine import NOT_FINITE
from fastadv.evaluation.search.passes import Passes
from fastadv.kernels.reference import compute_dtype
from fastadv.ranges import outside, require_labels, require_plain
from fastadv.threat import Threat, usual_threat

__all__ = ["ATTACKS", "AttackSpec", "Problem", "attack", "parse_attack"]

ATTACKS: dict[str, Callable[[Problem, AttackSpec], Tensor]] = {
    "clean": clean.unchanged,
    "fgsm": fgsm.textbook,
    "fgsm-rwp": fgsm.of_rwp,
    "pgd": pgd.pgd,
    "cw": cw.of_rwp,
    "cw-margin": cw.of_bag_of_tricks,
    "noise": gaussian.add_noise,
}
"""Attacks on one batch: ``attack(problem, spec) -> x_adv``. The others are searches."""


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    name: str = "pgd",
    *,
    eps: float | str | Tensor | None = None,
    norm: str = "linf",
    threat: Threat | None = None,
    mask: Tensor | None = None,
    targeted: bool = False,
    alpha: float | str | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    random_start: bool | None = None,
    start: Tensor | None = None,
    objective: str | None = None,
    seed: int = 0,
    index: Tensor | None = None,
    amp: bool | str = False,
    criterion: UserLoss | None = None,
    output: Output = None,
) -> Tensor:
    """Adversarial examples x_adv, detached, in the shape and type of ``x``.

    ``x`` (B,C,H,W) float in [0,1] on the model's device; ``y`` (B,) integer class labels, those to
    reach if the attack is ``targeted``. ``name`` is an attack with its numbers
    (the command ``fastadv attacks`` lists them all):

    - one step or none: "clean", "noise-0.1" (standard deviation), "fgsm", "fgsm-rwp";
    - steps of one size: "pgd", "pgd-20" (steps), "pgd-50-10" (steps, restarts), "pgd-dlr-20" (with
      an objective), "cw", "cw-margin"; behind the numbers "stopped", "largest" and "unclipped" are
      the forms of released code (``fastadv attacks``): "pgd-10-5-largest", "pgd-20-unclipped";
    - searches: "apgd-ce", "apgd-dlr", "fab", "pma" (all four: steps, restarts), "apgd-t", "fab-t",
      "malt" (steps, targets), "square" (queries, restarts), "quick";
    - cascades: "autoattack", "autoattack-plus", "autoattack-rand", and searches joined by "+", such
      as "apgd-ce-50+square-1000", each for the images that those before it did not fool.

    ``norm`` is "linf" or "l2". ``eps`` and ``alpha`` are in pixels, a number or a string such as
    "8/255"; ``eps`` may be a tensor with one for each image, (B,). ``mask`` is a bool tensor (B or
    1,C or 1,H,W), true for the pixels that may move. ``threat`` is a ``fastadv.Threat`` in place of
    ``eps`` and ``norm``, for images in another range than [0,1] too. Searches and cascades take one
    eps and one range for all images and channels, and no mask; those that aim at classes ("apgd-t",
    "fab-t", "malt", "quick", and with them "autoattack") are not ``targeted``, nor is "kl".

    Defaults of options that are None: eps 8/255 in Linf, 128/255 in L2; alpha eps/4 (Linf) or
    15/128 eps (L2), eps for FGSM; 10 steps of PGD and "cw-margin", 5000 queries of Square, 100
    steps of the others; 9 targets, 2 restarts of PMA, one of the others; a random start, none for
    FGSM; objective "ce"; the others are "kl" (KL(f(x) || f(x'))), "margin" (that of the logits),
    "dlr", "logit-scaled" and "probability-margin". ``start`` (B,C,H,W) is an initial perturbation
    in pixels instead of the random one. Noise is drawn per row of ``index`` (B,) (0..B-1 if None)
    from ``seed``, so a sample's result does not depend on its batch. ``amp`` computes in "bf16"
    (True) or "fp16"; with False, in the model's own type, also inside the caller's autocast.

    A search leaves an image as it is that the model already gets wrong, ends at the first point
    that fools the model, and else gives the strongest point that it saw. PGD and CW give the last
    point of a run, that of the first of several runs that fools the model, else that of the largest
    loss; with "largest" that of the largest cross entropy, as released code has it, fooled or not.

    ``y`` may also be soft labels (B,classes), whose rows sum to 1, for attacks on the cross
    entropy. ``criterion(logits, y) -> (B,)`` is a loss of your own that "fgsm" and "pgd" maximise
    in its place; ``y`` is then any tensor (B,...). ``output`` says where the logits are in what the
    model returns (``fastadv.step``).

    The model is attacked in eval mode with frozen parameters. Its train flags, ``requires_grad``
    and the grad mode are restored afterwards. Works under ``no_grad`` and ``inference_mode``.

    Raises ``UserError`` for an unknown name or option, images outside of their range (rounding
    errors are clipped) and labels out of range, and ``NotFiniteError`` if outputs or a gradient are
    not finite: no attack is possible then. Searches and cascades warn as ``fastadv.evaluate`` does.
    """
    spec = parse_attack(name).with_options(
        steps=steps,
        restarts=restarts,
        alpha=None if alpha is None else parse_number(alpha, "alpha"),
        random_start=random_start,
        start=start,
        objective=objective,
    )
    if not isinstance(targeted, bool):
        raise UserError(f"targeted is True or False, not {brief(targeted)}.")
    threat = threat_of(threat, norm, eps)
    threat.require_step(spec.alpha)
    seed = coerce("seed", seed, int)
    any_labels = criterion is not None
    if any_labels:
        check_function("criterion", criterion)
    inputs.check_batch(x, y, any_labels=any_labels)
    inputs.require_followed(spec, y, criterion)
    if len(x) == 0:
        raise UserError("There is nothing to attack in an empty batch; give at least one image.")
    for named, tensor in (("start", start), ("index", index), ("mask", mask)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise UserError(f"{named} must be a tensor, not {brief(tensor)}.")
        if tensor is not None and tensor.device.type == "meta":
            raise UserError(f"{named} is on the device meta, without values.")
    require_plain(start=start, index=index)
    index = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
    _check_companions(x, start, index)
    threat = _for_images(threat, x, mask, targeted)
    searched.check(spec, threat)
    net = inputs.attacked_network(model, inputs.model_device(model, x.device), amp, output)
    with Passes(net, repeats=spec.repeats) as passes:
        x = inputs.plain(x)
        y = inputs.labels(y, x, any_labels=any_labels)
        largest = _checked_values(x, None if any_labels else y, threat)
        watch = Watch(x.device)
        problem = Problem(
            net,
            threat,
            threat.clip(x),
            y,
            inputs.plain(index),
            seed,
            start=None if start is None else inputs.plain(start).to(x),
            largest_label=largest,
            watch=watch,
            criterion=criterion,
            any_labels=any_labels,
        )
        if spec.only_searches:
            return searched.searched(passes, problem, spec)
        x_adv = ATTACKS[spec.kind](problem, spec).detach()
        if watch.bad | ~x_adv.isfinite().all():
            raise NotFiniteError(NOT_FINITE)
        return x_adv


def threat_of(threat: Threat | None, norm: str, eps: float | str | Tensor | None) -> Threat:
    """``threat``, or the ball of ``norm`` and ``eps``. Raises ``UserError`` if both are given.
    Waits for an eps that is a 0-dim tensor."""
    if threat is None:
        return usual_threat(norm, eps)
    if not isinstance(threat, Threat):
        raise UserError(
            f"threat must be a fastadv.Threat, such as Threat('l2'), not {brief(threat)}."
        )
    if eps is not None or norm not in ("linf", threat.norm):
        raise UserError("threat= has its own eps and norm; omit eps= and norm=.")
    if isinstance(threat.eps, Tensor) and not threat.eps.dim():
        return replace(threat, eps=float(threat.eps))  # its value may have been filled in since
    return threat


def _check_companions(x: Tensor, start: Tensor | None, index: Tensor) -> None:
    """Raise ``UserError`` if the shape of ``start`` or ``index`` does not fit ``x``."""
    if start is not None and start.shape != x.shape:
        raise UserError(
            f"start must have the images' shape {tuple(x.shape)}, not {tuple(start.shape)}."
        )
    if index.shape != x.shape[:1] or index.is_floating_point():
        raise UserError(
            f"index must hold one integer per image, shape ({len(x)},), not {tuple(index.shape)}."
        )


def _for_images(threat: Threat, x: Tensor, mask: Tensor | None, targeted: bool) -> Threat:
    """``threat`` with its own tensors on the device of ``x`` (B,...), and with ``mask`` and
    ``targeted``. Raises ``UserError`` if they do not fit. Waits for the values of eps."""
    eps = threat.eps
    if isinstance(eps, Tensor):
        if eps.dim() and len(eps) != len(x):
            raise UserError(f"eps has {len(eps)} values for {len(x)} images; give one for each.")
        # In the type of the arithmetic: a wider one would keep the kernels away.
        eps = inputs.plain(eps).to(x.device, compute_dtype(x.dtype))
        for extreme in eps.aminmax():
            replace(threat, eps=float(extreme))  # raises what it says of such a number
    mask = threat.mask if mask is None else mask
    threat = replace(
        threat,
        eps=eps,
        mask=None if mask is None else mask.to(x.device),
        targeted=targeted or threat.targeted,
    )
    threat.movable(x)  # raises if the mask does not fit
    return threat


def _checked_values(x: Tensor, y: Tensor | None, threat: Threat) -> int:
    """The largest label of classes ``y`` (B,), 0 for soft labels (B,classes) and for None;
    ``UserError`` for values out of range. Synchronises."""
    classes = [] if y is None or y.dim() != 1 else list(y.aminmax())
    strays, *ends = torch.stack([outside(x, *threat.ends(x)).long(), *classes]).tolist()
    if strays:
        raise UserError(inputs.box_sentence(threat))
    if not ends:
        if y is not None:
            require_labels(y, y.shape[1])
        return 0
    smallest, largest = ends
    if smallest < 0:
        raise UserError(f"Label {smallest} is out of range: labels run from 0.")
    return int(largest)
