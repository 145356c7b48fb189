"""Files of weights: what is read from them, what they may not do, and which networks they fit."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import os
import pathlib
import pickle
import shutil
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from kdtoolkit.models.loading import is_timm_name, load_model
from kdtoolkit.models.saving import save_model
from kdtoolkit.models.weights import load_weights
from kdtoolkit.pipeline.config_file import read_config


def net(name: str = "cifar_resnet8", classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes)


STATE = net().state_dict()
BODY = {key: value for key, value in STATE.items() if not key.startswith("fc")}


def load_teacher(source, name: str = "cifar_resnet8", classes: int = 10, **options):
    """A new network with the weights, and the line that says what matched."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=classes)
    return model, load_weights(model, source, role="teacher", keep_head=True, **options)


def has_weights(model: nn.Module) -> bool:
    return all(torch.equal(value, STATE[key]) for key, value in model.state_dict().items())


# --------------------------------------------------------------------------- a stranger's code
class Marker:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, path: Path, function=os.mkdir):
        self.path, self.function = path, function

    def __reduce__(self):
        return self.function, (str(self.path),)


def torch_zip(path: Path, marker: Path) -> None:
    torch.save({"state_dict": STATE, "extra": Marker(marker)}, path)


def torch_legacy(path: Path, marker: Path) -> None:
    saved = {"state_dict": STATE, "extra": Marker(marker)}
    torch.save(saved, path, _use_new_zipfile_serialization=False)


def alone(path: Path, marker: Path) -> None:
    torch.save(Marker(marker), path)


def in_a_name(path: Path, marker: Path) -> None:
    torch.save({Marker(marker, os.makedirs): 1, "weight": torch.ones(2)}, path)


def plain_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Marker(marker)}))


def protocol_4(path: Path, marker: Path) -> None:
    torch.save({"extra": Marker(marker)}, path, pickle_protocol=4)


def evaluated(path: Path, marker: Path) -> None:
    class Evaluated:
        def __reduce__(self):
            return eval, (f"__import__('os').mkdir({str(marker)!r})",)

    torch.save({"state_dict": STATE, "extra": Evaluated()}, path)


