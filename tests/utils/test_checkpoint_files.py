"""Checkpoint folders: every change of a file is noticed, and nothing in them is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
import torch

from kdtoolkit.utils import checkpoint
from kdtoolkit.utils.checkpoint import CheckpointError, check_metadata, find_checkpoint
from kdtoolkit.utils.checkpoint_files import (
    OtherVersion,
    check_files,
    copy_checkpoint,
    is_whole,
    read_states,
    write_checkpoint,
)
from kdtoolkit.utils.checkpoint_store import read_method
from kdtoolkit.utils.io import apply_umask, atomic_folder, write_json, write_text, write_yaml
from kdtoolkit.utils.state_file import DamagedFile

STATES = {
    "model": {"weight": torch.randn(40, 7), "tied": torch.arange(5)},
    "optimizer": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}],
    "loop": {"loop": {"step": 3, "callbacks": {"mine": {"best": 1.5}}}},
    "random": [{"python": (3, (1, 2), None)}],
}
FILES = ("model.safetensors", "optimizer.safetensors", "loop.safetensors", "random.safetensors",
         "checkpoint.json")  # fmt: skip
# names that earlier versions of the package, accelerate, torch and timm use
PICKLED = (
    *FILES, "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "random_states_0.pkl",
    "optimizer.bin", "scheduler.bin", "sampler.bin", "scaler.pt", "dl_state_dict.bin",
    "pytorch_model.bin", "model.bin", "model.pth", "pytorch_model.bin.index.json",
    "model.safetensors.index.json", "__init__.py",
)  # fmt: skip


@pytest.fixture
def last(tmp_path) -> Path:
    folder = tmp_path / "checkpoints/last"
    write_checkpoint(folder, STATES, {"step": 3, "epoch": 1, "seed": 0})
    return folder


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def malicious(kind: str, marker: Path) -> bytes:
    harmful = {"step": 3, "model": Marker(marker), "state_dict": Marker(marker)}
    if kind == "pickle":
        return pickle.dumps(harmful)
    if kind == "torch zip":
        buffer = io.BytesIO()
        torch.save(harmful, buffer)
        return buffer.getvalue()
    if kind == "torch legacy":
        buffer = io.BytesIO()
        torch.save(harmful, buffer, _use_new_zipfile_serialization=False)
        return buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(harmful))
        archive.writestr("__main__.py", f"open({str(marker)!r}, 'w')")
    return buffer.getvalue()


KINDS = ("pickle", "torch zip", "torch legacy", "zip")


@pytest.mark.parametrize("kind", KINDS)
def test_the_malicious_files_of_these_tests_would_run(kind, tmp_path):
    marker = tmp_path / "marker"
    content = malicious(kind, marker)
    if kind == "zip":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            content = archive.read("archive/data.pkl")
    if kind in ("pickle", "zip"):
        pickle.loads(content)
    else:
        torch.load(io.BytesIO(content), weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PICKLED)
def test_malicious_files_never_run(name, kind, last, tmp_path):
    marker = tmp_path / "marker"
    (last / name).write_bytes(malicious(kind, marker))
    if name in FILES:
        with pytest.raises(CheckpointError, match=name):
            find_checkpoint(last.parent)
        with pytest.raises(CheckpointError, match=name):
            check_metadata(last, {"seed": 0})
        with pytest.raises(DamagedFile, match=name):
            read_states(last)
    else:  # a file that no checkpoint has is not looked at, and not copied
        assert find_checkpoint(last.parent) == last and read_method(last)[1]
        copy_checkpoint(last, last.with_name("best"))
        assert sorted(os.listdir(last.with_name("best"))) == sorted(FILES)
    assert not marker.exists()


def with_a_good_checksum(folder: Path, change) -> None:
    """checkpoint.json changed by somebody who can compute checksums."""
    from kdtoolkit.utils.checkpoint_files import _write_metadata

    metadata = json.loads((folder / "checkpoint.json").read_text())
    change(metadata)
    (folder / "checkpoint.json").unlink()
    _write_metadata(folder / "checkpoint.json", metadata)


@pytest.mark.parametrize("kind", KINDS)
def test_malicious_files_with_good_checksums_never_run(kind, last, tmp_path):
    from kdtoolkit.utils.state_file import file_checksum

    marker = tmp_path / "marker"
    file = last / "loop.safetensors"
    file.write_bytes(malicious(kind, marker))
    entry = {"bytes": file.stat().st_size, "sha256": file_checksum(file)}
    with_a_good_checksum(last, lambda m: m["files"].update({"loop.safetensors": entry}))
    assert is_whole(last)  # as it was written
    with pytest.raises(CheckpointError, match=r"loop\.safetensors is damaged"):
        read_method(last)
    assert not marker.exists()


CHANGES = {
    "outside": lambda m: m["files"].update({"../x.safetensors": {}}),
    "absolute": lambda m: m["files"].update({"/etc/x.safetensors": {}}),
    "a pickle": lambda m: m["files"].update({"x.pkl": {}}),
    "no dict": lambda m: m["files"].update({"x.safetensors": 3}),
    "a list": lambda m: m.update(files=["model.safetensors"]),
    "none": lambda m: m.pop("files"),
    "later": lambda m: m.update(format=3),
    "no format": lambda m: m.pop("format"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_made_up_checkpoint_json(name, last):
    with_a_good_checksum(last, CHANGES[name])
    with pytest.raises(CheckpointError, match=r"lists other files|this version of kdtoolkit reads"):
        check_metadata(last, {})


def test_single_flipped_bits_are_noticed(last):
    draw, flipped = random.Random(0), 0
    for name in FILES:
        content = (last / name).read_bytes()
        size = len(content)
        edges = {0, 7, 8, 9, size // 2, size - 2, size - 1}
        places = edges | {draw.randrange(size) for _ in range(8)}
        for place in places:
            broken = bytearray(content)
            broken[place] ^= 1 << draw.randrange(8)
            (last / name).write_bytes(broken)
            with pytest.raises(DamagedFile, match=name):
                read_states(last)
            flipped += 1
        (last / name).write_bytes(content)
    assert flipped > 60 and is_whole(last)


def test_bits_all_over_checkpoint_json_count(last):
    file = last / "checkpoint.json"
    content = file.read_bytes()
    for bit in range(0, 8 * len(content), 11):  # every bit of a byte, in turn
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(broken)
        with pytest.raises(DamagedFile, match=r"checkpoint\.json"):
            check_files(last, ())


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "text": lambda file: file.write_text("hello"),
    "JSON": lambda file: file.write_text("[1, 2]"),
    "deep JSON": lambda file: file.write_text("[" * 100_000),
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a dangling link": lambda file: (file.unlink(), file.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_whole_checkpoint_offered(name, damage, last):
    DAMAGES[damage](last / name)
    with pytest.raises(CheckpointError, match=name) as error:
        check_metadata(last, {})
    assert "overwrite=True and without resume" in str(error.value)
    best = last.with_name("best")
    write_checkpoint(best, STATES, {"step": 2, "epoch": 1})
    with pytest.raises(CheckpointError) as error:
        check_metadata(last, {})
    offer = f"{best} is whole (epoch 1, step 2): continue from it with resume={str(best)!r}"
    assert offer in str(error.value)


def test_a_checkpoint_of_an_earlier_version_is_refused(last):
    for file in last.iterdir():
        file.unlink()
    torch.save({"a": 1}, last / "custom_checkpoint_0.pkl")
    write_json(last / "checkpoint.json", {"step": 3, "epoch": 1})
    write_checkpoint(last.with_name("best"), STATES, {"step": 2, "epoch": 1})
    with pytest.raises(OtherVersion):
        check_files(last)
    with pytest.raises(CheckpointError, match="written by an earlier version of kdtoolkit"):
        find_checkpoint(last.parent)  # no silent step back to another checkpoint


def write(folder: Path, step: int) -> None:
    write_checkpoint(folder, STATES, {"step": step, "epoch": step})


def test_which_checkpoint_a_run_continues_from(tmp_path, caplog):
    root = tmp_path / "checkpoints"
    last, best = root / "last", root / "best"
    assert find_checkpoint(root) is None
    (root / ".last.tmp").mkdir(parents=True)  # killed in the first write
    (root / ".last.tmp/model.safetensors").write_bytes(b"half")
    assert find_checkpoint(root) is None
    write(best, 1)
    assert find_checkpoint(root) == best and "last is missing: the run continues" in caplog.text
    write(last, 2)
    assert find_checkpoint(root) == last
    last.rename(root / ".last.old")  # killed between two renames
    assert find_checkpoint(root) == last and checkpoint.read_metadata(last)["step"] == 2
    caplog.clear()
    (last / "optimizer.safetensors").write_bytes(b"")
    assert find_checkpoint(root) == best
    assert "optimizer.safetensors is damaged" in caplog.text and "epoch 1, step 1" in caplog.text
    with pytest.raises(CheckpointError, match=r"continue from it with resume='.*best'"):
        find_checkpoint(root, or_best=False)
    (best / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"last.optimizer\.safetensors is damaged"):
        find_checkpoint(root)
    write(root / ".last.old", 1)
    with pytest.raises(CheckpointError, match=r"resume='.*\.last\.old'"):
        find_checkpoint(root)


def test_only_whole_checkpoints_of_a_run_are_copied(last):
    (last / "notes.txt").write_text("mine")
    copy_checkpoint(last, last.with_name("best"))
    assert is_whole(last.with_name("best")) and not (last.with_name("best") / "notes.txt").exists()
    (last / "checkpoint.json").unlink()
    with pytest.raises(DamagedFile):
        copy_checkpoint(last, last.with_name("best"))
    assert is_whole(last.with_name("best"))


@pytest.mark.parametrize("limit", [100, 900, 1200])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(limit, last):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(last, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert is_whole(last) and checkpoint.read_metadata(last)["step"] == 3
    assert os.listdir(last.parent) == ["last"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_leaves_the_previous_checkpoint_whole(last):
    last.parent.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            write(last, 4)
    finally:
        last.parent.chmod(0o755)
    assert is_whole(last) and checkpoint.read_metadata(last)["step"] == 3


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_previous_checkpoint_whole(fails, last, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match="Read-only"):
        write(last, 4)
    monkeypatch.undo()
    assert is_whole(last) and checkpoint.read_metadata(last)["step"] == 3


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_file_modes_follow_the_umask(umask, tmp_path):
    from torch import nn

    from kdtoolkit.models.saving import save_model

    before = os.umask(umask)
    try:
        write_checkpoint(tmp_path / "a/last", STATES, {"step": 1})
        copy_checkpoint(tmp_path / "a/last", tmp_path / "a/best")
        save_model(nn.Linear(2, 2), tmp_path / "student")
        save_model(nn.Linear(2, 2), tmp_path / "student")  # in place of the first
        write_text(tmp_path / "b/text", "x")
        write_yaml(tmp_path / "b/yaml", {})
        with atomic_folder(tmp_path / "c") as folder:
            (folder / "file").touch(0o600)
            apply_umask(folder)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 15
    for path in tmp_path.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_a_foreign_folder_is_no_checkpoint(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"mine holds no checkpoint \(checkpoint\.json is"):
        check_metadata(folder, {})
    shutil.rmtree(folder)
