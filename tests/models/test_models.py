"""The CIFAR networks against published counts and trained weights; loading, saving, errors."""

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdtoolkit import models
from kdtoolkit.features.model_inputs import normalisation
from kdtoolkit.models.describe import describe_model, fixed_input_size, input_size
from kdtoolkit.models.loading import load_model
from kdtoolkit.models.saving import save_model

SHARED = Path(os.environ.get("KDTOOLKIT_SHARED", Path(__file__).parents[2] / "../shared"))
WEIGHTS = sorted(SHARED.glob("weights/*.safetensors"))
needs_weights = pytest.mark.skipif(not WEIGHTS, reason="no trained weights: set KDTOOLKIT_SHARED")
NAMES = timm.list_models("cifar_*")
SMALL = [
    "cifar_densenet40_12",
    "cifar_mobilenetv2_half",
    "cifar_resnet8",
    "cifar_resnet8x4",
    "cifar_shufflenetv1",
]
SMALL += ["cifar_shufflenetv2", "cifar_vgg8", "cifar_wrn16_1", "cifar_wrn20_8"]

# 100 classes. The networks of Tian et al. 2020 (arXiv 1910.10699), counted on their public code
COUNTS = {
    "cifar_resnet20": 278_324,
    "cifar_resnet32": 472_756,
    "cifar_resnet56": 861_620,
    "cifar_resnet110": 1_736_564,
    "cifar_resnet8x4": 1_233_540,
    "cifar_resnet32x4": 7_433_860,
    "cifar_wrn16_2": 703_284,
    "cifar_wrn40_1": 569_780,
    "cifar_wrn40_2": 2_255_156,
    "cifar_vgg8": 3_965_028,
    "cifar_vgg13": 9_462_180,
    "cifar_mobilenetv2_half": 812_836,
    "cifar_shufflenetv1": 949_258,
    "cifar_shufflenetv2": 1_355_528,
}
# 10 classes, millions as the papers print them: He 2016 table 6, Zagoruyko 2016 table 4, Huang 2017
# table 2.
# ResNet-110 is printed as 1.7.
MILLIONS = {
    "cifar_resnet20": "0.27",
    "cifar_resnet32": "0.46",
    "cifar_resnet44": "0.66",
    "cifar_resnet56": "0.85",
    "cifar_resnet110": "1.7",
    "cifar_wrn28_10": "36.5",
    "cifar_densenet40_12": "1.0",
    "cifar_densenet100_12": "7.0",
}


