"""Networks spread over two real processes (gloo): each trains its own, and the result is that of
one process, bit for bit; and teams that every process trains whole: equal gradients, equal EMA
copies, equal weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdtoolkit import list_methods
from kdtoolkit.core.registries import METHODS
from kdtoolkit.core.strategy import StrategySpec

SCRIPT = '''
"""A user's script: the same under python and under torchrun."""
import json, os, signal, sys
from pathlib import Path

import timm
import torch

import kdtoolkit
from kdtoolkit import Callback, distill
from kdtoolkit.callbacks import DCLMerger, DecayingEnsemble, EMATeacher, MutualKL
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.losses import FitNet, KD
from kdtoolkit.methods import Peers
from kdtoolkit.methods.build_losses import BuiltLosses
from kdtoolkit.utils.signals import Interrupted

torch.set_num_threads(1)
root, stop, spread = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "spread"
rank = os.environ.get("RANK", "0")
nets = []
for seed in range(2):
    torch.manual_seed(seed)
    nets.append(timm.create_model("cifar_resnet8", num_classes=10, drop_rate=0.1))
teacher = timm.create_model("cifar_wrn16_1", num_classes=10)


def with_adapters(student, teachers):
    losses = {
        "kd": KD(student, teachers[0]), "fitnet": FitNet(student, teachers[0], [(2, 2)], hint=1),
    }
    return BuiltLosses(losses, {"kd": 0.5, "fitnet": 2.0}, {"kd": 0, "fitnet": 0})


peers = Peers(nets, spread=spread, image=(16, 16))
peers.add_teacher_losses([Frozen(teacher, None, 16, image=(16, 16))], with_adapters)


class Watch(Callback):
    def __init__(self):
        self.grads = []

    def on_grads(self, run):
        mine = run.method.trainable_parameters()
        self.grads.append({n: p.grad.clone() for n, p in mine.items()})

    def on_step_end(self, run, step):
        if run.clock.step == stop and run.accelerator.process_index == 0:  # all must stop
            os.kill(os.getpid(), signal.SIGTERM)


watch = Watch()
ema, decaying = EMATeacher(0.3, decay=0.9), DecayingEnsemble(0.3, rate=0.1)
strategies = [MutualKL(0.5), DCLMerger(3), ema, decaying]
try:
    result = distill(
        None, None, "digits", method=peers, callbacks=[*strategies, watch],
        epochs=2, lr=0.05, batch_size=32, train_limit=256, validation=64, num_workers=0,
        output_dir=root / "run", resume="auto", grad_clip=1.0, progress="off", keep="all",
        figures=False, allow_weak_teacher=True,
    )
except Interrupted as error:
    print("interrupted", error, flush=True)
    os._exit(0)
