"""A type checker sees the signatures of the references through ``fastadv.kernels``."""

import re
from contextlib import chdir
from pathlib import Path

import pytest
from mypy import api

ROOT = Path(__file__).parents[2]
# One program for mypy; a comment contains the error of its line, other lines must have none.
PROGRAM = """
import torch
from fastadv import kernels

x = torch.rand(2, 3, 4, 4)
rows = torch.arange(2)

kernels.linf_step("nonsense", 3)  # error: [call-arg] [arg-type] [arg-type]
kernels.linf_step(x, x, x, "fast", 0.1)  # error: [arg-type]
kernels.linf_step(x, x, x, 0.1)  # error: [call-arg]
kernels.crop_flip(x, rows, rows, rows, rows > 0, (4, 4), padding="edge")  # error: [arg-type]
kernels.block_noise([x])  # error: [call-arg]
kernels.linf_stop(x, x, x, 0.1, 0.1)  # error: [attr-defined]
kernels.trades_kl(x, x).no_such_method()  # error: [attr-defined]

kernels.linf_step(x, x, x, 0.1, 0.1)
kernels.linf_step(x, grad=x, x=x, alpha=torch.tensor(0.1), eps=0.1, high=2.0)
kernels.crop_flip(x, rows, rows, rows, rows > 0, (4, 4), padding="reflect", channels_last=True)
kernels.perturb_weights([x], (x,), 0.1, "global")

reveal_type(kernels.linf_step)  # note: def (x_adv: Tensor, grad: Tensor, x: Tensor, \
alpha: float | Tensor, eps: float | Tensor, low: float =, high: float =) -> Tensor
reveal_type(kernels.noise_uniform)  # note: def (index: Tensor, shape: Sequence[int], \
seed: Tensor | int, offset: Tensor | int, stream: int =, dtype: dtype =) -> Tensor
reveal_type(kernels.masked_ce)  # note: def (logits: Tensor, y: Tensor, c_min: float | Tensor) \
-> tuple[Tensor, Tensor]
reveal_type(kernels.block_signs)  # note: def (gradients: Sequence[Tensor]) -> list[Tensor]
reveal_type(kernels.restore_weights)  # note: def (weights: Sequence[Tensor], \
originals: Sequence[Tensor], v: Sequence[Tensor])
reveal_type(kernels.backends)  # note: def (device: device | str) -> dict[str, tuple[str, str]]
"""
LINES = PROGRAM.splitlines()
EXPECTED = {
    number: line.partition("  # ")[2] for number, line in enumerate(LINES, 1) if "  # " in line
}


def plain(signature: str) -> str:
    """A type as mypy writes it, without modules."""
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", signature)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[tuple[str, str]]]:
    """Line -> what mypy says of it: (error or note, the code or the type)."""
    file = tmp_path_factory.mktemp("types") / "program.py"
    file.write_text(PROGRAM)
    with chdir(ROOT):  # where mypy looks for its configuration, its cache and fastadv
        output, trouble, _ = api.run(["--no-error-summary", "--no-pretty", str(file)])
    assert not trouble
    found: dict[int, list[tuple[str, str]]] = {}
    for number, kind, message in re.findall(r"program\.py:(\d+): (\w+): (.*)", output):
        found.setdefault(int(number), []).append((kind, message))
    return found


@pytest.mark.parametrize("number", EXPECTED)
def test_mypy_sees_the_signature(said: dict[int, list[tuple[str, str]]], number: int) -> None:
    kind, wanted = EXPECTED[number].split(": ", 1)
    messages = [message for found, message in said[number] if found == kind]
    if kind == "error":
        assert [re.findall(r"\[[a-z-]+\]$", message)[0] for message in messages] == wanted.split()
    else:
        (message,) = messages
        assert plain(message) == f'Revealed type is "{wanted}"'


def test_mypy_accepts_correct_calls(said: dict[int, list[tuple[str, str]]]) -> None:
    assert set(said) == set(EXPECTED)