def count(model):
    return sum(p.numel() for p in model.parameters())


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def settle(model):
    """Eval mode with BatchNorm statistics that are not the defaults."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval()


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name):
    assert count(on_meta(name)) == COUNTS[name]


@pytest.mark.parametrize("name", MILLIONS)
def test_printed_millions(name):
    shortcut = {"shortcut": "A"} if "resnet" in name else {}
    digits = len(MILLIONS[name].partition(".")[2])
    assert f"{count(on_meta(name, num_classes=10, **shortcut)) / 1e6:.{digits}f}" == MILLIONS[name]


def test_shortcut_a_has_no_parameters():
    assert count(on_meta("cifar_resnet20", num_classes=10, shortcut="A")) == 269_722
    model = timm.create_model("cifar_resnet20", shortcut="A")
    x = torch.rand(1, 16, 4, 4)
    y = model.layer2[0].downsample(x)  # (1, 32, 2, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and not y[:, :8].any() and not y[:, 24:].any()
    with pytest.raises(ValueError, match='shortcut=\'C\': expected "A".*or "B"'):
        timm.create_model("cifar_resnet20", shortcut="C")


@pytest.mark.parametrize("name", NAMES)
def test_stages(name):
    model = on_meta(name, num_classes=7).eval()
    stages = [model.get_submodule(info["module"]) for info in model.feature_info]
    x = torch.empty(2, 3, 32, 32, device="meta")
    seen, inputs = [], []
    for stage in stages:
        stage.register_forward_hook(lambda _, args, y: (inputs.append(args), seen.append(y))[0])
    assert model(x).shape == (2, 7)
    versions = [y._version for y in seen]
    for info, y in zip(model.feature_info, seen, strict=True):
        side = 32 // info["reduction"]
        assert y.shape == (2, info["num_chs"], side, side)
    for args, before in zip(inputs[1:], seen, strict=False):
        assert len(args) == 1 and args[0] is before  # nothing stands between two stages
    assert versions == [0] * len(seen)  # nothing writes into a stage's output


@pytest.mark.parametrize("name", SMALL)
def test_forward(name):
    torch.manual_seed(0)
    model = settle(timm.create_model(name, num_classes=5))
    for size in (8, 16, 32, 64):
        x = torch.rand(1, 3, size, size)
        features = model.forward_features(x)
        assert features.shape[:2] == (1, model.num_features)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (1, model.head_hidden_size)
        logits = model(x)
        assert torch.equal(logits, model.forward_head(features))
        assert torch.equal(logits, model.get_classifier()(pooled))
    assert torch.equal(copy.deepcopy(model)(x), logits)
    features = timm.create_model(name, features_only=True)(torch.rand(2, 3, 16, 16))
    assert [f.shape[1] for f in features] == [info["num_chs"] for info in model.feature_info]


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns(name):
    model = timm.create_model(name, num_classes=5, in_chans=1)
    model(torch.rand(4, 1, 16, 16)).square().mean().backward()
    assert not [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]


def test_head():
    model = timm.create_model("cifar_resnet8", num_classes=10, global_pool="max", drop_rate=0.5)
    model.reset_classifier(3)
    assert (
        model.num_classes == 3
        and model.get_classifier().out_features == 3
        and model.global_pool.pool_type == "max"
    )
    model.reset_classifier(0)
    x = torch.rand(1, 3, 32, 32)
    assert model.eval()(x).shape == (1, 64)
    model.reset_classifier(0, "")
    assert model(x).shape == (1, 64, 8, 8)


@pytest.mark.parametrize(
    "name, layer", [("cifar_resnet8", "layer2.0.conv1"), ("cifar_shufflenetv1", "layer1.0.conv2")]
)
def test_he_initialisation(name, layer):
    torch.manual_seed(0)
    conv = timm.create_model(name).get_submodule(layer)
    fan_out = conv.out_channels * 9
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_depth_out_of_reach():
    from kdtoolkit.models.wrn import WideResNet

    with pytest.raises(ValueError, match=r"depth 20: a wide ResNet has 6n \+ 4 layers"):
        WideResNet(depth=20, width=8)


# --- loading and saving ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_round_trip(name, tmp_path):
    kwargs = {"shortcut": "A"} if name == "cifar_resnet8" else {}
    model = settle(load_model(name, num_classes=6, **kwargs)).to(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 32, 32)
    folder = save_model(model, tmp_path / "runs/student")
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [f.name for f in folder.parent.iterdir()] == ["student"]
    other = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(other(x), model.to(memory_format=torch.contiguous_format)(x))
    again = load_model(folder)
    assert torch.equal(again.eval()(x), other(x)) and again.num_classes == 6
    assert again.kd_model_args.get("shortcut") == model.kd_model_args.get("shortcut")


def test_timms_own_save(tmp_path):
    model = settle(timm.create_model("cifar_resnet8", num_classes=10, shortcut="A"))
    timm.models.save_for_hf(model, tmp_path, model_args={"shortcut": "A"})
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x)
    )
    assert torch.equal(load_model(f"local-dir:{tmp_path}").eval()(x), model(x))


def test_save_twice_and_changed_models(tmp_path):
    folder = save_model(
        load_model("cifar_resnet8", num_classes=10, in_chans=1, shortcut="A"), tmp_path / "m"
    )
    (folder / "notes.txt").write_text("stays")
    model = load_model(folder)
    assert model.in_chans == 1
    model.reset_classifier(4)
    save_model(settle(model), folder)
    other = load_model(str(folder))
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(other.eval()(x), model(x)) and other.num_classes == 4
    assert (folder / "notes.txt").read_text() == "stays"


def test_save_timm_models(tmp_path):
    vit = load_model("vit_tiny_patch16_224", num_classes=3, img_size=32, depth=2).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_model(save_model(vit, tmp_path / "vit")).eval()(x), vit(x))


def test_save_tied_and_foreign(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    folder = save_model(model, tmp_path / "tied")
    assert set(load_file(folder / "model.safetensors")) == {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    }
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["architecture"] is None
        and config["class"] == "torch.nn.modules.container.Sequential"
    )
    with pytest.raises(
        ValueError, match="names no timm architecture .*Sequential.*pass the nn.Module"
    ):
        load_model(folder)
    assert not model._state_dict_hooks


def test_build_module_and_defaults():
    module = nn.Linear(2, 2)
    assert load_model(module) is module
    assert load_model("cifar_resnet8").num_classes == 100
    with pytest.raises(ValueError, match="teacher=3: pass an nn.Module, a timm name"):
        load_model(3, role="teacher")


def test_describe():
    model = load_model("cifar_resnet8", num_classes=10, shortcut="A")
    assert normalisation(model) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert input_size(model) == (3, 32, 32) and not fixed_input_size(model)
    assert normalisation(nn.Linear(2, 2)) is None and input_size(nn.Linear(2, 2)) is None
    grey = load_model("cifar_resnet8", in_chans=1, cache_dir="unused")
    assert grey.kd_model_args == {"in_chans": 1, "shortcut": "B"}
    assert len(normalisation(grey)[0]) == 1 and input_size(grey) == (1, 32, 32)
    vit = {"depth": 1, "num_classes": 2}
    assert fixed_input_size(load_model("vit_tiny_patch16_224", **vit))
    assert not fixed_input_size(load_model("vit_tiny_patch16_224", dynamic_img_size=True, **vit))
    assert input_size(load_model("vit_tiny_patch16_224", img_size=64, **vit)) == (3, 64, 64)
    said = describe_model(model, "cifar_resnet8")
    assert json.loads(json.dumps(said)) == said
    assert said["architecture"] == "cifar_resnet8" and said["model_args"] == {"shortcut": "A"}
    assert said["num_classes"] == 10 and said["source"] == "cifar_resnet8"
    assert describe_model(nn.Linear(2, 2))["architecture"] is None


def test_unknown_names():
    with pytest.raises(
        ValueError,
        match=r"student: unknown model 'cifar_resnt20'; did you mean cifar_resnet20, .*list_",
    ):
        load_model("cifar_resnt20", role="student")
    with pytest.raises(
        ValueError, match="resnet18 has no weights tagged 'nope'; its tags: .*a1_in1k"
    ):
        load_model("resnet18.nope")
    with pytest.raises(
        ValueError, match="cifar_resnet20 has no published weights; pass pretrained=False"
    ):
        load_model("cifar_resnet20", pretrained=True)
    with pytest.raises(ValueError, match=r"cifar_vgg8 does not take these options .*shortcut"):
        load_model("cifar_vgg8", shortcut="A")


def test_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("hf-hub:timm/no-such-model", "resnet18.a1_in1k"):
        with pytest.raises(
            OSError, match=f"teacher: the download failed for '{name}'.*local-dir:PATH.*safetensors"
        ):
            load_model(name, role="teacher", cache_dir=tmp_path)


def test_missing_and_broken_folders(tmp_path):
    with pytest.raises(
        ValueError, match="there is no folder .*nowhere; for a model of the Hub write 'hf-hub:"
    ):
        load_model(f"local-dir:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="there is no folder some/where"):
        load_model("some/where")
    with pytest.raises(ValueError, match="has no config.json"):
        load_model(tmp_path)
    folder = save_model(load_model("cifar_resnet8", num_classes=10), tmp_path / "m")
    with pytest.raises(ValueError, match="m holds 10 classes, num_classes=100 was given"):
        load_model(folder, num_classes=100)
    assert load_model(folder, num_classes=100, pretrained=False).num_classes == 100
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="weights of .*m cannot be loaded"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded: no file of weights is in"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        load_model(folder)
    (folder / "config.json").write_text('{"architecture": "cifar_resnot8"}')
    with pytest.raises(
        ValueError, match="unknown model 'cifar_resnot8'; did you mean cifar_resnet8"
    ):
        load_model(folder)


def test_folder_whose_files_disagree(tmp_path):
    folder = save_model(load_model("cifar_resnet8", num_classes=10), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for change in ({"num_classes": 100}, {"model_args": {"num_classes": 100}}):
        edited = {**config, "model_args": {}, **change}
        (folder / "config.json").write_text(json.dumps(edited))
        with pytest.raises(
            ValueError, match="2 of another shape .fc|holds 10 classes, num_classes=100"
        ):
            load_model(folder)


def write(path, model, **metadata):
    save_file(model.state_dict(), path, {k: str(v) for k, v in metadata.items()} or None)
    return path


def test_safetensors_file(tmp_path):
    model = settle(load_model("cifar_resnet8", num_classes=10, shortcut="A"))
    about = {
        "architecture": "cifar_resnet8",
        "shortcut": "A",
        "num_classes": 10,
        "mean": "0.1,0.2,0.3",
        "std": "1,2,4",
    }
    path = write(tmp_path / "a.safetensors", model, **about)
    loaded = load_model(path)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(x), model(x))
    assert normalisation(loaded) == ((0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    assert normalisation(load_model("cifar_resnet8"))[0][0] == 0.5071  # others keep theirs
    assert normalisation(load_model(save_model(loaded, tmp_path / "m"))) == normalisation(loaded)
    assert loaded.kd_model_args == {"shortcut": "A"} and describe_model(loaded, path)[
        "source"
    ] == str(path)
    assert load_model(path, pretrained=False, num_classes=3).num_classes == 3
    with pytest.raises(
        ValueError, match="a.safetensors holds 10 classes, num_classes=100 was given"
    ):
        load_model(str(path), num_classes=100)


def test_broken_safetensors_files(tmp_path):
    model = load_model("cifar_resnet8", num_classes=10)
    with pytest.raises(ValueError, match="there is no file .*b.safetensors"):
        load_model(tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError,
        match=r"no 'architecture' \(it has: dataset\); create the model yourself and pass the",
    ):
        load_model(write(tmp_path / "b.safetensors", model, dataset="cifar10"))
    with pytest.raises(ValueError, match="no 'architecture'"):
        load_model(write(tmp_path / "b.safetensors", model))
    with pytest.raises(ValueError, match="metadata of .* is damaged .*num_classes as an integer"):
        load_model(
            write(tmp_path / "b.safetensors", model, architecture="cifar_resnet8", mean="a,b,c")
        )
    with pytest.raises(
        ValueError,
        match=r"does not fit cifar_resnet8; 2 of another shape: fc.bias \(file \(10,\), model",
    ):
        load_model(write(tmp_path / "b.safetensors", model, architecture="cifar_resnet8"))
    about = {"architecture": "cifar_resnet8", "num_classes": 10}
    with pytest.raises(
        ValueError, match="unexpected: layer2.0.downsample.0.weight, .*, .*, \\.\\.\\."
    ):
        load_model(write(tmp_path / "b.safetensors", model, shortcut="A", **about))
    with pytest.raises(ValueError, match=r"missing: layer1.1.conv1.weight, .*, \.\.\."):
        load_model(
            write(tmp_path / "b.safetensors", model, architecture="cifar_resnet14", num_classes=10)
        )
    path = write(tmp_path / "b.safetensors", model, **about)
    for cut in (-100, 1000, 4, 0):
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match="b.safetensors is no complete safetensors file: .+"):
            load_model(path)


# --- trained weights ------------------------------------------------------------------------------


@needs_weights
@pytest.mark.parametrize("path", WEIGHTS, ids=lambda p: p.stem)
def test_trained_weights_load_strictly(path):
    model = load_model(path)
    assert torch.equal(model.state_dict()["conv1.weight"], load_file(path)["conv1.weight"])


@pytest.mark.slow
@needs_weights
@pytest.mark.parametrize("path", WEIGHTS, ids=lambda p: p.stem)
def test_trained_weights_reach_their_accuracy(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = file.metadata()
    x, y = whole_test_set(meta["dataset"])
    model = load_model(path).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in normalisation(model))
    right = 0
    with torch.inference_mode():
        for images, labels in zip(x.split(250), y.split(250), strict=True):
            logits = model((images.float() / 255 - mean) / std)  # (B, classes)
            right += int((logits.argmax(1) == labels).sum())
    assert f"{100 * right / len(y):.2f}" == meta["top1"]


def whole_test_set(name):
    """The whole test set: (10000, 3, 32, 32) uint8 and (10000,) int64."""
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    files = sorted(SHARED.glob(f"data/{name}/test*.parquet"))
    if not files:
        pytest.skip(f"no {name} test set under KDTOOLKIT_SHARED")
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    images = np.stack(
        [np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows]
    )
    labels = [row["label"] if "label" in row else row["fine_label"] for row in rows]
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(labels)


def test_saved_input_size_is_that_of_the_images(tmp_path):
    model = timm.create_model("cifar_resnet8", num_classes=10)
    before = model.pretrained_cfg
    save_model(model, tmp_path / "student", input_size=(3, 16, 16))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    assert timm.data.resolve_data_config({}, model=loaded)["input_size"] == (3, 16, 16)
    assert model.pretrained_cfg is before


# --- names of the package -------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.__all__)
def test_public_names(name):
    assert getattr(models, name) is not None and name in dir(models)


@pytest.mark.parametrize(("old", "new"), [
    ("build", "load_model"), ("is_name", "is_timm_name"), ("put", "load_weights"),
    ("save", "save_model"), ("spec_of", "describe_model"),
])  # fmt: skip
def test_names_of_0_1(old, new):
    with pytest.warns(DeprecationWarning, match=rf"kdtoolkit\.models\.{old} is now .*{new}"):
        found = getattr(models, old)
    assert found is getattr(models, new) and old not in models.__all__


def test_the_import_registers_networks_and_nothing_else():
    """It may happen inside `import timm`, so it imports only what timm has loaded itself."""
    code = (
        "import sys, kdtoolkit, timm; print(timm.is_model('cifar_resnet8'),"
        " *sorted(m for m in sys.modules if m.startswith('kdtoolkit.')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    registered, *loaded = out.stdout.split()
    families = "cifar densenet googlenet mobilenetv2 resnet shufflenet vgg wrn".split()
    allowed = {"kdtoolkit.models", "kdtoolkit.utils", "kdtoolkit.utils.lazy_import"}
    assert registered == "True"
    assert set(loaded) == allowed | {f"kdtoolkit.models.{family}" for family in families}
