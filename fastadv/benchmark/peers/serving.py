"""The peer's side of the protocol: read requests, answer each with one line of JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from fastadv.benchmark.clock import seconds, seconds_per_step
from fastadv.benchmark.setting import Setting

Build = Callable[[Setting, str], Callable[[], Any]]
"""From a setting and BatchNorm's mode in the attack to a function that trains one step."""


def serve(build: Build, package: str) -> None:
    """Answer until the request to quit. ``package`` is the distribution whose version is sent."""
    # Output that libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    training: Callable[[], Any] | None = None
    device = torch.device("cpu")
    for line in sys.stdin:
        request = json.loads(line)
        operation = request.pop("op")
        if operation == "quit":
            return
        answer: dict[str, Any]
        try:
            if operation == "setup":
                torch.set_num_threads(request["threads"])
                setting = Setting(**request["setting"])
                device = torch.device(setting.device)
                training = build(setting, request["attack_bn"])
                warm = [seconds(training, device) for _ in range(request["warm_calls"])]
                answer = {"warm_seconds": warm, "version": version(package)}
            elif training is None:
                answer = {"error": "it was asked for a step before its setup"}
            else:
                answer = {"seconds": seconds_per_step(training, device)}
        except Exception as error:
            # Any error here is reported by the other process.
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
