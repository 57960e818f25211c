"""TF32 is a choice of the run, and torch's own setting returns afterwards."""

import subprocess
import sys
import time

import pytest
import torch

from fastadv.engine.model.precision import tf32
from fastadv.run.console import Console
from fastadv.run.request import RunRequest
from fastadv.run.train import train


def flags():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("allowed", [True, False, None])
def test_tf32_is_restored(allowed):
    before = flags()
    with tf32(allowed):
        assert flags() == (before if allowed is None else (allowed, allowed))
    assert flags() == before


STARTS = (
    "",
    "torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'ieee'",
    "torch.backends.cudnn.fp32_precision = 'ieee'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
)
ASK = """
import os, sys
import torch
from fastadv.engine.model.precision import float32_settings as settings, tf32
def ask(start):
    exec(start)
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    for allowed in (None, True, False):
        before = settings()
        with tf32(allowed):
            found = [place.fp32_precision == "tf32" for place in (products, convolutions)]
            assert allowed is None or found == [allowed, allowed], (allowed, found)
        assert settings() == before, (allowed, before, settings())
    if not start:
        torch.backends.fp32_precision = "ieee"  # what followed it still does
        assert products.fp32_precision == "ieee", settings()
for number, start in enumerate(sys.argv[1:], 1):
    child = os.fork()
    if child == 0:
        ask(start)
        os._exit(0)  # an error leaves by another way, with its traceback and code 1
    if os.waitpid(child, 0)[1]:
        sys.exit(f"start {number}: {start}")
print("asked", number)
"""


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has one interface")
def test_settings_of_either_interface_are_restored():
    """Each start in its own process: what the newer interface has set, not everything can
    undo. They are forks of one, which imports torch once."""
    asked = [sys.executable, "-c", ASK, *STARTS]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"asked {len(STARTS)}\n"), done.stderr


# The number makes a graph that the cache does not hold yet. An empty cache would do as well, but
# torch compiles its own headers for it again, which takes half a minute.
COMPILED_TWICE = """
import sys
import torch
from torch._dynamo.utils import counters
from fastadv.engine.model.precision import tf32
def compiled():
    counters.clear()
    torch._dynamo.reset()
    number = float(sys.argv[1])
    torch.compile(lambda x: x.sin() + number)(torch.ones(8))
    names = ("fxgraph_cache_hit", "fxgraph_cache_miss")
    return [counters["inductor"][name] for name in names]
assert compiled() == [0, 1]
for allowed in (False, True):
    with tf32(allowed):
        pass
    assert compiled() == [1, 0], (allowed, torch.backends.cuda.matmul.fp32_precision)
"""


@pytest.mark.slow
def test_what_is_compiled_afterwards_is_found_in_the_cache():
    """The settings are part of a compiler's key, on a machine without a GPU as well."""
    asked = [sys.executable, "-c", COMPILED_TWICE, str(time.time())]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("allowed", [True, False])
def test_a_run_trains_and_evaluates_with_it(allowed, tmp_path, monkeypatch):
    seen = []
    forward = torch.nn.Conv2d.forward
    monkeypatch.setattr(
        torch.nn.Conv2d, "forward", lambda *a: (seen.append(flags()), forward(*a))[1]
    )
    config = RunRequest(width=2, epochs=1, limit=64, test_limit=32, tf32=allowed)
    before = flags()
    train(RunRequest(**vars(config) | {"out": str(tmp_path / "run")}), Console())
    assert set(seen[1:]) >= {(allowed, allowed)}
    assert seen[-1] == (allowed, allowed)
    assert flags() == before
