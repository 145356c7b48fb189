"""Report pages of a small real run, curves of unusual rows, Grad-CAM with known results."""

from __future__ import annotations

import builtins
import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from sklearn.datasets import load_digits
from torch import nn

from kdtoolkit import report
from kdtoolkit.report import curves, page_sections, plots, run_folder, tables
from kdtoolkit.report.comparison import mean_and_std
from kdtoolkit.report.gradcam import gradcam


class Corner(nn.Module):
    """Class 1 is read from the lower right quadrant, class 0 from the upper left one."""

    def __init__(self, layout="NCHW"):
        super().__init__()
        self.layout = layout
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        nn.init.constant_(self.conv.weight, 1.0)
        self.stage = nn.Identity()
        self.feature_info = [{"module": "stage", "num_chs": 2}]
        self.pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        if layout == "tokens":
            self.num_prefix_tokens = 1

    def forward(self, x):
        f = self.conv(F.avg_pool2d(x, 2)).relu()  # (B, 2, h, w)
        h, w = f.shape[-2:]
        if self.layout == "NHWC":
            f = self.stage(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.layout == "tokens":
            tokens = f.flatten(2).transpose(1, 2)
            tokens = self.stage(torch.cat([tokens[:, :1] * 0, tokens], 1))
            f = tokens[:, 1:].transpose(1, 2).unflatten(2, (h, w))
        else:
            f = self.stage(f)
        return torch.stack(
            [f[:, 0, : h // 2, : w // 2].mean((1, 2)), f[:, 1, h // 2 :, w // 2 :].mean((1, 2))], 1
        )


def quadrants():
    """Two images with a bright patch in each of two corners; the brighter one decides."""
    x = torch.full((2, 3, 16, 24), 0.01)
    x[:, :, 2:6, 2:8], x[:, :, 10:14, 14:20] = torch.tensor([0.9, 0.3]).view(2, 1, 1, 1), 0.6
    return x


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "tokens"])
def test_gradcam_peaks_where_the_class_is(layout):
    net, x = Corner(layout), quadrants()
    maps = gradcam(net, x, target=[0, 1])
    assert (
        maps.shape == (2, 16, 24) and maps.min() >= 0 and maps.amax((1, 2)).allclose(torch.ones(2))
    )
    rows, columns = zip(*((int(m.argmax()) // 24, int(m.argmax()) % 24) for m in maps), strict=True)
    assert 2 <= rows[0] < 6 and 2 <= columns[0] < 8
    assert 10 <= rows[1] < 14 and 14 <= columns[1] < 20
    assert torch.equal(gradcam(net, x), maps)  # the classes that the network chooses
    assert torch.allclose(gradcam(net, x, layer="stage"), maps) and torch.allclose(
        gradcam(net, x, layer=net.stage), maps
    )


def test_gradcam_equals_the_paper_by_hand():
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=5).eval()
    x, kept = torch.rand(2, 3, 64, 64), []
    handle = net.layer4.register_forward_hook(lambda m, i, o: kept.append(o))
    mean, std = (torch.tensor(net.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    logits = net((x - mean) / std)
    handle.remove()
    grad = torch.autograd.grad(logits[:, 3].sum(), kept[0])[0]
    cam = torch.stack(
        [sum(grad[b, c].mean() * kept[0][b, c] for c in range(512)).relu() for b in range(2)]
    )
    cam = F.interpolate(cam[:, None], (64, 64), mode="bilinear")[:, 0]
    assert torch.allclose(
        gradcam(net, x, target=3), cam / cam.amax((1, 2), keepdim=True), atol=1e-4
    )


def test_gradcam_leaves_the_model_as_it_was():
    net = timm.create_model("resnet10t", num_classes=5).train().requires_grad_(False)
    net.layer1.eval()
    net.fc.weight.requires_grad_(True)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        gradcam(net, x)
    assert modes == [m.training for m in net.modules()] and flags == [
        p.requires_grad for p in net.parameters()
    ]
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert (
        torch.equal(net.fc.weight.grad, torch.ones_like(net.fc.weight))
        and net.conv1[0].weight.grad is None
    )
    assert (
        not any(m._forward_hooks for m in net.modules()) and x.grad is None and not x.requires_grad
    )


def test_gradcam_of_a_vit_looks_before_its_last_block():
    net = timm.create_model("test_vit", num_classes=4)  # its class token alone reaches the logits
    x = torch.rand(1, 3, 160, 160)
    assert gradcam(net, x).std() > 0
    last = net.feature_info[-1]["module"]
    assert gradcam(net, x, layer=last).max() == 0


def test_gradcam_without_feature_info_and_errors():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    x = torch.rand(1, 3, 8, 8)
    assert torch.allclose(gradcam(net, x), gradcam(net, x, layer="1"))
    for wrong, match in (
        ({"layer": "9"}, "is not a module of Sequential; its children: 0, 1"),
        ({"layer": "4"}, r"gives \(1, 2\); expected a map"),
        ({"target": 2}, "from 0 to 1"),
        ({"mean_std": ((0.5, 0.5), (1, 1))}, "one number per channel"),
    ):
        with pytest.raises(ValueError, match=match):
            gradcam(net, x, **wrong)
    with pytest.raises(ValueError, match=r"expected float images \(B, C, H, W\)"):
        gradcam(net, x[0])
    assert not any(m._forward_hooks for m in net.modules())


def small_net(width):
    torch.manual_seed(0)
    conv = [
        nn.Conv2d(3, width, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.ReLU(),
    ]
    return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def digits():
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    return x, torch.tensor(y)


def train(net, path, teacher=None, epochs=2):
    """A real run of a few steps that writes what the engine writes."""
    (x, y), rows, step = digits(), [], 0
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    if teacher is not None:
        rows.append({"event": "teacher", "split": "test", "top1": 80.0, "top5": 99.0, "loss": 0.5})
    for epoch in range(epochs):
        for ids in torch.arange(900).split(100):
            ce = F.cross_entropy(net(x[ids]), y[ids])
            kd = (
                F.mse_loss(net(x[ids]), teacher(x[ids]).detach()) if teacher is not None else 0 * ce
            )
            optimizer.zero_grad()
            (ce + kd).backward()
            optimizer.step()
            step += 1
            row = {
                "event": "train",
                "epoch": epoch,
                "step": step,
                "lr": 0.1,
                "loss": (ce + kd).item(),
            }
            rows.append({**row, "loss/ce": ce.item(), "loss/kd": kd.item()})
        with torch.no_grad():
            logits = net(x[900:])
        top1 = 100 * (logits.argmax(1) == y[900:]).float().mean().item()
        last = {
            "top1": top1,
            "loss": F.cross_entropy(logits, y[900:]).item(),
            "epoch": epoch + 1,
            "split": "test",
        }
        rows.append({"event": "eval", "network": "student", "step": step, "ece": 3.0, **last})
    rows.append({"event": "final", "chosen": "last", **last})
    if teacher is not None:
        rows[-1] |= {
            "teacher_top1": 80.0,
            "retention": top1 / 80,
            "agreement": 70.0,
            "params": 123,
            "macs": 4567,
        }
        rows[-1]["compression"] = {
            "compression_score": 0.5,
            "retention_above_chance": 0.9,
            "params_ratio": 2.5,
            "latency_ratio": None,
        }
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "teacher": teacher and "big_net",
        "student": "small_net",
        "method": "kd",
        "losses": {"ce": 1.0, "kd": 0.9},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "env.json").write_text(json.dumps({"torch": torch.__version__, "device": "cpu"}))
    return net


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    teacher = small_net(8)
    train(small_net(4), path / "alone")
    return path, teacher, train(small_net(4), path / "kd", teacher)


def png_size(file):
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_report_of_a_small_real_run(runs):
    path, teacher, student = runs
    x, y = digits()
    page = report.write(
        path / "kd",
        student=student,
        teacher=teacher,
        baseline=path / "alone",
        images=x[:4],
        labels=y[:4],
    )
    text = page.read_text()
    assert text.startswith("# big_net → small_net, method kd")
    for part in (
        "**last** epoch (epoch 2), on the test split", "| student alone |", "| distilled student |",
        "| 123 |", "4.57 K", "2.50×", "0.500", "ce 1.0, kd 0.9", "points of top-1", "80.00",  # noqa: RUF001
    ):  # fmt: skip
        assert part in text
    for name in ("accuracy", "eval_loss", "loss", "gradcam"):
        assert (
            f"figures/{name}.png" in text
            and min(png_size(path / "kd" / "figures" / f"{name}.png")) > 300
        )
    assert str(path) not in text and "alone: it has no `student/` folder" in text
    assert not list((path / "kd").rglob(".*"))


def test_report_without_matplotlib_is_still_written(runs, tmp_path, monkeypatch):
    path, _, student = runs
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    for file in ("metrics.jsonl", "config.yaml"):
        (tmp_path / file).write_text((path / "kd" / file).read_text())
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    text = report.write(tmp_path, student=student, images=digits()[0][:1]).read_text()
    assert (
        text.count('pip install "kdtoolkit[plot]"') == 1
        and "## Figures" not in text
        and "80.00" in text
    )
    assert not (tmp_path / "figures").exists()
    assert "kdtoolkit[plot]" in report.compare({"kd": tmp_path}, tmp_path / "out").read_text()


def test_report_of_one_point_broken_lines_and_nothing(tmp_path):
    rows = [
        {
            "event": "train",
            "epoch": 0,
            "step": 1,
            "loss": math.inf,
            "loss/ce": math.nan,
            "loss/kd": 2.0,
        },
        {
            "event": "eval",
            "split": "val",
            "network": "student",
            "epoch": 1,
            "step": 9,
            "top1": 12.5,
            "loss": math.nan,
        },
        {
            "event": "eval",
            "split": "val",
            "network": "peer",
            "epoch": 1,
            "step": 9,
            "top1": 14.5,
            "loss": 2.0,
        },
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"event": "ev')
    text = report.write(tmp_path).read_text()
    for part in (
        "no final row",
        "12.50",
        "line 4 is not JSON",
        "3 logged values are not finite",
        "config.yaml is missing",
    ):
        assert part in text
    assert (tmp_path / "figures" / "accuracy.png").exists() and (
        tmp_path / "figures" / "loss.png"
    ).exists()
    (tmp_path / "empty").mkdir()
    assert "No evaluation of the student" in report.write(tmp_path / "empty").read_text()
    with pytest.raises(ValueError, match="is not a folder; pass the output_dir"):
        report.write(tmp_path / "nowhere")


def test_best_epoch_takes_the_numbers_of_that_epoch(tmp_path):
    rows = [
        {"event": "eval", "split": "val", "epoch": e, "step": e, "top1": 90.0 - e, "loss": float(e)}
        for e in (1, 2, 3)
    ]
    rows.append({"event": "final", "epoch": 1, "chosen": "best", "split": "val", "top1": 89.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = run_folder.read(tmp_path)
    assert tables.student_metrics(run)[
        "loss"
    ] == 1.0 and "**best** epoch (epoch 1), on the val split" in tables.describe_source(run)


def test_compare_groups_of_seeds(runs, tmp_path):
    path, _, _ = runs
    rows = [{"event": "final", "epoch": 2, "chosen": "best", "split": "test", "top1": 61.0}]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text(json.dumps(rows[0]))
    text = report.compare(
        {"alone": path / "alone", "kd": [path / "kd", str(tmp_path / "other")]}, tmp_path / "out"
    ).read_text()
    mean, std = mean_and_std([tables.student_metrics(run_folder.read(path / "kd"))["top1"], 61.0])
    assert (
        f"| kd | 2 | {mean:.2f} ± {std:.2f} |" in text
        and "(n = 1)" in text
        and "Compare with care" in text
    )
    assert (tmp_path / "out" / "figures" / "accuracy.png").exists()
    assert (tmp_path / "out" / "figures" / "eval_loss.png").exists()
    with pytest.raises(ValueError, match="no runs"):
        report.compare({}, tmp_path)
    with pytest.raises(ValueError, match="no folder for"):
        report.compare({"kd": []}, tmp_path)


def test_gradcam_rows(tmp_path):
    nets = {"teacher": Corner(), "student alone": Corner("NHWC")}
    file = report.gradcam_rows(
        nets, quadrants(), [0, 0], ["upper left", "猫"], tmp_path / "rows.png"
    )
    assert min(png_size(file)) > 300
    assert report.gradcam_rows({}, quadrants(), path=tmp_path / "none.png") is None
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        report.gradcam_rows(nets, quadrants(), [0], path=tmp_path / "none.png")


def test_smoothing_keeps_constants_and_skips_what_is_not_finite():
    assert curves.smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert curves.smooth([1.0, math.nan, 3.0]) == pytest.approx([1.0, 2.0, 3.0])


def test_a_figure_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(self, file, **options):
        file.write_text("half")
        raise OSError("disk full")

    file = tmp_path / "a.png"
    figure = plots.new_figure(1, 1)
    plots.save_figure(figure, file)
    before = file.read_bytes()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.save_figure(figure, file)
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"] and file.read_bytes() == before


FLAT_CONFIG = {
    "teacher": "resnet50", "student": "resnet18", "method": "kd", "layers": ["auto"],
    "losses": {"ce": 1.0, "kd": 0.9}, "epochs": 3, "max_steps": None, "lr": 0.1, "seed": 0,
    "train_data": "digits",
    "data": {"name": "digits", "num_classes": 10},
}  # fmt: skip
NESTED_CONFIG = {
    "networks": {"teacher": "resnet50", "student": "resnet18"},
    "data": {"train_data": "digits"},
    "loss": {"method": "kd", "losses": {"ce": 1.0, "kd": 0.9}, "layers": ["auto"]},
    "optim": {"lr": 0.1},
    "loop": {"epochs": 3, "max_steps": None, "seed": 0},
    "output": {"keep": "exported"},
    "callbacks": [],
}


def test_settings_are_found_in_a_nested_and_in_a_flat_config(tmp_path):
    sections = []
    for name, config in (("flat", FLAT_CONFIG), ("nested", NESTED_CONFIG)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
        run = run_folder.read(tmp_path / name)
        assert run.setting("lr") == 0.1 and run.setting("seed") == 0 and run.has_teacher
        assert run.setting("max_steps") is None and run.setting("nothing") is None
        sections.append(page_sections.settings_section(run))
        assert page_sections.page_title(run) == "resnet50 → resnet18, method kd"
    for part in ("| `losses` | ce 1.0, kd 0.9 |", "| `epochs` | 3 |", "| `train_data` | digits |"):
        assert all(part in section for section in sections)
    assert "num_classes" not in sections[1] and "max_steps" not in "".join(sections)


def test_objects_of_a_config_are_shown_by_their_class():
    schedule = {"schedule": "Linear", "start": 1.0, "end": 0.0}
    assert page_sections.format_setting({"kd": schedule}) == "kd Linear(start=1.0, end=0.0)"
    assert page_sections.format_setting({"object": "package.Net"}) == "package.Net"


def test_the_exported_network_is_named_with_its_reason(tmp_path):
    reason = "it is the best on the val split"
    final = {"event": "final", "split": "test", "top1": 61.0, "chosen": "best"}
    final |= {"exported": "peer1", "exported_reason": reason, "networks": {"peer1": 61.0}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(final))
    text = report.write(tmp_path).read_text()
    assert "The exported network is `peer1`: it is the best on the val split." in text


def test_teacher_is_shown_on_the_split_of_the_curve(tmp_path):
    rows = [
        {"event": "teacher", "split": "val", "top1": 70.0},
        {"event": "teacher", "split": "test", "top1": 71.0},
        {"event": "eval", "split": "val", "epoch": 1, "top1": 60.0},
        {
            "event": "final",
            "split": "test",
            "top1": 61.0,
            "teacher_top1": 71.0,
            "compression": 4.0,
            "retention": 0.86,
        },
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = run_folder.read(tmp_path)
    assert (
        tables.teacher_metrics(run)["top1"] == 71.0
        and tables.teacher_metrics(run, "val")["top1"] == 70.0
    )
    assert tables.compression_parts(run) == {"compression": 4.0, "retention": 0.86}


def test_both_retentions_are_shown_under_their_own_names(runs):
    path, _, _ = runs
    final = run_folder.read(path / "kd").last_row("final")
    text = report.write(path / "kd").read_text()
    assert f"| retention, top-1 / teacher's top-1 | {final['top1'] / 80:.3f} |" in text
    assert "| retention above chance | 0.900 |" in text


def test_gradcam_of_a_network_with_a_size_of_its_own_resizes_as_training_does(tmp_path):
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, num_classes=4
    )
    x = torch.rand(2, 3, 16, 16)
    maps = gradcam(net, x)
    assert maps.shape == (2, 16, 16) and maps.std() > 0
    assert min(png_size(report.gradcam_rows({"teacher": net}, x, path=tmp_path / "rows.png"))) > 100


def test_a_picture_that_fails_is_a_note(runs):
    path, _, student = runs

    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no pictures of me")

    text = report.write(
        path / "kd", student=student, teacher=Broken(), images=digits()[0][:2]
    ).read_text()
    assert "no gradcam.png: it could not be drawn (RuntimeError: no pictures of me)" in text
    assert "figures/accuracy.png" in text and "80.00" in text and "![gradcam]" not in text
