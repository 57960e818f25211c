"""Unusual kinds of models: they are trained and evaluated as they are, or one sentence says
what to write instead."""

import copy
import warnings

import pytest
import torch
from odd_readers import CLASSES, Net, made
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fastadv


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 3, 8, 8, generator=generator).to(dtype)
    return x, torch.randint(0, CLASSES, (6,), generator=generator)


def trained(model, method="pgd-eval", steps=2):
    """The model after two steps from a given start."""
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step = fastadv.step(model, optimizer, method, mode="eager", steps=steps)
    for _ in range(2):
        step(x, y, start=torch.full_like(x, 0.01))
    step.check()
    return model


def judged(model):
    return fastadv.evaluate(model, [batch()], ("clean", "pgd-3"))


def attacked(model):
    return fastadv.attack(model, *batch(), "pgd-3")


USES = {"step": trained, "evaluate": judged, "attack": attacked}


class FrozenBackbone(Net):
    def forward(self, x):
        with torch.no_grad():
            h = self.first(x)
        return self.head(self.second(h))


class Checkpointed(Net):
    reentrant = False

    def forward(self, x):
        return self.head(checkpoint(self.second, self.first(x), use_reentrant=self.reentrant))


class Reentrant(Checkpointed):
    reentrant = True


class InPlace(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.5).div_(0.25))


class OutOfPlace(Net):
    def forward(self, x):
        return super().forward((x - 0.5) / 0.25)


class Pair(Net):
    def forward(self, x):
        return super().forward(x), x


class Named(Net):
    def forward(self, x):
        return {"scores": super().forward(x)}


