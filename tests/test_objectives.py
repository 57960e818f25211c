"""Every objective: one float64 step equals its formula, eager and compiled."""

import pytest
import torch
from test_distributed import free_port, network
from tiny import (
    EPS,
    TinyNet,
    assert_same,
    climb,
    descend,
    sgd,
    tiny_batch,
    tiny_model,
    tiny_step,
    twin,
)
from tiny_capture import capture
from torch import distributed
from torch.nn import functional
from two_processes import in_two_processes

from fastadv.algorithms.resolution import resolve
from fastadv.engine.process.distributed import leave
from fastadv.errors import UserError
from fastadv.run.pseudo_labels import pseudo_labels

ALPHA, STEPS = 0.04, 3
ATTACK = {"steps": STEPS, "alpha": ALPHA}


def ce(logits, y):
    return functional.cross_entropy(logits, y, reduction="none")


def kl(logits_p, logits_q):
    p = torch.softmax(logits_p, 1)
    return (p * (p / torch.softmax(logits_q, 1)).log()).sum(1)


def attack(model, x, y, start):
    return climb(model, x, start, lambda z: ce(z, y).mean(), ALPHA, STEPS, "train")


def by_hand(model, loss_of):
    """One step of the mean of ``loss_of(f(x), f(x'), y)``."""
    x, y, _, start = tiny_batch()
    optimizer = sgd(model)
    x_adv = attack(model, x, y, start)
    descend(optimizer, loss_of(model(x), model(x_adv), y).mean())


def run(mode="eager", model=None, **options):
    model = tiny_model() if model is None else model
    x, y, index, start = tiny_batch()
    step = tiny_step(model, mode=mode, **(ATTACK | options))
    if "epoch" in options:
        step.set_epoch(options["epoch"])
    metrics = step(x, y, index, start=start)
    return model, step, metrics


MODES = ("eager", "compiled")


@pytest.mark.parametrize("mode", MODES)
def test_clean_subtracted(mode):
    model, _, _ = run(mode, objective="clean-subtracted", clean_weight=0.3)
    other = tiny_model()
    by_hand(other, lambda z, z_adv, y: ce(z_adv, y) - 0.3 * ce(z, y))
    assert_same(model, other)


def test_clean_subtracted_with_weight_0_is_adversarial_training():
    model, _, _ = run(objective="clean-subtracted", clean_weight=0)
    plain, _, _ = run()
    for first, second in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("mode", MODES)
def test_clean_mixed_rises_from_clean_to_adversarial_over_its_epochs(mode):
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    step = tiny_step(
        model,
        mode=mode,
        objective="clean-mixed",
        mix_start=0.2,
        mix_end=0.8,
        mix_epochs=2,
        steps_per_epoch=1,
        **ATTACK,
    )
    optimizer = sgd(other)
    for share in (0.2, 0.5, 0.8, 0.8):
        step(x, y, index, start=start)
        x_adv = attack(other, x, y, start)
        mixed = (1 - share) * ce(other(x), y) + share * ce(other(x_adv), y)
        descend(optimizer, mixed.mean())
    assert_same(model, other)


def published_trades(model, x, x_adv, y):
    natural, adversarial, again = model(x), model(x_adv), model(x)
    return ce(natural, y) + 5.0 * kl(again, adversarial)


def published_trades_with_perturbed_weights(model, x, x_adv, y):
    adversarial, natural, again = model(x_adv), model(x), model(x)
    return ce(natural, y) + 5.0 * kl(again, adversarial)


def published_rst(model, x, x_adv, y):
    adversarial, natural = model(x_adv), model(x)
    return ce(natural, y) + 5.0 * kl(natural, adversarial)


def published_te(model, x, x_adv, y):
    natural, adversarial = model(x), model(x_adv)
    return ce(natural, y) + 5.0 * kl(natural, adversarial)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("method", "passes", "loss"),
    [
        ("trades", None, published_trades),
        ("rst", None, published_rst),
        ("trades", ("adversarial", "natural", "natural"), published_trades_with_perturbed_weights),
        ("trades", ("natural", "adversarial"), published_te),
    ],
)
def test_trades_is_the_published_code_statistics_and_counts_too(method, passes, loss, mode):
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    step = tiny_step(model, method, mode=mode, beta=5.0, bn_passes=passes, **ATTACK)
    optimizer = sgd(other)
    for _ in range(2):
        step(x, y, index, start=start)
        natural = other.eval()(x).detach()
        x_adv = climb(other, x, start, lambda z, p=natural: kl(p, z).mean(), ALPHA, STEPS, "eval")
        descend(optimizer, loss(other.train(), x, x_adv, y).mean())
    assert_same(model, other)
    assert model.bn1.num_batches_tracked == other.bn1.num_batches_tracked
    assert model.bn1.momentum == 0.1