def tar(path: Path, marker: Path) -> None:
    """The format of PyTorch before 0.1.10."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(Marker(marker))
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def zip_by_hand(path: Path, marker: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Marker(marker), protocol=2))
        archive.writestr("archive/version", "3\n")


FORMATS = [
    torch_zip, torch_legacy, alone, in_a_name, plain_pickle, protocol_4, evaluated, tar,
    zip_by_hand,
]  # fmt: skip
FILES = ["m.pth", "m.pt", "m.bin", "m.ckpt", "m.pth.tar", "m.PTH", "m.weights"]
FOLDERS = [
    "pytorch_model.bin", "model.bin", "model.pth", "last.ckpt", "m.pth.tar", "checkpoint.pt",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_a_file_runs_no_code(write, name, tmp_path):
    write(tmp_path / name, tmp_path / "ran")
    for role in ("teacher", "student"):
        with pytest.raises(ValueError, match=f"{role}_weights: .*{name}"):
            load_weights(net(), tmp_path / name, role=role)
    with pytest.raises(ValueError, match=r"teacher: "):
        load_model(str(tmp_path / name), role="teacher")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_a_folder_runs_no_code(write, name, tmp_path):
    run = tmp_path / "run"
    folder = save_model(net(), run / "student")
    (folder / "model.safetensors").unlink()
    (run / "config.yaml").write_text("loop: {seed: 1}\n")
    write(folder / name, tmp_path / "ran")
    for source in (folder, run):
        with pytest.raises(ValueError, match="teacher: the weights of .* cannot be loaded"):
            load_model(source, role="teacher")
        with pytest.raises(ValueError, match="teacher_weights: "):
            load_weights(net(), source, role="teacher")
    assert not (tmp_path / "ran").exists()


TAGS = ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("file", ["config.json", "config.yaml"])
def test_a_configuration_runs_no_code(tag, file, tmp_path):
    folder = save_model(net(), tmp_path / "net")
    marker = tmp_path / "ran"
    (folder / file).write_text(f"architecture: {tag} ['{marker}']\n")
    if file == "config.json":
        with pytest.raises(ValueError, match=r"config.json cannot be read"):
            load_model(folder)
    else:
        assert has_weights(load_model(folder))
        with pytest.raises(ValueError, match=r"config.yaml"):
            read_config(folder)
    assert not marker.exists()


def test_all_types_that_a_file_needs_are_named(tmp_path):
    saved = {"state_dict": STATE, "a": Marker(tmp_path), "b": Unknown()}
    torch.save(saved, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="needs") as caught:
        load_teacher(tmp_path / "m.pth")
    for wanted in ("posix.mkdir", "test_weights_files.Unknown"):
        assert wanted in str(caught.value)
    assert str(caught.value).endswith("torch.save(net.state_dict(), 'weights.pth')")


class Unknown:
    """A class with a very long text, which an error message must not repeat or be cut by."""

    text = "x" * 3000


@pytest.mark.parametrize("new_format", [True, False])
def test_a_class_of_the_script_is_refused_by_name(new_format, tmp_path):
    saved = {"state_dict": STATE, "config": Unknown(), "model": net()}
    torch.save(saved, tmp_path / "m.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"test_weights_files\.Unknown"):
        load_teacher(tmp_path / "m.pth")


# ------------------------------------------------------------------------------- plain values
PLAIN = {
    "namespace": argparse.Namespace(lr=0.1, inner=argparse.Namespace(a=[1])),
    "simple namespace": types.SimpleNamespace(lr=0.1),
    "float64": np.float64(0.5),
    "float32": np.float32(0.5),
    "int64": np.int64(3),
    "bool": np.bool_(True),
    "text": np.str_("name"),
    "array": np.arange(6.0).reshape(2, 3),
    "array of integers": np.arange(3),
    "dtype": np.dtype("float32"),
    "path": pathlib.Path("runs/x"),
    "windows path": pathlib.PureWindowsPath("C:/runs"),
    "ordered": collections.OrderedDict(a=1),
    "defaultdict": collections.defaultdict(list, {"a": [1.0]}),
    "counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2], maxlen=3),
    "set": {1, 2},
    "date": datetime.datetime(2026, 1, 2),
    "span": datetime.timedelta(seconds=3),
    "slice": slice(0, 3),
    "size": torch.Size([2]),
    "device": torch.device("cpu"),
    "type": torch.float16,
}


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_values_beside_the_weights_are_read(kind, new_format, tmp_path):
    saved = {"state_dict": STATE, "args": PLAIN[kind], "epoch": 3, "best": [PLAIN[kind]]}
    torch.save(saved, tmp_path / "m.pth", _use_new_zipfile_serialization=new_format)
    assert has_weights(load_teacher(tmp_path / "m.pth")[0])


def test_a_training_checkpoint_of_timm(tmp_path):
    saver = timm.utils.CheckpointSaver(
        net(), torch.optim.SGD(net().parameters(), lr=0.1), checkpoint_dir=str(tmp_path),
        args=argparse.Namespace(model="cifar_resnet8", lr=np.float64(0.1)),
    )  # fmt: skip
    saver.save_checkpoint(epoch=1, metric=np.float64(50.0))
    (path,) = tmp_path.glob("checkpoint*.pth.tar")
    assert has_weights(load_teacher(path)[0])
    words = r"holds weights .*says arch='cifar_resnet8': pass teacher='cifar_resnet8' and .*weights"
    with pytest.raises(ValueError, match=words):
        load_model(path, role="teacher")


# ------------------------------------------------------------------------------ where they stand
KEYS = [
    "state_dict", "state_dict_ema", "model", "model_ema", "net", "network", "model_state_dict",
    "student", "teacher", "module", "weights", "ema",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_the_weights_are_found_under(key):
    model, line = load_teacher({key: STATE, "optimizer": {"state": {}}, "epoch": 3})
    assert has_weights(model) and "is taken" not in line
    assert has_weights(load_teacher({"checkpoint": 1, key: {"state_dict": STATE}})[0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("state_dict_ema", "state_dict"), ("model_ema", "model"), ("state_dict", "model"),
        ("model_state_dict", "net"), ("model_ema", "state_dict"),
    ],
)  # fmt: skip
def test_of_two_the_preferred_one_is_taken_and_named(first, second):
    other = {key: torch.zeros_like(value) for key, value in STATE.items()}
    for order in ({first: STATE, second: other}, {second: other, first: STATE}):
        model, line = load_teacher(order)
        assert has_weights(model) and f"'{first}' is taken, not '{second}'" in line


PREFIXES = [
    "", "module.", "_orig_mod.", "model.", "student.", "backbone.", "encoder.", "net.",
    "module.model.", "_orig_mod.module.", "module._orig_mod.", "model.backbone.",
    "module.encoder.", "a.b.c.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_removed(prefix):
    model, line = load_teacher({f"{prefix}{key}": value for key, value in STATE.items()})
    assert has_weights(model) and "missing: none; unexpected: none" in line
    beside = {f"{prefix}{key}": value for key, value in STATE.items()} | {"epoch": torch.ones(())}
    assert has_weights(load_teacher(beside)[0])


HEADS = [
    ("", "linear"), ("module.", "module.linear"), ("", "classifier.1"), ("encoder.", "fc"),
    ("module.encoder.", "module.fc"), ("backbone.", "head"), ("model.backbone.", "model.head.0"),
    ("", "fc"), ("encoder.", "encoder.linear"), ("features.", "last_linear"),
]  # fmt: skip


@pytest.mark.parametrize(("prefix", "head"), HEADS)
def test_a_lone_linear_layer_is_the_head(prefix, head):
    state = {f"{prefix}{key}": value for key, value in BODY.items()}
    state |= {f"{head}.{kind}": STATE[f"fc.{kind}"] for kind in ("weight", "bias")}
    for classes in (10, 100):  # the network gets the classes of its weights
        model, line = load_teacher(state, classes=classes)
        assert has_weights(model) and model.num_classes == 10
        renamed = head.rpartition(".")[2] != "fc"
        assert ("is taken as the classifier fc" in line) == renamed


def test_two_linear_layers_are_not_guessed_between():
    state = BODY | {f"{name}.weight": torch.zeros(10, 64) for name in ("a", "b")}
    state |= {f"{name}.bias": torch.zeros(10) for name in ("a", "b")}
    model, line = load_teacher(state)
    assert model.num_classes == 0 and "is taken as" not in line


@pytest.mark.parametrize(
    "head",
    [
        {"linear.weight": torch.zeros(10, 32), "linear.bias": torch.zeros(10)},
        {"linear.weight": torch.zeros(10, 64)},
        {"linear.bias": torch.zeros(10)},
    ],
    ids=["other columns", "no bias", "no weight"],
)
def test_a_layer_of_another_size_is_no_head(head):
    assert load_teacher(BODY | head)[0].num_classes == 0


# ------------------------------------------------------------------ the whole network, or an error
def changed(**tensors) -> dict:
    return {**STATE, **tensors}


def without(*starts: str) -> dict:
    return {key: value for key, value in STATE.items() if not key.startswith(starts)}


OTHERS = {
    "fewer layers": ("cifar_resnet32", net("cifar_resnet20").state_dict(), [
        "128 of 188 tensors fit", "60 missing (layer1.3.conv1.weight", "and 56 more",
        "They fit cifar_resnet20: pass teacher='cifar_resnet20'",
    ]),
    "more layers": ("cifar_resnet20", net("cifar_resnet32").state_dict(), [
        "60 left over", "They fit cifar_resnet32",
    ]),
    "other width": ("cifar_wrn16_2", net("cifar_wrn16_1").state_dict(), [
        "of another shape", "They fit cifar_wrn16_1",
    ]),
    "another family": ("cifar_resnet8", net("cifar_vgg8").state_dict(), [
        "tensors fit", "missing", "with teacher_args",
    ]),
    "statistics of BatchNorm": ("cifar_resnet8", without("bn1.running"), [
        "2 missing (bn1.running_mean, bn1.running_var)", "needs all of its weights",
    ]),
    "one tensor": ("cifar_resnet8", without("layer2.0.conv1.weight"), [
        "1 missing (layer2.0.conv1.weight)",
    ]),
    "one shape": ("cifar_resnet8", changed(**{"conv1.weight": torch.zeros(16, 1, 3, 3)}), [
        "1 of another shape (conv1.weight (16, 1, 3, 3) for (16, 3, 3, 3))",
    ]),
    "half a head": ("cifar_resnet8", without("fc.bias"), ["1 missing (fc.bias)"]),
}  # fmt: skip


@pytest.mark.parametrize("load", [True, False], ids=["load", "compare"])
@pytest.mark.parametrize("case", OTHERS)
def test_a_teacher_needs_all_of_its_weights(case, load, tmp_path):
    name, state, words = OTHERS[case]
    torch.save({"state_dict": state}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="not the whole network") as caught:
        load_teacher(tmp_path / "m.pth", name, load=load)
    assert not [word for word in [name, *words] if word not in str(caught.value)], caught.value


def test_a_student_takes_a_part_that_is_given_for_it():
    student = net("cifar_resnet32")
    line = load_weights(student, net("cifar_resnet20").state_dict(), role="student")
    assert "128 of 188 tensors matched; missing: layer1.3.conv1.weight" in line
    assert torch.equal(student.layer1[0].conv1.weight, net("cifar_resnet20").layer1[0].conv1.weight)


def test_counters_and_parts_for_training_alone_may_differ():
    fewer = {key: value for key, value in STATE.items() if "num_batches" not in key}
    assert has_weights(load_teacher(fewer | {"bn1.num_batches_tracked": torch.tensor(0)})[0])
    more = changed(**{"aux.weight": torch.ones(3), "layer1.total_ops": torch.ones(1)})
    more |= {"losses.kd.weight": torch.ones(2, 2), "n_averaged": torch.tensor(3)}
    assert has_weights(load_teacher(more)[0])


def test_index_tables_that_are_recomputed_may_be_missing_or_left_over():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=3, img_size=32, window_size=4, embed_dim=24,
        depths=(1, 1), num_heads=(1, 2),
    )  # fmt: skip
    state = {key: v for key, v in swin.state_dict().items() if "relative_position_index" not in key}
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    state["layers.0.blocks.0.attn_mask"] = torch.zeros(4, 16, 16)
    assert "missing: none" in load_weights(swin, state, role="teacher", keep_head=True)


class Own(nn.Module):
    """A user's network, which has no reset_classifier."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.body, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8, classes)

    def forward(self, x):
        return self.out(self.body(x).mean((2, 3)))


