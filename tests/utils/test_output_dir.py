"""Which folders a run may use, what it may remove, and the lock; nothing is trained here."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kdtoolkit.utils import previous_run
from kdtoolkit.utils.checkpoint_files import write_checkpoint
from kdtoolkit.utils.folder_lock import FolderLock, OutputDirInUse, is_in_use
from kdtoolkit.utils.manifest import Manifest, foreign_files, matches, read_manifest, record_files
from kdtoolkit.utils.output_dir import Claim, OutputDirNotEmpty, claim_output_dir
from kdtoolkit.utils.output_folder import OutputFolder, open_output_folder

USERS = (
    "report.md", "config.yaml", "figures/paper.png", "student/model.py", "networks/net.py",
    "baseline/notes.txt",
)  # fmt: skip
RUN = (
    "config.yaml", "env.json", "plan.json", "metrics.jsonl", "summary.csv", "report.md",
    "figures/accuracy.png", "student/model.safetensors", "student/config.json",
    "networks/peer1/model.safetensors", "networks/peer1/config.json", "trackers/kd/events.1",
)  # fmt: skip


def put(folder: Path, *paths: str, text: str = "mine") -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    folder.mkdir(exist_ok=True)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file but those in .kdtoolkit/ of the folder itself."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.relative_to(folder).parts[0] != ".kdtoolkit"
    }


def checkpoint(folder: Path, name: str = "last", step: int = 3) -> None:
    write_checkpoint(
        folder / "checkpoints" / name, {"loop": {"step": step}}, {"epoch": 1, "step": step}
    )


def run_in(folder: Path, *, checkpoints=("last", "best"), finished=True, settings=None) -> Path:
    """A run's folder, made by the code that a run uses."""
    with open_output_folder(claim_output_dir(folder, False, False), False, False) as output:
        put(folder, *RUN, text="old")
        for name in checkpoints:
            checkpoint(folder, name)
        output.set_settings(settings or {"seed": 0})
        if finished:
            output.finish()
    return folder


# ---------------------------------------------------------------------------- a folder of the user
@pytest.mark.parametrize("resume", [False, "auto", True])
@pytest.mark.parametrize("paths", [USERS, USERS[2:3], ("baseline/notes.txt",), ("a/b/c/data.csv",)])
def test_a_folder_of_the_users_own_is_refused(resume, paths, tmp_path):
    folder = put(tmp_path / "mine", *paths)
    before = content(folder)
    with pytest.raises(ValueError, match="holds other files|holds no run"):
        claim_output_dir(folder, resume, False)
    assert content(folder) == before and not (folder / ".kdtoolkit").exists()


@pytest.mark.parametrize(
    "path",
    [
        "report.md", "config.yaml", "metrics.jsonl", "student/model.safetensors",
        "student/config.json", "networks/peer1/config.json", "figures/accuracy.png",
        "checkpoints/last/weights.pt", "checkpoints/best/a/b", "student", "checkpoints",
        "report.md/page.txt",
    ],
)  # fmt: skip
@pytest.mark.parametrize("resume", [False, "auto"])
def test_overwrite_names_a_users_file_that_it_would_write_over(path, resume, tmp_path):
    folder = put(tmp_path / "mine", path)
    with pytest.raises(OutputDirNotEmpty, match="no run wrote") as caught:
        claim_output_dir(folder, resume, True)
    assert path in str(caught.value) and "move them away" in str(caught.value)
    assert content(folder) == {path: b"mine"}


def test_overwrite_leaves_the_users_files_beside_a_new_run(tmp_path):
    folder = put(tmp_path / "mine", *USERS[2:], "checkpoints/epoch_1.pt", "trackers/old.log")
    before = content(folder)
    with open_output_folder(claim_output_dir(folder, False, True), False, True):
        put(folder, *RUN, text="new")
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.files == set(RUN)
    assert before.items() <= content(folder).items()
    with open_output_folder(claim_output_dir(folder, False, True), False, True) as output:
        checkpoint(folder)
        output.checkpoint_written()
        assert {p: text for p, text in content(folder).items() if "last/" not in p} == before


