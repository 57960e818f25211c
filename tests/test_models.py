"""Architectures: sizes, independent forwards, normalisation inside, tiny images, every mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import UserError
from fastadv.models import MODELS, build_model
from fastadv.models.blocks import perturbable_blocks
from fastadv.models.densenet import DenseNet
from fastadv.models.preact_resnet import PreActResNet

Weights = dict[str, Tensor]
TINY: dict[str, dict[str, Any]] = {
    "preact_resnet18": {"width": 4},
    "resnet18": {"width": 4},
    "resnet50": {"width": 2},
    "wide_resnet28_10": {"width": 1, "depth": 10},
    "wide_resnet32_10": {"width": 1, "depth": 8},
    "wide_resnet34_10": {"width": 1, "depth": 16},
    "wide_resnet34_1": {"depth": 10},
    "vgg16": {"width": 4},
    "densenet121": {"width": 2},
    "dla": {"width": 8},
}


def tiny(name: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, **(TINY[name] | more))


def randomise_bn(model: nn.Module) -> nn.Module:
    """Affines and running statistics that no two layers share, so that a swapped BN shows."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.uniform_(-0.5, 0.5, generator=generator)
    return model


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Public counts for CIFAR-10: Zagoruyko's 36.5 M and 46.2 M, the CIFAR collections' others.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("preact_resnet18", 11_171_146 + 1024),  # published networks add a final BN of 512
        ("resnet18", 11_173_962),
        ("resnet50", 23_520_842),
        ("wide_resnet28_10", 36_479_194),
        ("wide_resnet32_10", 46_160_474),
        ("wide_resnet34_10", 46_160_474),
        ("vgg16", 14_728_266),
        ("densenet121", 6_956_298),
        ("dla", 16_291_386),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count(build_model(name)) == parameters


@pytest.mark.parametrize(("width", "channels", "classes"), [(64, 3, 10), (16, 1, 10), (7, 4, 3)])
@pytest.mark.parametrize("depths", [(2, 2, 2, 2), (1, 3, 1, 2)])
@pytest.mark.parametrize("shortcut", ["raw", "preact"])
def test_preact_size_follows_the_closed_formula(
    width: int, channels: int, classes: int, depths: tuple[int, ...], shortcut: str
) -> None:
    total = 9 * channels * width
    before = width
    for stage, depth in enumerate(depths):
        c = width * 2**stage
        first = 2 * before + 9 * before * c + 2 * c + 9 * c * c
        total += first + (before * c if stage else 0) + (depth - 1) * (18 * c * c + 4 * c)
        before = c
    total += 2 * before + before * classes + classes
    with torch.device("meta"):
        model = build_model(
            "preact_resnet18",
            num_classes=classes,
            width=width,
            in_channels=channels,
            depths=depths,
            shortcut=shortcut,
        )
    assert count(model) == total


def test_preact_has_21_weight_matrices_and_the_published_names() -> None:
    model = tiny("preact_resnet18")
    matrices = [name for name, p in model.named_parameters() if "weight" in name and p.ndim > 1]
    assert len(matrices) == 21
    top = [name for name, module in model.named_children() if list(module.parameters())]
    assert top == ["conv1", "layer1", "layer2", "layer3", "layer4", "bn", "linear"]
    assert "layer2.0.shortcut.0.weight" in matrices


def bn(weights: Weights, name: str, x: Tensor, train: bool = False) -> Tensor:
    """BatchNorm from its formula; in training with the batch's own biased variance."""
    if train:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    else:
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    scale = weights[f"{name}.weight"] / torch.sqrt(var + 1e-5)
    return (x - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + weights[f"{name}.bias"].view(
        1, -1, 1, 1
    )


def conv(weights: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    kernel = weights[f"{name}.weight"]
    return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)


def head(weights: Weights, x: Tensor) -> Tensor:
    pooled = x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])
    return pooled @ weights["linear.weight"].T + weights["linear.bias"]