def drawn(kind):
    """One of ``kind`` with the weights and statistics of ``tiny_model``."""
    model = kind().double()
    model.load_state_dict(tiny_model().state_dict(), strict=False)
    return model


class SharesNorm(TinyNet):
    """One norm behind both convolutions."""

    def forward(self, x):
        x = self.conv1(x)
        x = x + self.conv2(functional.softplus(self.bn1(x)))
        return self.linear(4 * torch.tanh(self.bn1(x)).mean((2, 3)))


class WeighsAllAlike(TinyNet):
    def __init__(self):
        super().__init__()
        self.bn2.momentum = None


class NormByHand(TinyNet):
    """A norm whose statistics are moved outside of its module."""

    def forward(self, x):
        x, norm = self.conv1(x), self.bn1
        given = norm.running_mean, norm.running_var, norm.weight, norm.bias
        y = functional.batch_norm(x, *given, self.training, 0.3)
        x = x + self.conv2(functional.softplus(y))
        return self.linear(4 * torch.tanh(self.bn2(x)).mean((2, 3)))


class OwnStatistics(TinyNet):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        mean = x.mean((0, 2, 3)) if self.training else self.mean
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
            self.seen += 1
        return super().forward(x - mean.view(3, 1, 1))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        (WeighsAllAlike, "eager"),  # PyTorch compiles no norm without a momentum
        *((kind, "eager") for kind in (SharesNorm, NormByHand, OwnStatistics)),
        (NormByHand, "compiled"),
        pytest.param(SharesNorm, "compiled", marks=pytest.mark.slow),
        pytest.param(OwnStatistics, "compiled", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("passes", "loss"),
    [
        (("natural", "adversarial", "natural"), published_trades),
        (("adversarial", "natural", "natural"), published_trades_with_perturbed_weights),
    ],
)
def test_statistics_that_no_momentum_can_reproduce_run_the_published_passes(
    kind, passes, loss, mode
):
    x, y, index, start = tiny_batch()
    model, other = (drawn(kind) for _ in range(2))
    step = tiny_step(model, "trades", mode=mode, beta=5.0, bn_passes=passes, **ATTACK)
    optimizer = sgd(other)
    for _ in range(2):
        step(x, y, index, start=start)
        natural = other.eval()(x).detach()
        x_adv = climb(other, x, start, lambda z, p=natural: kl(p, z).mean(), ALPHA, STEPS, "eval")
        descend(optimizer, loss(other.train(), x, x_adv, y).mean())
    assert_same(model, other)


def test_a_norm_that_loses_its_momentum_runs_the_published_passes():
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    step = tiny_step(model, "trades", beta=5.0, **ATTACK)
    optimizer = sgd(other)
    for momentum in (0.1, None):
        model.bn1.momentum = other.bn1.momentum = momentum
        step(x, y, index, start=start)
        natural = other.eval()(x).detach()
        x_adv = climb(other, x, start, lambda z, p=natural: kl(p, z).mean(), ALPHA, STEPS, "eval")
        descend(optimizer, published_trades(other.train(), x, x_adv, y).mean())
    assert_same(model, other)


def test_ordinary_norms_run_one_pass_of_each_kind():
    x, y, index, start = tiny_batch()
    model = tiny_model()
    step = tiny_step(model, "trades", beta=5.0, **ATTACK)
    step(x, y, index, start=start)
    passes = []
    model.register_forward_hook(lambda module, *_: passes.append(module.training))
    step(x, y, index, start=start)
    assert sum(passes) == 2


def test_recipes_run_the_passes_of_their_code():
    after = ("adversarial", "natural", "natural")
    expected = {"trades": ("natural", "adversarial", "natural"), "trades-awp": after}
    expected |= {"trades-rwp": after, "trades-awp-k": after, "rst": after[:2], "rst-awp": after[:2]}
    expected |= {"rst-rwp": after[:2]}
    once_each = ("natural", "adversarial")
    expected |= {"trades-te": once_each, "trades-sat": once_each}
    for method, passes in expected.items():
        assert resolve(method).objective.bn_updates() == passes
    assert resolve("trades", {"weights": "rwp"}).objective.bn_updates() == after
    for target in ("self-adaptive", "temporal-ensembling"):
        assert resolve("trades", {"target": target}).objective.bn_updates() == once_each
        assert resolve("trades-awp", {"target": target}).objective.bn_updates() == after
    with pytest.raises(UserError, match="bn_passes"):
        resolve("trades", {"bn_passes": ("natural",)})