@pytest.mark.parametrize("resume", [False, "auto"])
@pytest.mark.parametrize("paths", [(), (".DS_Store",), ("a/.gitkeep",)])
def test_an_empty_folder_is_free(resume, paths, tmp_path):
    assert claim_output_dir(put(tmp_path / "x", *paths), resume, False).action == "new"
    assert claim_output_dir(tmp_path / "y" / "z", resume, False).action == "new"
    assert not (tmp_path / "y").exists()


# ------------------------------------------------------------------------------- a folder of a run
def test_the_manifest_lists_what_the_run_wrote_and_nothing_else(tmp_path):
    folder = run_in(tmp_path / "run")
    put(folder, "notes.txt", "figures/paper.png", "checkpoints/last/notes.txt", "student/model.py")
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.finished and not manifest.claims
    ours = {p for p in content(folder) if (folder / p).read_bytes() != b"mine"}
    assert manifest.files == ours and set(RUN) < ours
    with pytest.raises(OutputDirNotEmpty, match=r"checkpoints/last \(epoch 1, step 3\).*'auto'"):
        claim_output_dir(folder, False, False)


def replace(folder: Path) -> contextlib.AbstractContextManager[OutputFolder]:
    claim = claim_output_dir(folder, False, True)
    assert claim.action == "replace"
    return open_output_folder(claim, False, True)


def test_overwrite_removes_the_runs_files_only_and_empty_folders(tmp_path):
    folder = run_in(tmp_path / "run")
    put(folder, "notes.txt", "figures/paper.png", "checkpoints/mine.pt", "baseline/x.txt")
    with replace(folder) as output:
        put(folder, "config.yaml", "metrics.jsonl", text="new")
        checkpoint(folder, step=9)
        output.checkpoint_written()
        left = {p for p in content(folder) if "checkpoints/last/" not in p}
        assert left == {"notes.txt", "figures/paper.png", "checkpoints/mine.pt",
                        "baseline/x.txt", "config.yaml", "metrics.jsonl"}  # fmt: skip
        assert not (folder / "student").exists() and not (folder / "networks").exists()
    assert not (folder / ".kdtoolkit" / "previous").exists()


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("wrote", [(), ("config.yaml", "metrics.jsonl", "summary.csv", "env.json")])
def test_an_old_run_is_whole_where_the_new_one_has_no_checkpoint(killed, wrote, tmp_path):
    folder = run_in(tmp_path / "run")
    put(folder, "notes.txt")
    before = content(folder)
    output = OutputFolder(claim_output_dir(folder, False, True))
    output.open(False, True)
    put(folder, *wrote, "trackers/kd/events.2", "checkpoints/.last.tmp/x", text="new")
    assert (folder / "student/model.safetensors").read_text() == "old"  # in its place all the time
    assert not (folder / "checkpoints/last").exists()
    if killed:
        assert output._lock is not None
        output._lock.release()  # as the system does
        assert claim_output_dir(folder, "auto", False).action == "resume"
    else:
        output.close()
    assert content(folder) == before
    assert claim_output_dir(folder, "auto", False).action == "resume"


@pytest.mark.parametrize("moves", range(0, 12, 2))
def test_a_kill_while_files_are_set_aside_loses_nothing(moves, tmp_path, monkeypatch):
    folder = run_in(tmp_path / "run")
    before, move = content(folder), previous_run._move
    count = iter(range(100))

    def stop(source, target):
        if next(count) >= moves:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(previous_run, "_move", stop)
    for again in range(3):  # and then while they are put back
        with contextlib.suppress(KeyboardInterrupt):
            count = iter(range(again, 100))
            if again == 0:
                previous_run.set_aside(read_manifest(folder))
            else:
                previous_run.recover(folder)
    monkeypatch.setattr(previous_run, "_move", move)
    assert claim_output_dir(folder, "auto", False).action == "resume"
    assert content(folder) == before