def preact_forward(w: Weights, x: Tensor, blocks: dict[str, int], raw: bool, train: bool) -> Tensor:
    """``blocks``: name of each block and its stride."""
    x = conv(w, "conv1", x)
    for b, stride in blocks.items():
        h = bn(w, f"{b}.bn1", x, train).relu()
        skip = x
        if f"{b}.shortcut.0.weight" in w:
            skip = conv(w, f"{b}.shortcut.0", x if raw else h, stride)
        h = conv(w, f"{b}.conv1", h, stride)
        x = skip + conv(w, f"{b}.conv2", bn(w, f"{b}.bn2", h, train).relu())
    return head(w, bn(w, "bn", x, train).relu())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shortcut", ["raw", "preact"])
def test_preact_forward_by_hand(shortcut: str, train: bool) -> None:
    model = randomise_bn(tiny("preact_resnet18", shortcut=shortcut)).double().train(train)
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    blocks = {f"layer{k}.{i}": 2 if k > 1 and i == 0 else 1 for k in (1, 2, 3, 4) for i in (0, 1)}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = preact_forward(weights, x, blocks, shortcut == "raw", train)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    other = preact_forward(weights, x, blocks, shortcut != "raw", train)
    assert (other - expected).abs().max() > 1e-3  # the variants really differ


