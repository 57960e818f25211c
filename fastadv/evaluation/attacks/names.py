"""Attacks by name, with numbers as the literature writes them: pgd-20, pgd-50-10, noise-0.1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from fastadv.declared import NonNegative, Passes, Positive, check_fields, coerce, declared
from fastadv.errors import UserError, unknown
from fastadv.evaluation.search.catalogue import CASCADES, REPEATS, SEARCHES, is_cascade

_PGD_OPTIONS = frozenset({"alpha", "steps", "restarts", "random_start", "start"})
OPTIONS: dict[str, frozenset[str]] = {
    **{
        name: frozenset(("steps", "restarts")[: 2 - search.aims] if search.takes_numbers else ())
        for name, search in SEARCHES.items()
    },
    "clean": frozenset(),
    "fgsm": frozenset({"alpha", "random_start", "start"}),
    "fgsm-rwp": frozenset({"alpha", "random_start", "start"}),
    "pgd": _PGD_OPTIONS | {"objective"},
    "cw": _PGD_OPTIONS,
    "cw-margin": _PGD_OPTIONS,
    "noise": frozenset(),
    "cascade": frozenset(),
}
"""Every kind of attack, and which options of ``fastadv.attack`` it takes."""

WORDS = {
    "stopped": "an image is no longer moved once it is fooled (robust_overfitting: pgd-10-stopped)",
    "largest": (
        "the run with the largest cross entropy is judged, not the first that fools the network: "
        "all runs are made, and the accuracy is the same or higher (RWP and AWP: pgd-10-5-largest; "
        "fast_adversarial: pgd-50-10-stopped-largest; Bag of Tricks: cw-margin-10-10-largest)"
    ),
    "unclipped": (
        "a start may leave the range of images, in which every step ends (TRADES, APART, MEM: "
        "pgd-20-unclipped)"
    ),
}
"""What may follow the numbers of PGD and CW, and what it changes: forms of released code."""

OTHERS = {
    "clean": ("", "the images as they are"),
    "fgsm": ("", "one step of eps along the sign of the gradient (Goodfellow et al., 2015)"),
    "fgsm-rwp": ("", "one step of 2 eps from a random point, as in the tables of RWP"),
    "noise": ("SIGMA", "Gaussian noise of this standard deviation in pixels, whatever eps is"),
}
"""Attacks that are no searches: the number they take, and what they compute."""

BATCHWISE = ("pgd", "cw", "cw-margin")
"""Searches that are also attacks on one batch: with labels, starts and masks of any kind."""

EXAMPLES = (
    *(kind for kind in OPTIONS if kind != "cascade"),
    *CASCADES,
    *("pgd-20", "pgd-50-10", "pgd-dlr-20", "cw-20", "noise-0.1", "apgd-ce-50-5", "apgd-ce+apgd-t"),
    *("pgd-10-5-largest", "pgd-10-5-stopped-largest", "pgd-20-unclipped"),
)


Objective = Literal["ce", "kl", "margin", "dlr", "logit-scaled", "probability-margin"]


@dataclass(frozen=True)
class AttackSpec:
    """An attack with its options; None means the attack's own default.

    ``kind`` is a key of ``OPTIONS``; ``alpha`` is in pixels, ``sigma`` the standard deviation of
    Gaussian noise in pixels; ``objective`` is what PGD maximises. ``restarts`` of a search that
    aims are its targets. ``stopped``, ``largest`` and ``unclipped`` are the ``WORDS``. ``parts``:
    the searches of a cascade. ``repeats`` passes are averaged into each gradient.
    """

    name: str
    kind: str
    steps: Passes | None = None
    restarts: Passes | None = None
    sigma: NonNegative | None = None
    alpha: Positive | None = None
    random_start: bool | None = None
    objective: Objective | None = None
    stopped: bool = False
    largest: bool = False
    unclipped: bool = False
    parts: tuple[AttackSpec, ...] = ()
    repeats: int = 1

    @property
    def searches(self) -> tuple[AttackSpec, ...]:
        """The searches it consists of: its parts, or itself; none for another kind of attack."""
        if self.kind == "cascade":
            return self.parts
        return (self,) if self.kind in SEARCHES else ()

    @property
    def only_searches(self) -> bool:
        """True if it consists of searches and is no attack on one batch."""
        return bool(self.searches) and self.kind not in BATCHWISE

    @property
    def follows_alpha(self) -> bool:
        """True if it, or a search of the cascade, has several steps of one size (PGD and CW)."""
        if self.parts:
            return any(part.follows_alpha for part in self.parts)
        return {"alpha", "steps"} <= OPTIONS[self.kind]

    def __post_init__(self) -> None:
        options = ("steps", "restarts", "sigma", "alpha", "random_start", "objective")
        check_fields(self, options)

    def with_options(self, **options: Any) -> AttackSpec:
        """The attack with the options that are not None.

        Raises ``UserError`` for an option the attack does not take, or one that contradicts the
        name.
        """
        given = {option: value for option, value in options.items() if value is not None}
        for option, value in given.items():
            if option not in OPTIONS[self.kind]:
                raise UserError(f"The attack {self.name!r} takes no {option}; omit it.")
            if option == "start":
                continue
            value = given[option] = coerce(option, value, declared(AttackSpec)[option])
            named = getattr(self, option, None)
            if named is not None and named != value:
                raise UserError(
                    f"{option}={value} contradicts the name {self.name!r}; give {option} only once."
                )
        given.pop("start", None)  # a tensor: part of the problem, not of the attack
        return replace(self, **given)


def parse_attack(name: str) -> AttackSpec:
    """``"pgd-20"`` (steps), ``"pgd-50-10"`` (steps, restarts), ``"pgd-dlr-20"`` (with an
    objective), ``"pgd-10-5-largest"`` (with ``WORDS``), ``"cw-20"``, ``"noise-8/255"`` ...

    Raises ``UserError`` for an unknown name, with the nearest known one, for invalid numbers, and
    for what is no text.
    """
    if not isinstance(name, str):
        raise UserError(
            f"An attack is named by a text such as 'pgd-20', not by a {type(name).__name__}; "
            "fastadv.evaluate takes several."
        )
    text = name.strip().lower()
    if is_cascade(text):
        names = CASCADES.get(text, text).split("+")
        if not all(map(str.strip, names)):
            raise UserError(f"{name!r} lacks an attack beside a '+': write it as apgd-ce+square.")
        parts = tuple(map(parse_attack, names))
        for part in parts:
            if part.kind not in SEARCHES:
                raise UserError(
                    f"{part.name!r} cannot be joined by '+': that is for {', '.join(SEARCHES)}."
                )
        return AttackSpec(name.strip(), "cascade", parts=parts, repeats=REPEATS.get(text, 1))
    kinds = [kind for kind in OPTIONS if text == kind or text.startswith(kind + "-")]
    if not kinds or kinds == ["cascade"]:
        raise _unknown(name)
    kind = max(kinds, key=len)
    numbers = text[len(kind) + 1 :]
    objective = None
    if kind == "pgd":
        objective, numbers = _objective(numbers)
    if kind == "noise":
        return AttackSpec(name.strip(), kind, sigma=_sigma(numbers))
    numbers, words = _words(name, kind, numbers)
    if not numbers and "--" not in text and not text.endswith("-"):
        return AttackSpec(name.strip(), kind, objective=objective, **words)
    if "steps" not in OPTIONS[kind]:
        raise UserError(f"The attack {kind!r} takes no number, but was given {name!r}.")
    counts = numbers.split("-")
    if len(counts) > 2 or not all(count.isdecimal() for count in counts):
        search = SEARCHES[kind]
        first, second = search.numbers
        usual = f"{kind}-{search.default_steps}"
        behind = ", ".join(_words_of(kind))
        raise UserError(
            f"{name!r} is not {kind}-{first} or {kind}-{first}-{second}, such as {usual} or "
            f"{usual}-{max(2, search.default_segments)}"
            + (f"; behind the numbers may be: {behind}." if behind else ".")
        )
    restarts = int(counts[1]) if len(counts) == 2 else None
    return AttackSpec(
        name.strip(), kind, steps=int(counts[0]), restarts=restarts, objective=objective, **words
    )


def _unknown(name: str) -> UserError:
    """The error for an unknown name. Its beginning says more than its spelling: apgd is not pgd,
    and autoattack-standard is not autoattack-rand."""
    text = name.strip().lower()
    bases = [text, *(each for each in CASCADES if text.startswith(f"{each}-"))]
    family = [
        each
        for each in (*SEARCHES, *CASCADES)
        if each in bases or any(base and each.startswith(f"{base}-") for base in bases)
    ]
    if not family:
        return unknown("attack", name, EXAMPLES)
    return UserError(f"Unknown attack {name!r}; did you mean {' or '.join(map(repr, family))}?")


def _objective(text: str) -> tuple[Any, str]:
    """The objective that ``text`` begins with, or None, and what follows it."""
    for objective in get_args(Objective):
        if text == objective or text.startswith(f"{objective}-"):
            return objective, text[len(objective) + 1 :]
    return None, text


def _words_of(kind: str) -> list[str]:
    """Which of ``WORDS`` an attack of ``kind`` takes."""
    return [word for word in WORDS if kind in SEARCHES and word in SEARCHES[kind].options]


def _words(name: str, kind: str, text: str) -> tuple[str, dict[str, Any]]:
    """What stands before the words at the end of ``text``, and these. Raises ``UserError`` for
    words that change nothing, or do not fit each other."""
    rest, known, words = text.split("-"), _words_of(kind), dict[str, Any]()
    while rest and rest[-1] in known and rest[-1] not in words:
        words[rest.pop()] = True
    if "largest" in words and len(rest) < 2:
        raise UserError(
            f"{name!r} has no number of restarts among which to choose: write it as "
            f"{kind}-10-5-largest, or omit 'largest'."
        )
    if {"stopped", "unclipped"} <= words.keys():
        raise UserError(
            f"{name!r} could end at a start outside of the range of images: omit 'stopped' or "
            "'unclipped'."
        )
    return "-".join(rest), words


def _sigma(text: str) -> float:
    if not text:
        raise UserError("noise needs its standard deviation in pixels, as in noise-0.1.")
    return float(coerce("The standard deviation of noise", text, NonNegative))