torch.save({n: net.state_dict() for n, net in result.networks.items()}, root / f"nets{rank}.pt")
torch.save(watch.grads, root / f"grads{rank}.pt")
again = [timm.create_model("cifar_resnet8", num_classes=10) for _ in range(2)]
own = distill(
    None, None, "digits", method=Peers(again, spread=spread, batches="own"), max_steps=12, lr=0.05,
    callbacks=[DCLMerger(5), EMATeacher(0.3, decay=0.9, learn_from="own")], batch_size=32,
    train_limit=256, validation="none", num_workers=0, progress="off", eval_test="end",
)
torch.save({n: net.state_dict() for n, net in own.networks.items()}, root / f"own{rank}.pt")
keys = ("top1", "loss", "networks", "exported", "epoch")
numbers = {k: v for k, v in result.metrics.items() if k in keys}
(root / f"metrics{rank}.json").write_text(json.dumps(numbers))
'''


def launch(root: Path, processes: int, how: str, stop: int = -1) -> str:
    root.mkdir(exist_ok=True)
    script = root / "train.py"
    script.write_text(SCRIPT)
    many = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes > 1
        else []
    )
    env = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, *many, str(script), str(root), str(stop), how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def nets(root: Path, rank: int = 0, name: str = "nets") -> dict:
    return torch.load(root / f"{name}{rank}.pt", weights_only=True)


def same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys() == {"student", "peer1", "ema", "ema/peer1"}
    for name, state in one.items():
        for key, value in state.items():
            torch.testing.assert_close(
                two[name][key], value, rtol=0, atol=0, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    launch(root, 1, "no")
    return root


def test_spread_over_two_processes_is_one_process_bit_for_bit(one, tmp_path):
    two = tmp_path / "two"
    launch(two, 2, "spread")
    same(nets(one), nets(two))
    same(nets(one), nets(two, 1))
    for rank in (0, 1):  # and where every network has batches of its own
        same(nets(one, name="own"), nets(two, rank, "own"))
    assert json.loads((one / "metrics0.json").read_text()) == json.loads(
        (two / "metrics1.json").read_text()
    )
    rows = [
        [json.loads(x) for x in (r / "run/metrics.jsonl").read_text().splitlines()]
        for r in (one, two)
    ]
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in a.items() if k.startswith(("loss", "top1", "event"))} == {
            k: v for k, v in b.items() if k.startswith(("loss", "top1", "event"))
        }
    exported = json.loads((two / "metrics0.json").read_text())["exported"]
    saved = {p.name for p in (two / "run/networks").iterdir()}
    assert saved == {"student", "peer1", "ema", "ema-peer1"} - {exported.replace("/", "-")}


def test_spread_goes_on_in_the_middle_of_an_epoch(one, tmp_path):
    broken = tmp_path / "broken"
    assert launch(broken, 2, "spread", stop=7).count("interrupted") == 2
    launch(broken, 2, "spread")
    same(nets(one), nets(broken))


def test_every_process_trains_all_with_equal_gradients_and_copies(tmp_path):
    root = tmp_path / "all"
    launch(root, 2, "together")
    first, second = (torch.load(root / f"grads{r}.pt", weights_only=True) for r in (0, 1))
    assert len(first) == 16 and all(
        torch.equal(a[k], b[k]) for a, b in zip(first, second, strict=True) for k in a
    )
    zero, other = nets(root), nets(root, 1)
    for name, state in zero.items():
        assert all(torch.equal(v, other[name][k]) for k, v in state.items()), name


EVERY = '''
"""Two steps of every method of several networks, on every rank; what each rank ends with."""
import os, sys
from pathlib import Path

import timm
import torch

from kdtoolkit import Callback, distill, list_methods
from kdtoolkit.core.registries import METHODS
from kdtoolkit.core.strategy import StrategySpec

torch.set_num_threads(1)
root, rank = Path(sys.argv[1]), os.environ["RANK"]


class Watch(Callback):
    def __init__(self):
        self.grads = []

    def on_grads(self, run):
        self.grads.append({n: p.grad.clone() for n, p in run.method.named_parameters()})


kept = {}
strategies = [name for name in list_methods() if isinstance(METHODS[name], StrategySpec)]
beside = (["kd", "fitnet", "dml"], ["fitnet", "one"], ["sokd", "fitnet"])
for method in (*strategies, *beside):
    name = method if isinstance(method, str) else next(m for m in method if m in strategies)
    watch = Watch()
    torch.manual_seed(5)
    teacher = None
    if METHODS[name].needs_teacher or name != method:
        teacher = timm.create_model("cifar_resnet14", num_classes=10)
    own = {"spread": False} if "spread" in METHODS[name].options else {}
    result = distill(
        teacher, "cifar_resnet8", "digits", method=method, max_steps=2, batch_size=32,
        train_limit=64, validation="none", num_workers=0, progress="off", callbacks=[watch],
        eval_test="end", allow_weak_teacher=True, **own,
    )
    states = {n: net.state_dict() for n, net in result.networks.items()}
    top1 = result.metrics.get("networks", result.metrics["top1"])
    kept[str(method)] = {"grads": watch.grads, "nets": states, "top1": top1}
torch.save(kept, root / f"every{rank}.pt")
'''


def test_every_strategy_has_equal_gradients_and_networks_on_two_ranks(tmp_path):
    (tmp_path / "every.py").write_text(EVERY)
    env = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *many, str(tmp_path / "every.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"every{r}.pt", weights_only=True) for r in (0, 1))
    strategies = {n for n in list_methods() if isinstance(METHODS[n], StrategySpec)}
    assert strategies < set(first) and len(first) == len(strategies) + 3
    for name, mine in first.items():
        its = second[name]
        assert len(mine["grads"]) == 2 and mine["top1"] == its["top1"], name
        for a, b in zip(mine["grads"], its["grads"], strict=True):
            assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items()), name
        for network, state in mine["nets"].items():
            assert all(torch.equal(v, its["nets"][network][k]) for k, v in state.items()), (
                name,
                network,
            )