SENTENCES = {
    FrozenBackbone: "does not depend on its input by a gradient",
    Reentrant: "use_reentrant=False",
    Pair: "say where in it they are: output=0",
    Named: "say where in it they are: output=0",
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", SENTENCES)
def test_unsupported_models_are_refused_in_one_sentence(kind, use):
    model = made(kind)
    with pytest.raises(fastadv.UserError, match=SENTENCES[kind]) as raised:
        USES[use](model)
    assert "\n" not in str(raised.value)


def test_a_frozen_backbone_trains_without_an_attack():
    model = made(FrozenBackbone)
    before = copy.deepcopy(model)
    x, y = batch()
    fastadv.step(model, torch.optim.SGD(model.parameters(), lr=0.1), "standard")(x, y)
    assert torch.equal(model.c1.weight, before.c1.weight)
    assert not torch.equal(model.c2.weight, before.c2.weight)


@pytest.mark.parametrize("method", ["pgd", "pgd-eval", "trades"])
def test_a_forward_that_changes_its_input_in_place_receives_a_copy(method):
    x, y = batch()
    first, second = trained(made(InPlace), method), trained(made(OutOfPlace), method)
    for own, expected in zip(
        first.state_dict().values(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(own, expected)
    given = x.clone()
    found = fastadv.attack(first, given, y, "pgd-3")
    assert torch.equal(found, fastadv.attack(second, x, y, "pgd-3"))
    assert torch.equal(given, x)
    assert fastadv.evaluate(first, [(given, y)]) == fastadv.evaluate(second, [(x, y)])
    assert torch.equal(given, x)


def test_a_forward_that_begins_to_change_its_input_is_refused():
    class Begins(Net):
        late = False

        def forward(self, x):
            return super().forward(x.detach().sub_(0.5) + x if self.late else x)

    x, y = batch()
    model = made(Begins)
    step = fastadv.step(model, torch.optim.SGD(model.parameters(), lr=0.1), "pgd", mode="eager")
    step(x, y)
    model.late = True
    with pytest.raises(fastadv.UserError, match="changes its input in place"):
        step(x, y)


class Staged(nn.Module):
    """Two residual blocks with BatchNorm and dropout."""

    checkpoints = False

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layer1, self.layer2 = (nn.Sequential(Residual(dropout)) for _ in range(2))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        for layer in (self.layer1, self.layer2):
            h = checkpoint(layer, h, use_reentrant=False) if self.checkpoints else layer(h)
        return self.fc(4 * h.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.drop = nn.Conv2d(6, 6, 3, padding=1), nn.Dropout(dropout)

    def forward(self, h):
        return h + self.drop(torch.tanh(self.conv2(functional.softplus(self.norm(self.conv1(h))))))


def updated(model, method, channels_last=False, **options):
    """The model after three updates, in float64."""
    model.double()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = {"steps": 2, "alpha": 0.03, **options}
    if method == "apart":
        settings = {"num_samples": 6, "total_steps": 9, "steps_per_epoch": 3}
    torch._dynamo.reset()
    step = fastadv.step(model, optimizer, method, eps=0.1, mode="eager", **settings)
    x, y = batch()
    torch.manual_seed(1)
    for shift in range(3):
        x = x.roll(shift, 2)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        step(x, y, index=torch.arange(6), start=None if method == "apart" else x * 0.05)
    step.check()
    return model


def assert_close(model, other, tolerance):
    """Weights and running statistics; names as inside ``torch.compile``."""
    expected = {n.replace("_orig_mod.", ""): t for n, t in other.state_dict().items()}
    for name, own in model.state_dict().items():
        torch.testing.assert_close(
            own, expected[name.replace("_orig_mod.", "")], rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("attack_bn", ["train", "eval"])
@pytest.mark.parametrize("method", ["pgd", "trades", "awp"])
def test_checkpointed_activations_change_nothing(method, attack_bn, dropout):
    """Also not the running statistics, which computing activations again moves once more in a loop
    by hand."""
    model = Staged(dropout)
    model.checkpoints = True
    updated(model, method, attack_bn=attack_bn)
    assert_close(model, updated(Staged(dropout), method, attack_bn=attack_bn), 1e-12)


def test_checkpointed_activations_under_a_gradient_that_is_differentiated():
    model = Staged()
    model.checkpoints = True
    updated(model, "fgsm", regularizer="igr", steps=None, alpha=None)
    plain = updated(Staged(), "fgsm", regularizer="igr", steps=None, alpha=None)
    assert_close(model, plain, 1e-12)


def test_a_checkpointed_block_whose_input_is_perturbed_is_refused():
    """Computed again, it would not see the perturbation: other gradients, and no error."""
    model = Staged()
    model.checkpoints = True
    before = copy.deepcopy(model.double().state_dict())
    with pytest.raises(fastadv.UserError, match=r"layer2\.0\.conv1 is perturbed.*checkpoint"):
        updated(model, "apart")
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())


COMPILED = {
    "a stage": lambda model: model.layer1.compile(backend="aot_eager"),
    "a replaced stage": lambda model: setattr(
        model, "layer2", torch.compile(model.layer2, backend="aot_eager")
    ),
}


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("method", ["pgd", "pgd-eval", "trades", "awp", "apart"])
def test_compiled_submodules_change_nothing(method, kind):
    model = Staged()
    COMPILED[kind](model)
    updated(model, method)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_close(model, updated(Staged(), method), 1e-12)


@pytest.mark.parametrize("method", ["pgd", "pgd-eval", "trades", "awp", "rwp", "apart"])
def test_channels_last_changes_nothing_and_is_kept(method):
    plain, model = updated(Staged(), method), updated(Staged(), method, channels_last=True)
    assert_close(model, plain, 1e-12)
    for kernel in (p for p in model.parameters() if p.ndim == 4):
        assert kernel.is_contiguous(memory_format=torch.channels_last)
        assert not kernel.is_contiguous()


@pytest.mark.parametrize("use", [judged, attacked])
def test_a_function_as_a_model_is_refused(use):
    model = made(Net)
    with pytest.raises(fastadv.UserError, match=r"must be a torch\.nn\.Module, not a function"):
        use(lambda x: model(x))
    with pytest.raises(fastadv.UserError, match=r"must be a torch\.nn\.Module"):
        fastadv.step(lambda x: x, torch.optim.SGD(model.parameters(), lr=0.1))


def lazy():
    return nn.Sequential(
        nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES)
    ).double()


@pytest.mark.parametrize("use", [judged, attacked])
def test_lazy_modules_are_not_evaluated_before_initialisation(use):
    with pytest.raises(fastadv.UserError, match="lazy modules"):
        use(lazy())


@pytest.mark.parametrize("method", ["pgd-eval", "trades"])
def test_lazy_modules_train_like_others(method):
    models = []
    for ready in (False, True):
        torch.manual_seed(0)
        model = lazy()
        if ready:
            with torch.no_grad():
                model.eval()(batch()[0])
            model.train()
        models.append(trained(model, method))
    for own, expected in zip(*(model.state_dict().values() for model in models), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
class TestOtherForms:
    """TorchScript, torch.fx and torch.export."""

    def test_scripted_and_fx_models_train_like_the_model(self):
        expected = trained(_Scriptable().double())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = torch.jit.script(_Scriptable().double())
        for other in (scripted, torch.fx.symbolic_trace(_Scriptable().double())):
            trained(other)
            for name, tensor in other.state_dict().items():
                torch.testing.assert_close(
                    tensor, expected.state_dict()[name], rtol=1e-9, atol=1e-9
                )

    @pytest.mark.parametrize("train", [False, True])
    def test_a_traced_model_stays_in_its_mode(self, train):
        model = _Scriptable().double().train(train)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, batch()[0], check_trace=False)
        with pytest.raises(fastadv.UserError, match="stays in the mode"):
            trained(traced)
        if train:
            with pytest.raises(fastadv.UserError, match="traced in training mode"):
                judged(traced)
            return
        assert judged(traced) == judged(model)
        assert torch.equal(attacked(traced), attacked(model))

    def test_an_exported_model_is_refused(self):
        exported = torch.export.export(_Scriptable().double().eval(), (batch()[0],)).module()
        for use in (judged, trained):
            with pytest.raises(fastadv.UserError, match=r"torch\.export"):
                use(exported)


class _Scriptable(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.linear(functional.softplus(self.norm(self.conv(x))).mean((2, 3)))


class InTraining(Net):
    """A tuple in training mode alone, as googlenet and inception return."""

    def forward(self, x):
        found = super().forward(x)
        return (found, found) if self.training else found


def test_a_tuple_output_in_training_mode_only_can_be_evaluated_but_not_trained():
    expected = judged(made(Net))
    assert judged(made(InTraining)) == expected
    with pytest.raises(fastadv.UserError, match="must return logits"):
        trained(made(InTraining))
