"""Metrics against slow loops and scikit-learn, over uneven batches and two processes; cost."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import sklearn.metrics
import timm
import torch
import torch.distributed as dist
from torch import nn

from kdtoolkit import metrics
from kdtoolkit.metrics.classification import ECE, Agreement, CrossEntropy, Top1, Top5
from kdtoolkit.metrics.compression_score import CompressionScore
from kdtoolkit.metrics.meter import Meter
from kdtoolkit.metrics.model_cost import Cost

ALL = [Top1, Top5, ECE, CrossEntropy, Agreement]


def sample(n=237, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=generator)
    labels = torch.where(
        torch.rand(n, generator=generator) < 0.5,
        logits.argmax(1),
        torch.randint(0, classes, (n,), generator=generator),
    )
    return logits, labels, logits + torch.randn(n, classes, generator=generator)


def slow_ece(logits, labels, bins=15):
    p = torch.softmax(logits, 1).double()
    total = 0.0
    for m in range(bins):
        rows = [i for i in range(len(p)) if m / bins < p[i].max() <= (m + 1) / bins]
        if rows:
            right = sum(float(p[i].argmax() == labels[i]) for i in rows) / len(rows)
            sure = sum(float(p[i].max()) for i in rows) / len(rows)
            total += len(rows) / len(p) * abs(right - sure)
    return 100 * total


def expected(logits, labels, teacher):
    p = torch.softmax(logits.double(), 1).numpy()
    names = list(range(logits.shape[1]))
    return {
        "top1": 100 * sklearn.metrics.accuracy_score(labels, p.argmax(1)),
        "top5": 100 * sklearn.metrics.top_k_accuracy_score(labels, p, k=5, labels=names),
        "loss": sklearn.metrics.log_loss(labels, p, labels=names),
        "ece": slow_ece(logits, labels),
        "agreement": 100 * sklearn.metrics.accuracy_score(teacher.argmax(1), p.argmax(1)),
    }


def test_one_go_equals_sklearn_and_slow_loops():
    logits, labels, teacher = sample()
    want = expected(logits, labels, teacher)
    for metric in (m() for m in ALL):
        references = teacher if metric.compares_with == "teacher" else labels
        got = metric.compute(predictions=logits, references=references)
        assert got == {metric.key: pytest.approx(want[metric.key], abs=1e-4)}


def test_uneven_batches_equal_one_batch_and_compute_starts_anew():
    logits, labels, teacher = sample()
    meter, want = Meter([m() for m in ALL]), expected(logits, labels, teacher)
    for _ in range(2):
        for a, b in ((0, 1), (1, 64), (64, 237)):
            with torch.inference_mode(
                a == 0
            ):  # counts made in inference mode can be added to outside
                meter.add(logits[a:b], labels[a:b], teacher[a:b])
        assert [len(m) for m in meter.metrics] == [237] * len(ALL)
        assert meter.compute() == pytest.approx(want, abs=1e-4)
        assert [len(m) for m in meter.metrics] == [0] * len(ALL)


def test_numpy_lists_single_samples_and_dense_labels():
    logits, labels, teacher = sample(24)
    want = expected(logits, labels, teacher)
    assert Top1().compute(predictions=logits.numpy(), references=labels.tolist())[
        "top1"
    ] == pytest.approx(want["top1"])
    assert CrossEntropy().compute(predictions=logits.tolist(), references=labels.numpy())[
        "loss"
    ] == pytest.approx(want["loss"], abs=1e-5)
    one = Agreement()
    for prediction, reference in zip(logits, teacher.argmax(1), strict=True):
        one.add(prediction=prediction, reference=int(reference))
    assert one.compute()["agreement"] == pytest.approx(want["agreement"])
    dense = logits.reshape(2, 3, 4, 10).permute(0, 3, 1, 2)  # (B, C, H, W)
    assert ECE().compute(predictions=dense, references=labels.reshape(2, 3, 4))[
        "ece"
    ] == pytest.approx(want["ece"], abs=1e-4)


def test_few_classes_half_precision_and_numbers_that_are_not():
    logits, labels, _ = sample(50, classes=3)
    assert Top5().compute(predictions=logits, references=labels) == {"top5": 100.0}
    assert 0 <= Top1().compute(predictions=logits.bfloat16(), references=labels)["top1"] <= 100
    broken = torch.full((4, 3), float("nan"))
    assert np.isnan(
        ECE().compute(predictions=broken, references=torch.zeros(4, dtype=torch.long))["ece"]
    )


def test_ece_by_hand():
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.7, 0.3], [0.3, 0.7]]))
    # bin of 0.9: one of two right, gap 0.4; bin of 0.7: two of two right, gap 0.3
    assert ECE().compute(predictions=logits, references=[0, 1, 0, 1])["ece"] == pytest.approx(
        35.0, abs=1e-4
    )


def test_no_cache_folder_is_made(tmp_path, monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    Top1().compute(predictions=[[0.0, 1.0]], references=[1])
    assert not (tmp_path / "cache").exists() and isinstance(Top1(), evaluate.Metric)


def test_errors_say_what_to_do():
    logits, labels, _ = sample(8)
    with pytest.raises(ValueError, match="before any sample.*call add_batch"):
        Top1().compute()
    with pytest.raises(ValueError, match="before any sample"):
        Meter([Top1(), Agreement()]).compute()
    with pytest.raises(ValueError, match=r"predictions of shape \(8,\).*pass the network's logits"):
        Top1().compute(predictions=labels, references=labels)
    with pytest.raises(ValueError, match="needs both predictions and references"):
        Top1().add_batch(predictions=logits)
    with pytest.raises(ValueError, match="integer class ids"):
        ECE().add_batch(predictions=logits, references=labels.float())
    with pytest.raises(ValueError, match="unknown inputs"):
        Top1().add_batch(predictions=logits, references=labels, weights=1)
    with pytest.raises(ValueError, match="no metrics"):
        Meter([])


def test_meter_without_teacher_leaves_agreement_out():
    logits, labels, _ = sample(8)
    meter = Meter([Top1(), Agreement()])
    meter.add(logits, labels)
    assert list(meter.compute()) == ["top1"]


def _rank(rank, path):
    os.environ.update(OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    logits, labels, teacher = sample()
    meter, alone = Meter([m() for m in ALL]), Top1(sync=False)
    for a, b in (((0, 50), (50, 51)), ((51, 237),))[rank]:
        meter.add(logits[a:b], labels[a:b], teacher[a:b])
        alone.add_batch(predictions=logits[a:b], references=labels[a:b])
    assert meter.compute() == pytest.approx(expected(logits, labels, teacher), abs=1e-4)
    a, b = ((0, 51), (51, 237))[rank]
    assert alone.compute() == Top1(sync=False).compute(
        predictions=logits[a:b], references=labels[a:b]
    )
    if rank == 0:  # the other rank has no batch at all
        meter.add(logits, labels, teacher)
    assert meter.compute() == pytest.approx(expected(logits, labels, teacher), abs=1e-4)
    dist.destroy_process_group()


def test_two_ranks_with_uneven_batches_equal_one_process(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(tmp_path / "store",), nprocs=2)


BIG = Cost(1000, 10_000, 8.0)


def score(teacher_top1=90.0, student_top1=85.0, classes=10, big=BIG, small=None):
    return metrics.score_compression(
        teacher_top1, student_top1, classes, big, small or Cost(250, 2500, 2.0)
    )


def test_compression_by_hand():
    got = score(student_top1=70.0)
    assert got == pytest.approx(
        {
            "retention_above_chance": 0.75,
            "params_ratio": 4,
            "macs_ratio": 4,
            "latency_ratio": 4,
            "compression": 4,
            "saved": 0.75,
            "compression_score": 0.75,
        }
    )
    without = score(small=Cost(500, 1250))
    assert without["latency_ratio"] is None and without["compression"] == pytest.approx(4)


def test_compression_limits():
    assert score(student_top1=90.0, small=BIG)["compression_score"] == 0  # the teacher itself
    assert (
        score(student_top1=99.0, small=Cost(2000, 20_000, 16.0))["compression_score"] == 0
    )  # a larger student
    assert score(student_top1=5.0)["compression_score"] == 0  # below chance
    better = score(student_top1=100.0, small=Cost(1, 1, 0.001))
    kept = better["retention_above_chance"]
    assert 1 < better["compression_score"] <= 2 * kept / (1 + kept)


def test_compression_is_monotone_and_within_range():
    by_accuracy = [score(student_top1=a)["compression_score"] for a in range(0, 91, 5)]
    by_size = [
        score(small=Cost(n, 10 * n, n / 100))["compression_score"] for n in range(1000, 0, -100)
    ]
    for values in (by_accuracy, by_size):
        assert values == sorted(values) and min(values) >= 0 and max(values) <= 1


def test_compression_errors():
    with pytest.raises(ValueError, match="not above chance"):
        score(teacher_top1=10.0)
    with pytest.raises(ValueError, match="num_classes is 1; allowed: a whole number from 2"):
        score(classes=1)
    with pytest.raises(ValueError, match="params must be positive"):
        score(small=Cost(0, 10))


def test_compression_as_a_metric():
    logits, labels, _ = sample()
    small = Cost(250, 2500, 2.0)
    metric = CompressionScore(90.0, 10, BIG, small)
    for a, b in ((0, 100), (100, 237)):
        metric.add_batch(predictions=logits[a:b], references=labels[a:b])
    top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
    assert metric.compute() == pytest.approx(metrics.score_compression(90.0, top1, 10, BIG, small))


def test_macs_and_params_of_known_layers():
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert metrics.measure_cost(conv, (3, 10, 12), latency=False) == Cost(216, 216 * 120, None)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    assert metrics.measure_cost(linear, (3, 4, 4), latency=False)[:2] == (245, 240)


class Stubborn(nn.Module):
    """Cannot run on meta tensors and cannot be copied."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def __deepcopy__(self, memo):
        raise TypeError("no copies")

    def forward(self, x):
        assert not self.training
        return self.fc(x.flatten(1)) * x.sum().item()


