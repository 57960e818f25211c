"""Small networks of the families of timm and torchvision, for images of 32x32 or 64x64 pixels.

GhostNet is not among them: with its initial weights the logits hardly depend on the image, so the
gradient of TRADES' KL is 1e-15, and its sign is rounding, which no two ways of computing share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from fastadv.engine.torchvision_shim import import_torchvision

CLASSES = 4


class Architecture(NamedTuple):
    """``build()`` makes the network for images of ``size`` x ``size`` pixels."""

    build: Callable[[], nn.Module]
    size: int


def timm(name: str, size: int = 32, *, sized: bool = False, **options: Any) -> Architecture:
    """A network of timm; ``sized`` if it is built for one size of images."""

    def build() -> nn.Module:
        import_torchvision()  # timm imports it
        import timm

        if sized:
            options["img_size"] = size
        return timm.create_model(name, num_classes=CLASSES, **options)

    return Architecture(build, size)


def torchvision(make: Callable[[Any], nn.Module], size: int = 32) -> Architecture:
    """A network of torchvision; ``make`` gets ``torchvision.models``."""
    return Architecture(lambda: make(import_torchvision().models), size)


STAGES = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8}
TOKENS = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "sized": True}


def _resnet(models: Any) -> nn.Module:
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def _densenet(models: Any) -> nn.Module:
    return models.DenseNet(4, (1, 1, 1, 1), 8, num_classes=CLASSES)


def _mobilenet_v2(models: Any) -> nn.Module:
    blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]
    return models.MobileNetV2(CLASSES, 0.25, blocks, dropout=0.0)


def _mobilenet_v3(models: Any) -> nn.Module:
    config = models.mobilenetv3.InvertedResidualConfig
    blocks = [
        config(16, 3, 16, 16, True, "RE", 2, 1, 0.5), config(16, 3, 32, 24, False, "RE", 1, 1, 0.5),
        config(24, 5, 48, 24, True, "HS", 1, 1, 0.5),
    ]  # fmt: skip
    return models.MobileNetV3(blocks, 32, CLASSES, dropout=0.0)


def _efficientnet(models: Any) -> nn.Module:
    config = models.efficientnet.MBConvConfig
    blocks = [config(1, 3, 1, 32, 16, 1, 0.25, 1.0), config(4, 5, 2, 16, 24, 1, 0.25, 1.0)]
    return models.EfficientNet(blocks, dropout=0.0, num_classes=CLASSES)


def _regnet(models: Any) -> nn.Module:
    blocks = models.regnet.BlockParams.from_init_params(
        depth=4, w_0=8, w_a=16.0, w_m=2.5, group_width=8, se_ratio=0.25
    )
    return models.RegNet(blocks, num_classes=CLASSES)


def _convnext(models: Any) -> nn.Module:
    config = models.convnext.CNBlockConfig
    return models.ConvNeXt([config(8, 16, 1), config(16, None, 1)], num_classes=CLASSES)


def _vit(models: Any) -> nn.Module:
    return models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES)


def _swin(models: Any, **options: Any) -> nn.Module:
    return models.SwinTransformer(
        [2, 2], 8, [1, 1], [1, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES, **options
    )


def _swin_v2(models: Any) -> nn.Module:
    kinds = models.swin_transformer
    return _swin(models, block=kinds.SwinTransformerBlockV2, downsample_layer=kinds.PatchMergingV2)


def _maxvit(models: Any) -> nn.Module:
    return models.MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 4, 0.0, num_classes=CLASSES)


def _shufflenet(models: Any) -> nn.Module:
    return models.ShuffleNetV2([1, 2, 1], [8, 16, 32, 64, 64], num_classes=CLASSES)


def _squeezenet(models: Any) -> nn.Module:
    return models.squeezenet1_1(num_classes=CLASSES, dropout=0.0)


TORCHVISION = {
    "resnet": torchvision(_resnet),
    "densenet": torchvision(_densenet),
    "mobilenet_v2": torchvision(_mobilenet_v2),
    "mobilenet_v3": torchvision(_mobilenet_v3),
    "efficientnet": torchvision(_efficientnet),
    "regnet": torchvision(_regnet),
    "convnext": torchvision(_convnext),
    "vit": torchvision(_vit),
    "swin": torchvision(_swin),
    "swin_v2": torchvision(_swin_v2),
    "maxvit": torchvision(_maxvit),
    "shufflenet": torchvision(_shufflenet),
    "squeezenet": torchvision(_squeezenet),
}

# At 32 pixels the last stages of the deepest of them hold one pixel an image. BatchNorm over four
# values amplifies rounding errors until no two programs agree; those get 64 pixels.
TIMM = {
    "resnet": timm("resnet18", **STAGES),
    "resnext_se": timm("seresnext26d_32x4d", **STAGES | {"cardinality": 2, "base_width": 32}),
    "resnetv2": timm("resnetv2_50", layers=(1, 1, 1, 1), channels=(32, 32, 32, 32), stem_chs=8),
    "resnest": timm("resnest14d", **STAGES),
    "convnextv2": timm("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), patch_size=2),
    "inception_next": timm("inception_next_atto", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
    "vit": timm("vit_tiny_patch16_224", **TOKENS),
    "beit": timm("beit_base_patch16_224", **TOKENS),
    "cait": timm("cait_xxs24_224", **TOKENS),
    "xcit": timm("xcit_nano_12_p8_224", embed_dim=16, depth=2, num_heads=2, sized=True),
    "swinv2": timm(
        "swinv2_tiny_window8_256", patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2),
        window_size=4, drop_path_rate=0.0, sized=True,
    ),
    "twins": timm(
        "twins_svt_small", depths=(1, 1, 1, 2), embed_dims=(8, 16, 16, 32), sized=True,
        num_heads=(1, 2, 2, 2), wss=(4, 4, 4, 4),
    ),
    "coatnet": timm("test_coatnet", 64, sized=True),
    "mobilevit": timm("mobilevit_xxs", 64),
    "levit": timm(
        "levit_128s", 64, embed_dim=(16, 32, 48), num_heads=(1, 2, 3), depth=(1, 1, 1), sized=True
    ),
    "edgenext": timm(
        "edgenext_xx_small", 64, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), heads=(2, 2, 2, 2)
    ),
    "fastvit": timm("fastvit_t8", 64, layers=(1, 1, 1, 1), embed_dims=(8, 8, 16, 32)),
    "mobilenetv4": timm("mobilenetv4_conv_small_035", 64),
    "efficientnet": timm("test_efficientnet"),
    "nfnet": timm("test_nfnet"),
    "starnet": timm("starnet_s1", base_dim=8, depths=(1, 1, 1, 1)),
}  # fmt: skip

ARCHITECTURES = {f"torchvision-{name}": made for name, made in TORCHVISION.items()}
ARCHITECTURES |= {f"timm-{name}": made for name, made in TIMM.items()}
