"""A substitute (Papernot et al., 2017): a small network that learns the classes which the network
on trial gives to the images, and to adversarial images of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastadv.evaluation.sanity.trial import Trial

ROUNDS = 4
UPDATES = 80  # in each round
BATCH = 64
ATTACK = "pgd-10"
CHANNELS = 24
SIDE = 32  # pixels; larger images are strided over


class Substitute:
    """Learns the answers of the network of ``trial`` and attacks it, in ``ROUNDS`` rounds."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        with torch.random.fork_rng([]):
            torch.manual_seed(trial.seed)
            self.network = _small(trial.x, trial.logits.shape[1]).to(trial.x)
        self.draws = torch.Generator().manual_seed(trial.seed)

    def fooled(self) -> Tensor:
        """(n,) bool: an adversarial image of the substitute fools the network, in any round."""
        trial = self.trial
        optimizer = torch.optim.Adam(self.network.parameters(), lr=3e-3)
        points, answers = [trial.x], [trial.logits.argmax(1)]
        fooled = torch.zeros(len(trial), dtype=torch.bool, device=trial.x.device)
        for _ in range(ROUNDS):
            self._learn(torch.cat(points), torch.cat(answers), optimizer)
            seen = trial.attacked(ATTACK, 0, model=self.network)
            fooled |= ~seen.right
            points.append(seen.x)
            answers.append(seen.logits.argmax(1))
        return fooled

    def _learn(self, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.network.train()
        with torch.inference_mode(False), torch.enable_grad():
            for _ in range(UPDATES):
                rows = torch.randint(len(x), (BATCH,), generator=self.draws).to(x.device)
                optimizer.zero_grad()
                nn.functional.cross_entropy(self.network(x[rows]), y[rows]).backward()
                optimizer.step()


def _small(x: Tensor, classes: int) -> nn.Module:
    """A network of two convolutions for images like ``x`` (n,C,H,W)."""
    stride = max(1, max(x.shape[2:]) // SIDE)
    return nn.Sequential(
        nn.Conv2d(x.shape[1], CHANNELS, 2 * stride + 1, stride, padding=stride),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, 2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(2 * CHANNELS * 16, classes),
    )