def test_macs_fall_back_to_the_real_device():
    net = Stubborn().train()
    found = metrics.measure_cost(net, (3, 2, 2))
    assert found[:2] == (52, 48) and found.latency_ms > 0 and net.training and net.fc.training


def test_cost_leaves_the_model_as_it_was():
    net = timm.create_model("resnet18", num_classes=10).train()
    net.layer1.eval()
    fired = []
    net.layer2.register_forward_hook(lambda *a: fired.append(1))
    state = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    found = metrics.measure_costs({"a": net, "b": nn.Conv2d(3, 4, 1)}, (3, 32, 32))
    assert found["a"].latency_ms > found["b"].latency_ms > 0 and not fired
    assert modes == [m.training for m in net.modules()] and len(net.layer2._forward_hooks) == 1
    assert all(
        torch.equal(state[k], v) and v.device.type == "cpu" for k, v in net.state_dict().items()
    )
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError, match="three sizes"):
        metrics.measure_cost(net, (32, 32))


def test_summary_is_what_the_report_reads():
    big, small = (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 40)),
        nn.Sequential(nn.Flatten(), nn.Linear(12, 10)),
    )
    row = metrics.measure_compression(
        big, small, (3, 2, 2), teacher_top1=90, student_top1=80, num_classes=10
    )
    assert (
        row["params"] == 130
        and row["teacher_macs"] == 480
        and row["compression"]["params_ratio"] == 4
    )
    row = metrics.measure_compression(
        big, small, (3, 2, 2), teacher_top1=9, student_top1=8, num_classes=10, latency=False
    )
    assert "compression" not in row and row["latency_ms"] is None


