"""The plan of a GPU session: its calls, their stages in order, and the seconds of each.

A machine may be available for fifteen minutes, including its start. So there are two calls (and a
third if time is left), and the stages are ordered by importance: an interrupted call misses only
the least important numbers. Only Python's standard library is imported, so that the suite starts
fast and a broken package stops single stages, not the suite.
"""

from dataclasses import dataclass

CALLS = {"smoke": 105, "rest": 590, "train": 330}  # time limit of each, in seconds
LEAST = 5.0  # a stage is not begun with fewer seconds left
PACK_EVERY = 15.0  # seconds


@dataclass(frozen=True)
class Stage:
    """One process. ``seconds``: its time limit; its results up to then are kept."""

    name: str
    call: str
    seconds: int
    finds: str


PLAN = (
    Stage("smoke", "smoke", 100, "which modes run, one kernel against its reference"),
    Stage("tests", "rest", 70, "every test that needs a GPU"),
    Stage("parity", "rest", 55, "one step: compiled, captured and own BatchNorm against eager"),
    Stage("pgd-512", "rest", 100, "PGD-10 at batch 512: captured, passes, eager, compiled, loops"),
    Stage("fused-512", "rest", 90, "PGD-10 and APART with own BatchNorm kernels and PyTorch's"),
    Stage("replay-512", "rest", 35, "each kernel of one captured replay: time, bytes, share"),
    Stage("single-512", "rest", 55, "APART and F+FGSM at 512, with their passes"),
    Stage("pgd-128", "rest", 70, "PGD-10 at batch 128 in every mode, with both BatchNorms"),
    Stage("pgd-eval-512", "rest", 30, "PGD-10 with BatchNorm in eval mode in the attack"),
    Stage("methods-512", "rest", 40, "TRADES, AWP, RWP and AdvLC, captured without compiling"),
    Stage("peers-128", "rest", 80, "published loops with and without TF32, torchattacks, ART"),
    Stage("kernels", "rest", 45, "every kernel against its reference and a copy of its bytes"),
    Stage("wide-128", "rest", 30, "WRN-34-10, captured without compiling"),
    Stage("train-fast", "train", 140, "F+FGSM for 15 epochs of CIFAR-10"),
    Stage("evaluation", "train", 130, "AutoAttack and PGD-100 of that network beside others"),
    Stage("train-apart", "train", 320, "APART for as many epochs as fit"),
    Stage("variants-128", "inductor", 90, "PGD-10 at 128 with what is off: padded, combined"),
    Stage("inductor", "inductor", 300, "whether other settings of the compiler are faster"),
)


def stages_of(call: str) -> list[Stage]:
    """The stages of ``call`` in order."""
    return [stage for stage in PLAN if stage.call == call]