def test_the_weight_perturbation_has_the_strength_of_the_objectives_recipe():
    for objective in ("trades", "rst"):
        for weights in ("awp", "rwp"):
            row = resolve(f"{objective}-{weights}").options
            assert resolve(objective, {"weights": weights}).options == row
            assert (row["gamma"], row["warmup_epochs"]) == (0.005, 9)
    assert resolve("trades-awp", {"gamma": 0.1}).options["gamma"] == 0.1
    assert resolve("awp").options["gamma"] == 0.01


@pytest.mark.parametrize("mode", MODES)
def test_gairat_weights_samples_by_the_steps_they_survived(mode):
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
        y[:2] = (y[:2] + 1) % 4
    model.train()
    # Steps long enough that some samples are lost on the way.
    step = tiny_step(
        model, mode=mode, objective="gairat", gairat_start=0, gairat_lambda=0.5, eps=EPS, **ATTACK
    )
    step(x, y, index, start=start)
    kappa = torch.zeros(len(x), dtype=torch.float64)
    optimizer = sgd(other)

    def counted(z):
        kappa.add_((z.argmax(1) == y).double())
        return ce(z, y).mean()

    x_adv = climb(other, x, start, counted, ALPHA, STEPS, "train")
    assert len(kappa.unique()) > 1
    weights = (torch.tanh(0.5 + 5 * (1 - 2 * kappa / STEPS)) + 1) / 2
    weights = weights / weights.mean()
    descend(optimizer, (weights * ce(other(x_adv), y)).mean())
    assert_same(model, other)


def test_gairat_before_its_start_is_adversarial_training_bit_for_bit():
    model, _, _ = run(objective="gairat", gairat_start=2, steps_per_epoch=1)
    plain, _, _ = run()
    assert_same(model, plain, 0.0)


@pytest.mark.parametrize("mode", [*MODES, "captured"])
def test_the_mean_loss_over_the_number_of_images(mode):
    """As ATTA's code has it, where the last batch of an epoch is short."""
    model, other = tiny_model(), tiny_model()
    optimizer = sgd(other)
    made = "eager" if mode == "captured" else mode
    step = tiny_step(model, mode=made, over_batch=True, **ATTACK)
    if mode == "captured":
        capture(step)
    for seed, count in ((1, 8), (2, 8), (3, 5)):
        x, y, index, start = (each[:count] for each in tiny_batch(seed=seed))
        metrics = step(x, y, index, start=start)
        loss = ce(other(attack(other, x, y, start)), y).sum() / count**2
        descend(optimizer, loss)
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-9, atol=0)
    assert_same(model, other)


def over_all_images(rank, world):
    """The state after updates in which each of ``world`` processes has its share of the images."""
    step = tiny_step(network(), over_batch=True, **ATTACK)
    share = 8 // world
    mine = slice(share * rank, share * rank + share)
    for seed in (1, 2):
        x, y, index, start = (each[mine] for each in tiny_batch(seed=seed))
        step(x, y, index, start=start)
    return step.model.state_dict()


def over_all_images_worker(rank, port, out):
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(over_all_images(rank, 2), f"{out}.{rank}")
    leave()


@pytest.mark.slow
def test_the_images_of_all_processes_are_counted(tmp_path):
    out = str(tmp_path / "half")
    in_two_processes(over_all_images_worker, free_port(), out)
    whole = over_all_images(0, 1)
    for rank in range(2):
        for name, value in torch.load(f"{out}.{rank}").items():
            torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_loss_over_the_images_of_one_call_is_refused_in_parts():
    x, y, index, _ = tiny_batch()
    with pytest.raises(UserError, match="over_batch"):
        tiny_step(tiny_model(), over_batch=True)(x, y, index, update=False)