def test_wide_resnet_forward_by_hand() -> None:
    model = randomise_bn(tiny("wide_resnet28_10", width=2, depth=16)).double().eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    blocks = {f"block{k}.{i}": 2 if k > 1 and i == 0 else 1 for k in (1, 2, 3) for i in (0, 1)}
    expected = preact_forward(dict(model.state_dict()), x, blocks, raw=False, train=False)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_wide_resnet32_10_is_the_network_that_others_count_as_34() -> None:
    """Madry's and GAIRAT's depth counts no projections: 1 + 30 convolutions + 1 classifier."""
    with torch.device("meta"):
        default, other = build_model("wide_resnet32_10"), build_model("wide_resnet34_10")
    assert default.state_dict().keys() == other.state_dict().keys()
    counted = [m for m in default.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert (
        sum(module.kernel_size != (1, 1) for module in counted if hasattr(module, "stride")) == 31
    )
    model = randomise_bn(tiny("wide_resnet32_10", width=2, depth=14)).double().eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    blocks = {f"block{k}.{i}": 2 if k > 1 and i == 0 else 1 for k in (1, 2, 3) for i in (0, 1)}
    expected = preact_forward(dict(model.state_dict()), x, blocks, raw=False, train=False)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def biased(w: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    return conv(w, name, x, stride) + w[f"{name}.bias"].view(1, -1, 1, 1)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("width", [1, 2])  # 1: no projection in the first stage
def test_wide_resnet34_1_forward_by_hand(width: int, train: bool) -> None:
    model = randomise_bn(tiny("wide_resnet34_1", width=width, depth=16)).double().train(train)
    x = h = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    w = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    h = biased(w, "conv1", h)
    for k, stride in ((1, 1), (2, 2), (3, 2)):
        for i in (0, 1):
            b = f"block{k}.{i}"
            skip = h
            if f"{b}.shortcut.0.weight" in w:
                skip = biased(w, f"{b}.shortcut.0", h, stride if i == 0 else 1)
            h = biased(w, f"{b}.conv1", bn(w, f"{b}.bn1", h, train).relu())
            h = bn(w, f"{b}.bn2", h, train).relu()
            h = skip + biased(w, f"{b}.conv2", h, stride if i == 0 else 1)
    expected = head(w, bn(w, "bn", h, train).relu())
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert ("block1.0.shortcut.0.weight" in w) == (width > 1)
    moved = model.get_buffer("bn.running_mean")
    share = 0.9 if train else 0.0  # the published momentum of the last BatchNorm
    expected = share * h.mean((0, 2, 3)) + (1 - share) * w["bn.running_mean"]
    torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [1, 4, 10])
def test_wide_resnet34_1_size_follows_the_closed_formula(width: int) -> None:
    total, before = 28 * 16, 16
    for c in (16 * width, 32 * width, 64 * width):
        first = 2 * before + (9 * before + 1) * c + 2 * c + (9 * c + 1) * c
        projection = (before + 1) * c if before != c else 0
        total += first + projection + 4 * (2 * (9 * c + 1) * c + 4 * c)
        before = c
    total += 2 * before + 10 * before + 10
    with torch.device("meta"):
        assert count(build_model("wide_resnet34_1", width=width)) == total


def basic_forward(w: Weights, b: str, x: Tensor, stride: int = 1) -> Tensor:
    h = bn(w, f"{b}.bn1", conv(w, f"{b}.conv1", x, stride)).relu()
    h = bn(w, f"{b}.bn2", conv(w, f"{b}.conv2", h))
    if f"{b}.shortcut.0.weight" in w:
        x = bn(w, f"{b}.shortcut.1", conv(w, f"{b}.shortcut.0", x, stride))
    return (h + x).relu()


def tree_forward(w: Weights, t: str, x: Tensor, stride: int) -> Tensor:
    branches = []
    if f"{t}.prev_root.conv1.weight" in w:
        branches.append(basic_forward(w, f"{t}.prev_root", x, stride))
        x, stride = tree_forward(w, f"{t}.level_1", x, stride), 1
        branches.append(x)
    left = basic_forward(w, f"{t}.left_node", x, stride)
    branches += [left, basic_forward(w, f"{t}.right_node", left)]
    return bn(w, f"{t}.root.bn", conv(w, f"{t}.root.conv", torch.cat(branches, 1))).relu()


def test_dla_forward_by_hand() -> None:
    model = randomise_bn(tiny("dla")).double().eval()
    w = dict(model.state_dict())
    x = out = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    for name in ("base", "layer1", "layer2"):
        out = bn(w, f"{name}.1", conv(w, f"{name}.0", out)).relu()
    for name, stride in (("layer3", 1), ("layer4", 2), ("layer5", 2), ("layer6", 2)):
        out = tree_forward(w, name, out, stride)
    torch.testing.assert_close(model(x), head(w, out), rtol=1e-10, atol=1e-10)


def test_densenet_forward_by_hand() -> None:
    torch.manual_seed(0)
    depths = (2, 1, 3, 1)
    model = randomise_bn(DenseNet(depths, width=3)).double().eval()
    w = dict(model.state_dict())
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    out = conv(w, "conv1", x)
    for k, depth in enumerate(depths, 1):
        for i in range(depth):
            layer = f"dense{k}.{i}"
            h = conv(w, f"{layer}.conv1", bn(w, f"{layer}.bn1", out).relu())
            h = conv(w, f"{layer}.conv2", bn(w, f"{layer}.bn2", h).relu())
            out = torch.cat([out, h], 1)
        if k < 4:
            h = conv(w, f"trans{k}.conv", bn(w, f"trans{k}.bn", out).relu())
            out = h.unflatten(3, (-1, 2)).mean(4).unflatten(2, (-1, 2)).mean(3)
    expected = head(w, bn(w, "bn", out).relu())
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-10, atol=1e-10)


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Same tensors in the same order under other names; a shape that differs is an error."""
    pairs = zip(source.state_dict().values(), target.state_dict().items(), strict=True)
    target.load_state_dict({name: tensor for tensor, (name, _) in pairs})


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_equal_torchvisions(name: str) -> None:
    theirs = getattr(import_torchvision().models, name)(num_classes=5).double().eval()
    ours = build_model(name, num_classes=5, stem="imagenet").double().eval()
    copy_in_order(randomise_bn(theirs), ours)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_vgg_features_equal_torchvisions() -> None:
    theirs = import_torchvision().models.vgg16_bn(init_weights=False).features.double().eval()
    ours = build_model("vgg16").double().eval()
    copy_in_order(randomise_bn(theirs), ours.get_submodule("features"))
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    expected = head(dict(ours.state_dict()), theirs(x))
    torch.testing.assert_close(ours(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_normalisation_is_inside_and_first(name: str) -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
    inside = tiny(name, mean=mean, std=std).eval()
    outside = tiny(name).eval()
    outside.load_state_dict({k: v for k, v in inside.state_dict().items() if "normalize" not in k})
    x = torch.rand(2, 3, 16, 16)
    scaled = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(inside(x), outside(scaled))
    assert next(iter(dict(inside.named_children()))) == "normalize"
    assert dict(inside.named_buffers())["normalize.mean"].shape == (1, 3, 1, 1)
    assert dict(inside.named_buffers())["normalize.std"].shape == (1, 3, 1, 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [4, 7, 8])
def test_tiny_grey_images_train(name: str, size: int) -> None:
    model = tiny(name, in_channels=1, num_classes=3)
    x = torch.rand(6, 1, size, size, requires_grad=True)
    logits = model(x)
    assert logits.shape == (6, 3)
    logits.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def logits_gradient_and_buffers(
    call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor
) -> list[Tensor]:
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    logits = call(leaf)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), [leaf])
    return [logits.detach(), gradient, *(b.detach().clone() for b in model.buffers())]


TRACED = ("preact_resnet18", "wide_resnet34_1", "vgg16")  # the others, slow to trace, are alike


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in TRACED else pytest.mark.slow) for n in MODELS],
)
def test_compiled_whole_and_channels_last_give_the_same(name: str) -> None:
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    eager, graph, last = (tiny(name, **options).double() for _ in range(3))
    expected = logits_gradient_and_buffers(eager, eager, x)
    torch._dynamo.reset()
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    last = last.to(memory_format=torch.channels_last)
    last_x = x.to(memory_format=torch.channels_last)
    for found in (
        logits_gradient_and_buffers(compiled, graph, x),
        logits_gradient_and_buffers(last, last, last_x),
    ):
        for tensor, reference in zip(found, expected, strict=True):
            # Of the largest: norms over three values amplify rounding, and a small element is the
            # difference of large ones.
            limit = 1e-9 * float(reference.abs().max())
            torch.testing.assert_close(tensor, reference, rtol=0, atol=limit)


PUBLISHED_KAIMING = {
    "wide_resnet34_10": {"depth": 10, "width": 2},
    "wide_resnet28_10": {"depth": 10, "width": 2},
    "wide_resnet32_10": {"depth": 8, "width": 2},
    "resnet18": {"stem": "imagenet", "width": 32},
    "resnet50": {"stem": "imagenet", "width": 32},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("published", [True, False])
def test_initial_weights_are_the_published_ones(name: str, published: bool) -> None:
    """Kaiming normal, fan out, in TRADES' and torchvision's networks; else PyTorch's own."""
    torch.manual_seed(0)
    options = PUBLISHED_KAIMING.get(name, {}) if published else {"width": 32}
    if "wide" in name:
        options = {"width": 2, "depth": TINY[name]["depth"]}
    kaiming = ("wide" in name and name != "wide_resnet34_1") or "stem" in options
    model = build_model(name, **options)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            area = module.kernel_size[0] ** 2
            fan_out, fan_in = module.out_channels * area, module.in_channels * area
            expected = (2 / fan_out) ** 0.5 if kaiming else (1 / (3 * fan_in)) ** 0.5
            if module.weight.numel() > 2000:
                assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


