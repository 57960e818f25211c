"""A process with a step or an attack on the CPU keeps the memory it frees."""

import os
import platform
import subprocess
import sys

import pytest

from fastadv.engine.process.host_memory import SETTINGS

# If memory is returned, every round faults; if it is kept, the heap may grow once more.
MANY, FEW = 100_000, 20_000

# glibc moves its thresholds with what it sees; set, they stay, and blocks this large go back.
HANDED_BACK = """
import ctypes
for threshold in (-1, -3):
    ctypes.CDLL(None).mallopt(threshold, 2**17)
"""
# Page faults of ten rounds that allocate and free blocks of 4 to 16 MiB, as a pass does.
ROUNDS = """
import resource
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def round():
    a = torch.ones(2**22)
    b = a * 2
    del a
    c = b + 1
    d = torch.ones(2**20)
    del b, c
    e = torch.ones(2**21)
for _ in range(3):
    round()
before = faults()
for _ in range(10):
    round()
print(faults() - before)
"""
ATTACK = """
import torch
import fastadv
from torch import nn
model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
fastadv.attack(model, torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), "fgsm")
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")


def faults(program, **settings):
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"OMP_NUM_THREADS": "1"} | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@glibc
def test_after_an_attack_freed_memory_is_reused():
    assert faults(HANDED_BACK + ROUNDS) > MANY
    assert faults(HANDED_BACK + ATTACK + ROUNDS) < FEW


@glibc
def test_environment_variables_have_precedence():
    assert faults(ATTACK + ROUNDS, MALLOC_TRIM_THRESHOLD_="131072") > MANY
