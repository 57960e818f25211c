"""VGG-16 with BatchNorm, for small images."""

from typing import ClassVar

from torch import Tensor, nn

from fastadv.models.common import make_dropout

_PLAN: tuple[tuple[int, int], ...] = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))


class VGG(nn.Module):
    """13 convolutions in five groups, each followed by a max-pooling, and one linear layer.

    Pixels (B,in_channels,H,W) in [0,1] to logits (B,num_classes). Simonyan and Zisserman 2014,
    configuration D, with torchvision's indices in ``features`` and the single classifier usual on
    CIFAR. Pooling rounds up, which has no effect at 32x32 and allows smaller images.
    ``dropout`` acts before the classifier.
    """

    # The four layers of RAT's VGG-16 experiments: convolutions 1-3, 4-6, 7-10, 11-13, each with
    # its BN. The published lists put features.31, the BN of convolution 10, in layer 4; there AWP
    # touched convolutions only, so that made no difference.
    stage_prefixes: ClassVar[tuple[tuple[str, ...], ...]] = tuple(
        tuple(f"features.{index}" for index in indices)
        for indices in (
            (0, 1, 3, 4, 7, 8),
            (10, 11, 14, 15, 17, 18),
            (20, 21, 24, 25, 27, 28, 30, 31),
            (34, 35, 37, 38, 40, 41),
        )
    )

    def __init__(
        self,
        *,
        num_classes: int = 10,
        width: int = 64,
        in_channels: int = 3,
        dropout: float = 0.0,
        normalize: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize or nn.Identity()
        layers: list[nn.Module] = []
        channels = in_channels
        for factor, repeats in _PLAN:
            for _ in range(repeats):
                # The bias is redundant before BN; published parameter counts include it.
                layers += [
                    nn.Conv2d(channels, factor * width, 3, padding=1),
                    nn.BatchNorm2d(factor * width),
                    nn.ReLU(),
                ]
                channels = factor * width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.dropout = make_dropout(dropout)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(self.normalize(x)).mean((2, 3))
        return self.linear(self.dropout(out))


def vgg16(
    *,
    num_classes: int = 10,
    width: int = 64,
    in_channels: int = 3,
    dropout: float = 0.0,
    normalize: nn.Module | None = None,
) -> VGG:
    """VGG-16 with BatchNorm; ``width`` is the first group's channels (published: 64)."""
    return VGG(
        num_classes=num_classes,
        width=width,
        in_channels=in_channels,
        dropout=dropout,
        normalize=normalize,
    )
