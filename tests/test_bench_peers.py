"""The peers: the published loop makes the same update as ours, workers speak the protocol."""

import subprocess
import sys
import textwrap
import time
from importlib.metadata import version

import pytest
import torch

from fastadv import step
from fastadv.benchmark.ours import make_optimizer
from fastadv.benchmark.peers.library import published_without_tf32
from fastadv.benchmark.peers.published import PublishedLoop, published_candidate
from fastadv.benchmark.peers.worker import Worker
from fastadv.benchmark.setting import EPS, Setting
from fastadv.engine.model.precision import float32_settings
from fastadv.errors import UserError

TINY = Setting(width=4, batch_size=4, image_size=8)


def test_the_published_loop_makes_the_same_update_as_ours():
    start = (2 * torch.rand(4, 3, 8, 8, dtype=torch.float64) - 1) * EPS
    batch = TINY.batches(1)[0]
    models = [TINY.make_model().double().train() for _ in range(2)]
    published = PublishedLoop(models[0], make_optimizer(models[0]))
    loss = published(batch.x.double(), batch.y, start)
    ours = step(models[1], make_optimizer(models[1]), "pgd", mode="eager")
    metrics = ours(batch.x.double(), batch.y, start=start)
    torch.testing.assert_close(metrics["loss"], loss, rtol=1e-12, atol=0)
    mine = models[1].state_dict()
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_helped_runs_in_bf16_and_channels_last():
    candidate = published_candidate(TINY, helped=True)
    assert candidate.turn() > 0
    assert candidate.facts["layout"] == "channels_last"
    seen = []
    model = TINY.make_model()
    model.linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loop = PublishedLoop(model, make_optimizer(model), helped=True)
    batch = TINY.batches(1)[0]
    loop(batch.x, batch.y)
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 11


@pytest.mark.parametrize("helped", [False, True])
def test_a_peer_in_our_process_changes_no_process_wide_setting(helped):
    def settings():
        return (
            float32_settings(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
        )

    before = settings()
    published_candidate(TINY, helped=helped).turn()
    assert settings() == before


@pytest.mark.slow
def test_the_published_loop_without_tf32_has_its_own_process():
    before = float32_settings()
    candidate = published_without_tf32(TINY)
    try:
        assert candidate.name == "published fp32, TF32 off"
        assert (candidate.facts["by"], candidate.facts["tf32"]) == ("published", False)
        assert candidate.turn() > 0
        assert candidate.once is None
    finally:
        candidate.close()
    assert float32_settings() == before


@pytest.mark.slow
def test_the_process_of_the_loop_without_tf32_allows_none():
    script = """
        import torch
        from fastadv.benchmark.peers.published_worker import build
        from fastadv.benchmark.setting import Setting
        torch.backends.cuda.matmul.allow_tf32 = True
        build(Setting(width=4, batch_size=4, image_size=8), "train")()
        print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.fixture
def peer(tmp_path):
    """Starts a fake peer whose body handles ``request`` and may call ``answer``."""
    started = []

    def start(body: str, timeout: float = 20) -> Worker:
        script = tmp_path / "peer.py"
        frame = """
            import json, sys
            def answer(**said): print(json.dumps(said), flush=True)
            for line in sys.stdin:
                request = json.loads(line)
                if request["op"] == "quit":
                    break
        """
        script.write_text(textwrap.dedent(frame) + textwrap.indent(textwrap.dedent(body), "    "))
        started.append(Worker("fake", [sys.executable, str(script)], timeout=timeout))
        return started[-1]

    yield start
    for worker in started:
        worker.close()


def test_a_worker_is_set_up_and_steps(peer):
    worker = peer("""
        if request["op"] == "setup":
            answer(warm_seconds=[1.0], version="1.2", got=request["threads"])
        else:
            answer(seconds=0.125)
    """)
    assert worker.setup(threads=2) == {"warm_seconds": [1.0], "version": "1.2", "got": 2}
    assert [worker.step(), worker.step()] == [0.125, 0.125]
    worker.close()
    assert worker._process.returncode == 0


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ('answer(error="no such attack")', "cannot run: no such attack"),
        ('raise ValueError("it broke")', "ended: ValueError: it broke"),
    ],
)
def test_a_peer_that_cannot_run_is_reported_in_one_sentence(peer, body, sentence):
    with pytest.raises(UserError, match=sentence):
        peer(body).step()


def test_a_peer_that_hangs_is_killed(peer):
    worker = peer("import time; time.sleep(60)", timeout=0.5)
    with pytest.raises(UserError, match="took over"):
        worker.step()
    worker.close()
    assert worker._process.poll() is not None


def test_serving_answers_in_lines_even_when_the_library_prints(tmp_path):
    script = tmp_path / "served.py"
    script.write_text(
        textwrap.dedent("""
        import time

        from fastadv.benchmark.peers.serving import serve

        def build(setting, attack_bn):
            print("chatter of", setting.model)
            if attack_bn == "neither":
                raise ValueError("eval mode only")

            def step():
                print("more chatter")
                time.sleep(0.05)

            return step

        serve(build, "torch")
        """)
    )
    worker = Worker("served", [sys.executable, str(script)], timeout=60)
    try:
        common = {"setting": {"width": 4}, "threads": 1, "warm_calls": 2}
        with pytest.raises(UserError, match="eval mode only"):
            worker.setup(attack_bn="neither", **common)
        with pytest.raises(UserError, match="before its setup"):
            worker.step()
        said = worker.setup(attack_bn="train", **common)
        assert len(said["warm_seconds"]) == 2
        assert min(said["warm_seconds"]) >= 0.05
        assert said["version"] == version("torch")
        began = time.perf_counter()
        assert 0.05 <= worker.step() <= time.perf_counter() - began
    finally:
        worker.close()