def test_a_kill_after_the_first_checkpoint_goes_on_with_the_new_run(tmp_path):
    folder = run_in(tmp_path / "run")
    output = OutputFolder(claim_output_dir(folder, False, True))
    output.open(False, True)
    put(folder, "config.yaml", text="new")
    checkpoint(folder, step=9)
    assert output._lock is not None
    output._lock.release()
    claim = claim_output_dir(folder, "auto", False)
    assert claim == Claim(folder, "resume", folder / "checkpoints/last")
    assert {p for p in content(folder) if "last/" not in p} == {"config.yaml"}


def test_inner_runs_go_with_the_run_that_made_them_and_others_stay(tmp_path):
    folder = tmp_path / "run"
    run_in(folder / "teacher")  # the user's own, which is there first
    run_in(folder)
    with open_output_folder(
        Claim(folder, "resume", folder / "checkpoints/last"), "auto", False
    ) as o:
        for name in ("baseline", "finetuned/a", "finetuned/b"):
            run_in(folder / name)
            o.add_run(folder / name)
    put(folder, "finetuned/a/notes.txt")
    with replace(folder) as output:
        output.add_run(folder / "finetuned/b")  # used again
        checkpoint(folder)
        output.checkpoint_written()
    assert not (folder / "baseline").exists()
    assert content(folder / "finetuned/a") == {"notes.txt": b"mine"}
    for name in ("teacher", "finetuned/b"):
        assert (folder / name / "student/model.safetensors").exists()


@pytest.mark.parametrize("resume", ["auto", True])
def test_a_finished_run_without_checkpoints_is_finished(resume, tmp_path):
    folder = run_in(tmp_path / "run", checkpoints=())
    assert claim_output_dir(folder, resume, False) == Claim(folder, "finished")


def test_an_unfinished_run_without_a_checkpoint_begins_again(tmp_path):
    folder = run_in(tmp_path / "run", checkpoints=(), finished=False)
    with pytest.raises(ValueError, match="before its first checkpoint; resume='auto' starts it"):
        claim_output_dir(folder, True, False)
    with open_output_folder(claim_output_dir(folder, "auto", False), "auto", False) as output:
        assert output.claim.action == "restart" and not (folder / "metrics.jsonl").exists()


def test_a_finished_run_stays_finished_while_it_is_evaluated_again(tmp_path):
    folder = run_in(tmp_path / "run")
    output = OutputFolder(claim_output_dir(folder, "auto", False))
    output.open("auto", False)
    found = read_manifest(folder)
    assert found is not None and found.finished and found.claims
    output.close()


def test_a_report_that_the_user_put_in_is_not_written_over(tmp_path):
    folder = run_in(tmp_path / "run", finished=False)
    (folder / "report.md").unlink()
    with open_output_folder(claim_output_dir(folder, "auto", False), "auto", False):
        pass
    put(folder, "report.md")
    for resume, overwrite in (("auto", False), (True, False), (False, True)):
        with pytest.raises(OutputDirNotEmpty, match=r"no run wrote.*report\.md"):
            claim_output_dir(folder, resume, overwrite)
    record_files(folder, ["report.md", "figures/gone.png"])  # what report.write() does
    assert claim_output_dir(folder, "auto", False).action == "resume"


# ------------------------------------------------------------------------ earlier versions, damage
def earlier(folder: Path, config: dict, rows: str = '{"event": "train", "step": 1}\n') -> Path:
    put(folder, *RUN[2:-1], "figures/paper.png", "notes.txt", text="old")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text(rows)
    return folder


PARTS = {name: {} for name in ("networks", "data", "loss", "optim", "loop", "output")}