def test_a_head_that_is_trained_next_may_be_missing():
    state = {key: value for key, value in Own().state_dict().items() if key.startswith("body")}
    for given in (state, Own(7).state_dict()):
        with pytest.raises(ValueError, match="holds . classes, Own has 10"):
            load_weights(Own(), given, role="teacher", keep_head=True)
        model = Own()
        load_weights(model, given, role="teacher", keep_head=True, head_is_trained=True)
        assert torch.equal(model.body.weight, given["body.weight"])
    given = {"body.weight": state["body.weight"]}
    with pytest.raises(ValueError, match=r"1 missing \(body.bias\)"):
        load_weights(Own(), given, role="teacher", keep_head=True, head_is_trained=True)


# ------------------------------------------------------------------------------ folders and names
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "last.ckpt", "m.pth.tar"])
def test_a_folder_with_a_pickled_file_of_plain_values(name, tmp_path):
    folder = save_model(net(), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    wrapped = {f"module.{key}": value for key, value in STATE.items()}
    torch.save({"state_dict": wrapped, "args": argparse.Namespace(a=np.int64(1))}, folder / name)
    model = load_model(folder)
    assert has_weights(model) and "state_dict" not in model.pretrained_cfg
    assert has_weights(load_model(save_model(model, tmp_path / "again")))
    assert has_weights(load_teacher(folder)[0])


def test_of_several_files_the_safe_one_is_taken_and_named(tmp_path):
    folder = save_model(net(), tmp_path / "m")
    torch.save({"state_dict": Unknown()}, folder / "pytorch_model.bin")
    model, line = load_teacher(folder)
    assert has_weights(model) and "model.safetensors is taken, not pytorch_model.bin" in line


def test_a_folder_whose_weights_are_of_another_depth(tmp_path):
    folder = save_model(net("cifar_resnet20"), tmp_path / "m")
    save_file(net("cifar_resnet32").state_dict(), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"60 left over .* They fit cifar_resnet32"):
        load_model(folder, role="teacher")


def test_a_safetensors_file_of_another_depth(tmp_path):
    about = {"architecture": "cifar_resnet32", "num_classes": "10"}
    save_file(net("cifar_resnet20").state_dict(), tmp_path / "m.safetensors", about)
    with pytest.raises(ValueError, match="not fit cifar_resnet32.*60 missing.*cifar_resnet20"):
        load_model(tmp_path / "m.safetensors", role="teacher")


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".tar", ".PTH"])
@pytest.mark.parametrize("folder", ["", "sub/"])
def test_a_file_of_weights_is_no_architecture(ending, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    path = f"{folder}m{ending}"
    assert not is_timm_name(path)
    with pytest.raises(ValueError, match=f"teacher: there is no file {path}"):
        load_model(path, role="teacher")
    torch.save(STATE, path)
    words = "pass teacher='ARCHITECTURE' and teacher_weights=.*--teacher-weights"
    with pytest.raises(ValueError, match=words):
        load_model(path, role="teacher")
    assert has_weights(load_teacher(path)[0])


def test_the_folder_of_a_run_is_its_student(tmp_path):
    run = tmp_path / "run"
    save_model(net(), run / "student")
    (run / "config.yaml").write_text("loop: {seed: 1}\n")
    for source in (run, str(run), f"local-dir:{run}"):
        assert has_weights(load_model(source, role="teacher"))
        assert has_weights(load_teacher(source)[0])
    shutil.rmtree(run / "student")
    (run / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has not exported its student: finish it with resume="):
        load_model(run, role="teacher")


def test_a_folder_with_weights_and_no_configuration(tmp_path):
    torch.save(STATE, tmp_path / "model.pth")
    words = "has no config.json; .*pass teacher='NAME OF THE ARCHITECTURE' and teacher_weights="
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path, role="teacher")


def test_scripts_and_exported_programs_as_files(tmp_path, recwarn):
    traced = torch.jit.trace(net().eval(), torch.rand(1, 3, 16, 16))
    torch.jit.save(traced, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"TorchScript archive.*torch.jit.load.*logits teach"):
        load_teacher(tmp_path / "m.pt")
    program = torch.export.export(Own(), (torch.rand(2, 3, 8, 8),))
    torch.export.save(program, tmp_path / "m.pt2")
    (tmp_path / "m.pt2").rename(tmp_path / "n.pt")
    with pytest.raises(ValueError, match="exported program of torch.export"):
        load_teacher(tmp_path / "n.pt")


NO_WEIGHTS = {
    "empty": (b"", "is an empty file"),
    "text": (b"hello, these are no weights", "cannot be read"),
    "web page": (b"<!DOCTYPE html><html></html>", "cannot be read"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "cannot be read"),
    "cut": (None, "cannot be read"),
}


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.pth.tar"])
@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_what_is_no_weights_at_all(case, name, tmp_path):
    data, words = NO_WEIGHTS[case]
    if data is None:
        whole = io.BytesIO()
        torch.save(STATE, whole)
        data = whole.getvalue()[:-500]
    (tmp_path / name).write_bytes(data)
    words = "is no complete safetensors file" if name.endswith("tensors") else words
    with pytest.raises(ValueError, match=rf"teacher_weights: .*{name} {words}"):
        load_teacher(tmp_path / name)
    config = {"architecture": "cifar_resnet8", "num_classes": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"the weights of .* cannot be loaded: .*{name}"):
        load_model(tmp_path, role="teacher")