def test_each_network_is_measured_at_its_own_size():
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, num_classes=10
    )
    conv = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    sizes = {"teacher": (3, 32, 32), "student": (3, 16, 16)}
    found = metrics.measure_costs({"teacher": vit, "student": conv}, sizes)
    assert found["student"].macs == 216 * 256 and found["teacher"].latency_ms > 0
    row = metrics.measure_compression(
        vit, conv, sizes, teacher_top1=90, student_top1=80, num_classes=10, latency=False
    )
    assert row["macs"] == 216 * 256 and row["teacher_macs"] == found["teacher"].macs
    with pytest.raises(ValueError, match=r"no size for \['student'\]"):
        metrics.measure_costs({"teacher": vit, "student": conv}, {"teacher": (3, 32, 32)})
    with pytest.raises(ValueError, match="three sizes"):
        metrics.measure_costs({"student": conv}, {"student": (16, 16)})


def test_cost_of_a_model_that_hands_a_parameter_from_module_to_module():
    net = timm.create_model("pit_ti_224", num_classes=10, img_size=64)
    cost = metrics.measure_cost(net, (3, 64, 64), device="cpu")
    assert (
        cost.macs > 10_000_000 and net.training and all(p.requires_grad for p in net.parameters())
    )


def test_old_names_warn():
    with pytest.warns(DeprecationWarning, match="measure_cost"):
        assert metrics.cost is metrics.measure_cost
    with pytest.warns(DeprecationWarning, match="score_compression"):
        assert metrics.compression is metrics.score_compression