@pytest.mark.parametrize("config", [PARTS, {"student": "x", "method": "kd", "train_data": "y"}])
def test_a_run_of_an_earlier_version_is_known_by_its_config_and_rows(config, tmp_path):
    folder = earlier(tmp_path / "run", config)
    with pytest.raises(OutputDirNotEmpty, match="finished run of an earlier version"):
        claim_output_dir(folder, "auto", False)
    with replace(folder) as output:
        checkpoint(folder)
        output.checkpoint_written()
    left = {p for p in content(folder) if "last/" not in p}
    assert left == {"figures/paper.png", "notes.txt"}


@pytest.mark.parametrize(
    ("config", "rows"), [({"lr": 0.1}, '{"event": "train"}'), (PARTS, "1, 2"), (PARTS, '{"a": 1}')]
)
def test_a_folder_that_only_looks_like_a_run_is_the_users(config, rows, tmp_path):
    folder = earlier(tmp_path / "run", config, rows)
    before = content(folder)
    for resume, overwrite in ((False, False), ("auto", False), (False, True), ("auto", True)):
        with pytest.raises(OutputDirNotEmpty):
            claim_output_dir(folder, resume, overwrite)
    assert content(folder) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "\x00"])
def test_a_damaged_manifest_is_an_error(text, tmp_path):
    folder = run_in(tmp_path / "run")
    (folder / ".kdtoolkit/manifest.json").write_text(text)
    before = content(folder)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        claim_output_dir(folder, False, True)
    assert content(folder) == before


@pytest.mark.parametrize("path", ["../mine.txt", "/etc/hostname", "a/../../mine.txt", "link/x.txt"])
def test_a_manifest_never_reaches_out_of_its_folder(path, tmp_path):
    put(tmp_path, "mine.txt", "elsewhere/x.txt")
    folder = run_in(tmp_path / "run")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    file = folder / ".kdtoolkit/manifest.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"files": [*data["files"], path]}))
    with replace(folder) as output:
        checkpoint(folder)
        output.checkpoint_written()
    assert (tmp_path / "mine.txt").exists() and (tmp_path / "elsewhere/x.txt").exists()
    assert (folder / "link").is_symlink()


def test_names_and_patterns():
    assert matches("networks/a/config.json", ["networks/*/config.json"])
    assert not matches("networks/a/b/config.json", ["networks/*/config.json"])
    assert matches("checkpoints/last/a/b", ["checkpoints/last/**"])
    assert not matches("checkpoints/last", ["checkpoints/last/**"])
    assert not matches("x/report.md", ["report.md"])


def test_foreign_files_are_found_beside_inner_runs(tmp_path):
    folder = run_in(tmp_path / "run")
    run_in(folder / "baseline")
    put(folder, "baseline/notes.txt", "x.txt")
    assert set(foreign_files(folder, read_manifest(folder))) == {"baseline/notes.txt", "x.txt"}


# ------------------------------------------------------------------------------- folders that fail
def test_a_folder_that_cannot_be_made(tmp_path):
    put(tmp_path, "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path, word in (
        ("file", "is a file; give a folder"),
        ("file/run", "cannot be made: .*file is a file"),
        ("x" * 300, "cannot be used: File name too long"),
        ("dangling", "a link to what does not exist"),
        ("dangling/run", "a link to what does not exist"),
    ):
        with pytest.raises(ValueError, match=word):
            claim_output_dir(tmp_path / path, "auto", False)


def test_a_folder_for_reading_only(tmp_path, monkeypatch):
    folder = put(tmp_path / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for path, word in ((folder, "cannot be written to"), (folder / "x", f"be made in {folder}")):
        with pytest.raises(ValueError, match=f"{word}: no permission, or a file system for read"):
            claim_output_dir(path, False, False)


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_tree_that_cannot_be_read(resume, tmp_path, monkeypatch):
    folder = run_in(tmp_path / "run", checkpoints=())

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot be used: Permission denied .*run.*permissions"):
        claim_output_dir(folder, resume, False)


@pytest.mark.parametrize("name", ["holder.json", "manifest.json"])
def test_a_full_disk_at_the_first_file_changes_nothing(name, tmp_path, monkeypatch):
    folder = run_in(tmp_path / "run")
    before, write = content(folder), Path.write_text

    def full(path, *args, **options):
        if name in path.name and "previous" not in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *args, **options)

    output = OutputFolder(claim_output_dir(folder, False, True))
    fresh = OutputFolder(claim_output_dir(tmp_path / "fresh", False, False))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        for one, overwrite in ((output, True), (fresh, False)):
            with pytest.raises(
                OSError, match=r"cannot be written to \(No space left.*before training"
            ):
                one.open(False, overwrite)
    assert content(folder) == before and not is_in_use(folder)
    assert claim_output_dir(folder, "auto", False).action == "resume"
    assert content(tmp_path / "fresh") == {}