@pytest.mark.parametrize("mode", MODES)
def test_samples_below_a_loss_are_left_out(mode):
    model, other = tiny_model(), tiny_model()
    optimizer, limit = sgd(other), 1.5
    step = tiny_step(model, mode=mode, leave_out_below=limit, **ATTACK)
    left_out = set()
    for seed in (1, 2, 3):  # the compiled graph of the first batch also serves the others
        x, y, index, start = tiny_batch(seed=seed)
        metrics = step(x, y, index, start=start)
        losses = ce(other(attack(other, x, y, start)), y)
        kept = losses.detach() >= limit
        left_out.add(len(x) - int(kept.sum()))
        descend(optimizer, losses[kept].mean())
        assert_same(model, other)
        torch.testing.assert_close(metrics["loss"], losses[kept].mean().detach())
    assert len(left_out) > 1, "another number of samples should stay in some batch"
    assert 0 < min(left_out) <= max(left_out) < len(x)


@pytest.mark.parametrize("mode", MODES)
def test_samples_that_are_left_out_do_not_perturb_weights(mode):
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    options = {"weights": "awp", "gamma": 0.02, "leave_out_below": 1.5}
    tiny_step(model, mode=mode, **options, **ATTACK)(x, y, index, start=start)
    x_adv = attack(other, x, y, start)

    def loss(network):
        losses = ce(network(x_adv), y)
        kept = losses.detach() >= 1.5
        assert 0 < kept.sum() < len(x)
        return losses[kept].mean()

    optimizer, moved = sgd(other), {}
    proxy = twin(other)
    loss(proxy).backward()
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "weight" in name and weight.ndim > 1:
                gradient = proxy.get_parameter(name).grad
                moved[name] = 0.02 * weight.norm() / gradient.norm() * gradient
                weight += moved[name]
    descend(optimizer, loss(other))
    with torch.no_grad():
        for name, change in moved.items():
            other.get_parameter(name).sub_(change)
    assert_same(model, other, 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_all_samples_left_out_leave_no_gradient(mode):
    _, _, metrics = run(mode, leave_out_below=1e6)
    assert float(metrics["grad_norm"]) == 0.0


def test_a_ramp_without_a_known_epoch_is_refused():
    with pytest.raises(UserError, match="set_epoch"):
        run(objective="clean-mixed", mix_epochs=3)
    with pytest.raises(UserError, match="fraction of the run"):
        run(objective="gairat", steps_per_epoch=4)


@pytest.mark.parametrize(
    "options",
    [
        {"adversary": "fgsm", "objective": "gairat"},
        {"adversary": "none", "objective": "trades"},
        {"adversary": "none", "objective": "rst"},
        {"adversary": "none", "objective": "clean-mixed"},
        {"objective": "clean-subtracted", "target": "self-adaptive"},
    ],
)
def test_refused_pairs_say_why(options):
    with pytest.raises(UserError, match=r"cannot be combined: .{20,}"):
        tiny_step(tiny_model(), **options)


def test_pseudo_labels_are_the_models_own_predictions_on_bytes():
    model = tiny_model().float()
    images = torch.randint(0, 256, (11, 3, 6, 6), dtype=torch.uint8)
    labels = pseudo_labels(model, images, batch_size=4)
    with torch.no_grad():
        expected = tiny_model().float().eval()(images.float() / 255).argmax(1)
    assert torch.equal(labels, expected)
    assert labels.dtype == torch.int64
    assert model.training


def test_the_mixture_changes_per_update_not_per_epoch() -> None:
    x, y, index, start = tiny_batch()
    known = {"steps": 1, "total_steps": 8, "steps_per_epoch": 4}
    step = tiny_step(tiny_model(), objective="clean-mixed", **known)
    shares = []
    for _ in range(8):
        step(x, y, index, start=start)
        shares.append(float(step.plan.objective._share))
    assert shares == pytest.approx([update / 8 for update in range(8)])
    assert torch.is_tensor(step.plan.objective._share)


def test_a_resumed_run_runs_the_same_passes():
    """A converged power iteration looks constant, but was not when the run began."""
    x, y, index, start = tiny_batch()

    def made(steps):
        model = tiny_model()
        torch.manual_seed(0)
        torch.nn.utils.parametrizations.spectral_norm(model.conv2)
        step = tiny_step(model, "trades", beta=5.0, **ATTACK)
        for _ in range(steps):
            step(x, y, index, start=start)
        return model, step

    _, step = made(1)
    assert not step.internals.net.bn_momenta.stands
    other, resumed = made(0)
    for _ in range(200):
        other.train()(x)
    resumed.load_state_dict(step.state_dict())
    resumed(x, y, index, start=start)
    assert not resumed.internals.net.bn_momenta.stands
