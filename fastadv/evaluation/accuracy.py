"""Accuracy of a model under attacks, as the papers' tables report it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.algorithms.user_loss import UserLoss, check_function
from fastadv.declared import Positive, coerce, parse_number
from fastadv.engine.model.compiled_forward import CompiledForward
from fastadv.engine.model.outputs import Output
from fastadv.engine.process import distributed
from fastadv.errors import UserError, brief, warn
from fastadv.evaluation.attacks import inputs, searched, threat_of
from fastadv.evaluation.attacks.names import AttackSpec, parse_attack
from fastadv.evaluation.found import Found
from fastadv.evaluation.metric import Metric
from fastadv.evaluation.scores import Scores
from fastadv.evaluation.tally import Halt, Sink, Tally
from fastadv.threat import Threat


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: Sequence[str] = ("clean", "pgd-20"),
    *,
    eps: float | str | None = None,
    norm: str = "linf",
    threat: Threat | None = None,
    alpha: float | str | None = None,
    seed: int = 0,
    amp: bool | str = False,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
    shared: bool = False,
    criterion: UserLoss | None = None,
    metric: Metric | None = None,
    output: Output = None,
    search_dtype: str = "float32",
    mode: str = "auto",
) -> Scores:
    """Accuracy in [0,1] under each of ``attacks``, from one pass over ``batches``.

    Returns ``Scores``: a dictionary from attack name to accuracy, with ``n``, the number of images,
    ``interval(name)``, the 95 % interval, and ``verdicts``, the ``Verdicts`` on every image by
    attack name, where labels are classes; their ``index`` counts the images of ``batches``.

    ``batches`` yields (x, y): ``x`` (B,C,H,W) float in [0,1], ``y`` (B,) classes. For attack
    names and for the defaults of ``eps`` and ``norm`` see ``fastadv.attack``. ``threat`` is a
    ``fastadv.Threat`` in their place, which must fit every batch: its mask (1,C or 1,H,W) holds for
    all images, and it has no eps for each image and no targets. ``alpha`` (pixels) is the step
    size of PGD and CW (None: their default). ``amp`` computes in "bf16" (True) or "fp16".
    ``device`` is the model's if None. ``progress(images)`` is called after each batch with the
    number of images taken so far. With ``shared`` the processes of
    the default group, which must all call this with the same images, take the batches in turn and
    all return the accuracy on all images.

    ``y`` may also be soft labels (B,classes), whose rows sum to 1; their class is the largest
    entry. ``criterion(logits, y) -> (B,)`` is a loss of your own that "fgsm" and "pgd" maximise in
    place of the cross entropy; ``y`` is then any tensor (B,...). ``metric(logits, y) -> (B,)``
    replaces the accuracy: bool values say what is right, float values are averaged, and the
    interval is that of the normal distribution. Searches and cascades, which follow classes, take
    neither. ``output`` says where the logits are in what the
    model returns (``fastadv.step``).

    ``search_dtype`` is the precision in which searches, PGD and CW look for adversarial examples:
    "float32" (the model's own) or "bf16". With "bf16" every example that counts is confirmed in the
    model's own precision, and what a cascade leaves robust is attacked once more in it.
    ``mode``: on CUDA searches are replayed as CUDA graphs ("auto", "captured"), with compiled
    passes ("compiled"), or called ("eager"). On a CPU they are called, with the model as written
    ("auto", "eager") or compiled ("compiled"), which each call of ``evaluate`` does anew: for long
    evaluations. A model that cannot be compiled runs as written, after a warning.

    Robust accuracy is the share of all images whose x_adv is classified correctly. FGSM, PGD, CW
    and noise also attack the images that are misclassified without an attack, as in the papers:
    counting them as wrong directly would give a lower number if an attack happens to correct one.
    The other attacks count them as wrong, as AutoAttack does. An image that is fooled is not
    searched further, which changes no count.

    The model runs in eval mode and its state is restored. Image number i of the pass draws the
    same noise for every batch size. In PGD, CW and searches an image waits until a batch is full,
    and leaves it when its verdict is known, so that nearly all passes are of full batches. On CUDA
    the host waits for no iteration: it looks at the verdicts while later ones run.

    Raises ``UserError`` for unknown attacks, no images, images outside of their range and labels
    out of range, ``NotFiniteError`` for outputs or gradients that are not finite. Warns, with the
    share of images, if gradients were exactly zero or the softmax so saturated that the loss is
    exactly zero, if Square fools the network where all gradients failed, if the outputs look like
    probabilities, and if they change from call to call: the reported accuracy is too high then.
    Also warns of an ``alpha`` that none of the attacks follows.
    """
    specs = specs_of(attacks, alpha)
    warn_of_ignored_alpha(specs, alpha)
    if progress is not None and not callable(progress):
        raise UserError(f"progress is a function of the images so far, not {brief(progress)}.")
    after = None if progress is None else (lambda tally: progress(tally.images))
    options: dict[str, Any] = {"eps": eps, "norm": norm, "alpha": alpha, "seed": seed}
    options["threat"] = threat
    options |= {"criterion": criterion, "metric": metric, "output": output}
    options |= {"search_dtype": search_dtype, "mode": mode}
    tally = _attacked(
        model, batches, attacks, **options, amp=amp, device=device, shared=shared, after=after
    )
    found = tally.found(shared=shared)
    counts = found.counts()
    for sentence in counts.remarks():
        warn(sentence)
    means = tally.means.scores(counts.attacks, shared=shared) if tally.means is not None else None
    if means is not None:
        return means
    scores = counts.scores()
    facts = {"norm": tally.threat.norm, "eps": float(tally.threat.nominal), "seed": seed}
    facts |= {"weights": "", "images": ""}  # not known here
    for name in scores:
        step = alpha if specs[name].follows_alpha else None
        verdicts = found.verdicts(name, {"attack": name, "alpha": step, **facts})
        if verdicts is not None:
            scores.verdicts[name] = verdicts
    return scores


def verdicts_of(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: Sequence[str],
    *,
    shared: bool = False,
    **options: Any,
) -> Found:
    """What is behind ``evaluate``, with its ``options``; a pass can be interrupted and continued.

    ``after(tally)`` is called after each batch, ``between(tally)`` before each and before every
    step of a search. Either may raise ``Halt``: the verdicts so far are returned then. What
    ``tally.found()`` returns can be passed as ``done`` to another call with the same images:
    verdicts that it holds are not computed again, and in a cascade no search that an image has
    passed. ``examples``: where the adversarial examples of an attack go. ``compiled``: what mode
    "compiled" compiles on a CPU; given to several calls with one unchanged model, it is compiled
    once.
    """
    return _attacked(model, batches, attacks, shared=shared, **options).found(shared=shared)


def _attacked(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: Sequence[str],
    *,
    eps: float | str | None,
    norm: str,
    alpha: float | str | None,
    seed: int,
    threat: Threat | None = None,
    amp: bool | str = False,
    device: torch.device | str | None = None,
    shared: bool = False,
    criterion: UserLoss | None = None,
    metric: Metric | None = None,
    output: Output = None,
    search_dtype: str = "float32",
    mode: str = "auto",
    compiled: CompiledForward | None = None,
    done: Found | None = None,
    after: Callable[[Tally], None] | None = None,
    between: Callable[[Tally], None] = lambda tally: None,
    examples: Mapping[str, Sink] | None = None,
) -> Tally:
    """The tally of all batches; see ``verdicts_of``."""
    specs = specs_of(attacks, alpha)
    threat = threat_of(threat, norm, eps)
    _require_one_for_all(threat)
    for spec in specs.values():
        for part in spec.parts or (spec,):
            threat.require_step(part.alpha)
        searched.check(spec, threat)
    seed = coerce("seed", seed, int)
    where = inputs.model_device(model, torch.device("cpu")) if device is None else device
    for name, function in (("criterion", criterion), ("metric", metric)):
        if function is not None:
            check_function(name, function)
    if metric is not None:
        for spec in specs.values():
            inputs.require_measured(spec)
    repeats = {spec.repeats for spec in specs.values() if spec.searches}
    if len(repeats) > 1:
        raise UserError(
            "autoattack-rand averages its gradients: evaluate it without other searches."
        )
    passes = inputs.attack_passes(
        model, inputs.device_called(where), amp, output,
        search_dtype=search_dtype, mode=mode, repeats=max(repeats, default=1),
        compiled=compiled,
    )  # fmt: skip
    with passes:
        ledgers = None if done is None else done.ledgers
        tally = Tally(passes, threat, specs, seed, criterion, metric, ledgers, examples)
        processes, own = (distributed.world_size(), distributed.rank()) if shared else (1, 0)
        if done is not None:
            tally.resume_from(done)
        passes.between = lambda: between(tally)
        try:
            for number, batch in enumerate(_iterated(batches)):
                x, y = _pair(batch, any_labels=tally.any_labels)
                if number % processes == own and tally.lacks(len(x)):
                    between(tally)
                    tally.add(x, y)
                tally.images += len(x)
                tally.commit()
                if after is not None:
                    after(tally)
            tally.finish()
        except Halt:
            tally.halted = True
        return tally


def _require_one_for_all(threat: Threat) -> None:
    """Raise ``UserError`` unless ``threat`` can be that of every batch and counts accuracy."""
    if threat.targeted:
        raise UserError(
            "evaluate counts images that keep their class; attack with targets in fastadv.attack."
        )
    if isinstance(threat.eps, Tensor) and threat.eps.dim():
        raise UserError(
            "evaluate takes one eps for all images; attack each batch with its own eps in "
            "fastadv.attack."
        )
    if threat.mask is not None and len(threat.mask) != 1:
        raise UserError(
            f"evaluate takes one mask (1,C or 1,H,W) for all images, not "
            f"{tuple(threat.mask.shape)}."
        )


def specs_of(names: Sequence[str] | str, alpha: float | str | None = None) -> dict[str, AttackSpec]:
    """The attacks by their given ``names``, or by one text with commas. ``alpha`` is the step of
    PGD and CW. Raises ``UserError`` for unknown names and for no step."""
    names = names.split(",") if isinstance(names, str) else names
    if not isinstance(names, Sequence) or isinstance(names, bytes):
        raise UserError(f"attacks are names, such as ['clean', 'pgd-20'], not {brief(names)}.")
    specs: dict[str, AttackSpec] = {}
    for given in names:
        name = given.strip() if isinstance(given, str) else parse_attack(given).name
        if name == "":
            raise UserError(
                "A name in the list of attacks is empty: name at least one attack, such as 'clean' "
                "or 'pgd-20', and put single commas between them."
            )
        if name in specs:
            raise UserError(f"The attack {name!r} is named twice; name each once.")
        specs[name] = parse_attack(name)
    if not specs:
        raise UserError("Name at least one attack, such as 'clean' or 'pgd-20'.")
    if alpha is None:
        return specs
    step = coerce("alpha", parse_number(alpha, "alpha"), Positive)
    return {name: _with_step(spec, step) for name, spec in specs.items()}


def _with_step(spec: AttackSpec, alpha: float) -> AttackSpec:
    """``spec`` with the step ``alpha``, or with that of its parts, where they follow it."""
    if spec.parts:
        return replace(spec, parts=tuple(_with_step(part, alpha) for part in spec.parts))
    return replace(spec, alpha=alpha) if spec.follows_alpha else spec


def warn_of_ignored_alpha(specs: Mapping[str, AttackSpec], alpha: object) -> None:
    """Warn if an ``alpha`` was given, not None, that none of the attacks ``specs`` follows."""
    if alpha is None or any(spec.follows_alpha for spec in specs.values()):
        return
    names = list(specs)
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    warn(
        f"alpha is the step of pgd, cw and cw-margin, and ignored by {listed}: omit it, or name "
        "one of those attacks."
    )


def _iterated(batches: object) -> Iterable[Any]:
    """``batches``; raises ``UserError`` unless they can be iterated over."""
    if isinstance(batches, Iterable) and not isinstance(batches, (str, bytes, Mapping, Tensor)):
        return batches
    raise UserError(
        "Batches to evaluate are pairs (images, labels) in a list, a loader or a generator, not "
        f"{brief(batches)}."
    )


def _pair(batch: object, *, any_labels: bool) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise UserError("Batches to evaluate must be pairs (images, labels).")
    x, y = batch
    inputs.check_batch(x, y, any_labels=any_labels)
    return x, y