def test_resume_from_a_folder_of_a_run_means_its_last_checkpoint(tmp_path):
    run_in(tmp_path / "a")
    last = tmp_path / "a/checkpoints/last"
    for given in (tmp_path / "a", last, str(last)):
        assert claim_output_dir(tmp_path / "b", given, False) == Claim(tmp_path / "b", "new", last)
    assert claim_output_dir(tmp_path / "a", last, False) == Claim(tmp_path / "a", "resume", last)
    put(tmp_path / "c", "notes.txt")
    with pytest.raises(OutputDirNotEmpty, match="other files"):
        claim_output_dir(tmp_path / "c", last, False)


# ---------------------------------------------------------------------------------------- the lock
HOLD = """
import os, sys, time
from pathlib import Path
from kdtoolkit.utils.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
if os.fork() == 0:  # as a worker that reads data
    time.sleep(5)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    folder = run_in(tmp_path / "run")
    before = content(folder)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        for resume, overwrite in (("auto", False), (True, False), (False, True)):
            with pytest.raises(OutputDirInUse, match=f"process {holder.pid} on .*, since 20"):
                claim_output_dir(folder, resume, overwrite)
        assert content(folder) == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    deadline = 100
    while is_in_use(folder) and deadline:  # an older filelock: until its child has ended
        deadline -= 1
        signal.sigtimedwait([], 0.1)
    assert claim_output_dir(folder, "auto", False).action == "resume"


def test_a_folder_taken_between_the_check_and_the_start(tmp_path):
    folder = tmp_path / "run"
    first = OutputFolder(claim_output_dir(folder, False, False))
    second = OutputFolder(claim_output_dir(folder, False, False))
    third = OutputFolder(claim_output_dir(folder, False, False))
    first.open(False, False)
    with pytest.raises(OutputDirInUse):
        second.open(False, False)
    put(folder, "config.yaml", text="new")
    first.finish()
    first.close()
    with pytest.raises(OutputDirNotEmpty, match="finished run"):
        third.open(False, False)
    assert read_manifest(folder).files == {"config.yaml"}


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path):
    for folder in (tmp_path / "new", put(tmp_path / "there")):
        existed = folder.exists()
        with open_output_folder(claim_output_dir(folder, "auto", False), "auto", False):
            assert is_in_use(folder)
        assert folder.exists() is existed and not (folder / ".kdtoolkit").exists()


def test_without_a_folder_nothing_is_done():
    with open_output_folder(claim_output_dir(None, False, False), False, False) as output:
        output.checkpoint_written()
        output.finish()
        assert output.settings == {}
    with pytest.raises(ValueError, match="needs output_dir"):
        claim_output_dir(None, "auto", False)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    import filelock

    def refuse(self, **options):
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    lock = FolderLock(put(tmp_path / "run"))
    lock.acquire()
    lock.release()
    assert "cannot be locked: no locks here" in caplog.text


def test_a_manifest_survives_a_round_trip(tmp_path):
    one = Manifest(put(tmp_path / "x"), {"a", "b/c"}, ("d/**",), {"e"}, {"baseline"}, True, False,
                   {"seed": 1, "nested": {"lr": 0.1}})  # fmt: skip
    one.write()
    assert read_manifest(tmp_path / "x") == one