@pytest.mark.parametrize("name", [name for name in MODELS if "wide" not in name])
def test_dropout_acts_on_the_classifiers_input_in_training_only(name: str) -> None:
    plain, dropping = tiny(name).eval(), tiny(name, dropout=0.5).eval()
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(plain(x), dropping(x))
    seen: list[Tensor] = []
    linear = dropping.get_submodule("linear")
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    dropping.get_submodule("dropout").train()
    dropping(x)
    kept = seen[0] != 0
    plain.get_submodule("linear").register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    plain(x)
    torch.testing.assert_close(seen[0], torch.where(kept, 2 * seen[1], torch.zeros_like(seen[1])))
    assert not kept.all()


# Where dropout acts in a block: after the module that is called, before the other. The published
# code of TRADES and the memorization paper drops what the second convolution reads; the form with
# biases, what its BatchNorm reads.
DROPPED = {
    "wide_resnet28_10": ("bn2", "conv2"),
    "wide_resnet32_10": ("bn2", "conv2"),
    "wide_resnet34_10": ("bn2", "conv2"),
    "wide_resnet34_1": ("conv1", "bn2"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_of_a_wide_resnet_acts_inside_every_block(name: str) -> None:
    plain, dropping = tiny(name), tiny(name, dropout=0.2)
    assert plain.state_dict().keys() == dropping.state_dict().keys()
    x = torch.rand(8, 3, 16, 16)
    assert torch.equal(plain.eval()(x), dropping.eval()(x))
    after, before = DROPPED[name]
    given: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    for block, _ in perturbable_blocks(dropping):
        block = block.removesuffix(".conv1")
        dropping.get_submodule(f"{block}.{after}").register_forward_hook(
            lambda module, args, out, block=block: given.update({block: out.detach().clone()})
        )
        dropping.get_submodule(f"{block}.{before}").register_forward_pre_hook(
            lambda module, args, block=block: read.update({block: args[0].detach().clone()})
        )
    dropping.train()(x)
    assert len(given) == 3 * ((TINY[name]["depth"] - 2) // 6)
    for block, value in given.items():
        value = value.relu() if after == "bn2" else value
        kept = read[block] != 0
        torch.testing.assert_close(read[block], torch.where(kept, value / 0.8, 0.0))
        share = (kept | (value == 0)).float().mean().item()
        alive = (value != 0).float().mean().item()
        assert 1 - share == pytest.approx(0.2 * alive, abs=0.02)


def test_default_shortcut_is_preact() -> None:
    torch.manual_seed(0)
    default = build_model("preact_resnet18", width=4)
    preact = build_model("preact_resnet18", width=4, shortcut="preact")
    preact.load_state_dict(default.state_dict())
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(default(x), preact(x))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "preact_resnet81"}, "did you mean 'preact_resnet18'"),
        ({"name": "preact_resnet18", "shortcutt": "raw"}, "did you mean 'shortcut'"),
        ({"name": "preact_resnet18", "shortcut": "rough"}, "Unknown shortcut"),
        ({"name": "preact_resnet18", "depths": (2, 2)}, "depths"),
        ({"name": "vgg16", "depth": 3}, "takes no options"),
        ({"name": "vgg16", "normalize": None}, "takes no options"),
        ({"name": "resnet18", "stem": "mnist"}, "Unknown stem"),
        ({"name": "wide_resnet28_10", "depth": 30}, "6n\\+4"),
        ({"name": "wide_resnet34_1", "depth": 32}, "6n\\+4"),
        ({"name": "wide_resnet32_10", "depth": 34}, "6n\\+2"),
        ({"name": "resnet18", "width": 0}, "width must be an integer"),
        ({"name": "resnet18", "num_classes": 0}, "num_classes"),
        ({"name": "resnet18", "in_channels": 1.5}, "in_channels"),
        ({"name": "resnet18", "dropout": 1.0}, "dropout"),
        ({"name": "resnet18", "mean": (0.5,)}, "mean has 1 values"),
        ({"name": "resnet18", "std": (1.0, 0.0, 1.0)}, "above 0"),
        ({"name": "resnet18", "mean": (float("nan"), 0.0, 0.0)}, "finite"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(arguments: dict, says: str) -> None:
    with pytest.raises(UserError, match=says), torch.device("meta"):
        build_model(**arguments)


def test_the_class_takes_any_width_and_depth() -> None:
    model = PreActResNet(depths=(1, 1, 1, 2), width=3, num_classes=4, in_channels=2)
    assert model(torch.rand(2, 2, 5, 9)).shape == (2, 4)
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    channels = [[block.conv2.out_channels for block in stage] for stage in stages]
    assert channels == [[3], [6], [12], [24, 24]]
    assert model.conv1.weight.shape == (3, 2, 3, 3)
