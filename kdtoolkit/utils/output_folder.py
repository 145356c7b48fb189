"""The output folder of a run while it is written to: lock, manifest, and the run it replaces."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdtoolkit.utils import distributed, previous_run
from kdtoolkit.utils.folder_lock import STATE_FOLDER, FolderLock
from kdtoolkit.utils.manifest import Manifest, read_manifest, remove_files
from kdtoolkit.utils.output_dir import Claim, Resume, choose_action

logger = logging.getLogger(__name__)


class OutputFolder:
    """The folder that a run writes to. Every rank has one; rank 0 does what is done.

    Args:
        claim: What is to be done with the folder.

    Attributes:
        claim: What is done with it.
        folder: The folder; None where nothing is written.
    """

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.folder = claim.folder
        self._manifest: Manifest | None = None
        self._lock: FolderLock | None = None
        self._is_new = False

    def open(self, resume: Resume, overwrite: bool) -> Claim:
        """Take the lock, look again what the folder holds, and begin. Only rank 0 calls it.

        Args:
            resume: As in `claim_output_dir`.
            overwrite: As in `claim_output_dir`.

        Returns:
            What is done with the folder.

        Raises:
            OutputDirInUse: If another run has taken the folder.
            OutputDirNotEmpty: If the folder is no longer free.
            OSError: If it cannot be written to.
        """
        folder = self.folder
        if folder is None:
            return self.claim
        self._is_new = not folder.exists()
        self._lock = FolderLock(folder)
        with explain_write_errors(folder):
            self._lock.acquire()
            try:
                source = self.claim.resume_from
                if source is None or not source.is_dir():
                    self.claim = choose_action(folder, resume, overwrite)
                self._manifest = _begin(self.claim)
            except BaseException:
                with contextlib.suppress(OSError):
                    previous_run.recover(folder)
                self._leave()
                raise
        return self.claim

    def checkpoint_written(self) -> None:
        """The run has its first checkpoint: the run that it replaces goes."""
        if self._manifest is not None and self._manifest.replacing:
            previous_run.remove_previous(self._manifest)

    def add_run(self, folder: Path) -> None:
        """A run in this folder belongs to this one: a baseline or a fine-tuned teacher.

        Args:
            folder: Its folder.
        """
        if self._manifest is not None and self.folder is not None:
            own, root = folder.resolve(), self.folder.resolve()
            if own.is_relative_to(root) and own != root:
                self._manifest.runs.add(own.relative_to(root).as_posix())
                self._manifest.write()

    def set_settings(self, settings: dict[str, Any]) -> None:
        """Note what must match to resume.

        Args:
            settings: Plain values by topic.
        """
        if self._manifest is not None:
            self._manifest.settings = settings
            self._manifest.write()

    @property
    def settings(self) -> dict[str, Any]:
        """What a finished run noted; empty where nothing was."""
        return {} if self._manifest is None else self._manifest.settings

    def finish(self) -> None:
        """The run has written its result."""
        if self._manifest is not None:
            self._manifest.finished = True

    def close(self) -> None:
        """End the writing: list what was written, restore a run that was not replaced, unlock.

        Where that cannot be written, for instance on a full disk, the next run does it.
        """
        if self._manifest is None or self.folder is None:
            return
        try:
            self._settle(self.folder, self._manifest)
        except OSError as error:
            logger.warning("the manifest of %s could not be written: %s", self.folder, error)
        finally:
            self._leave()

    def _settle(self, folder: Path, manifest: Manifest) -> None:
        if manifest.replacing:
            previous_run.recover(folder)
            found = read_manifest(folder)
            assert found is not None
            found.finished |= manifest.finished
            self._manifest = manifest = found
        if manifest.claims:
            manifest.settle()
            manifest.write()

    def _leave(self) -> None:
        """Give the lock back; a folder to which nothing was written is as it was before."""
        assert self.folder is not None
        assert self._lock is not None
        self._lock.release()
        manifest = self._manifest
        if manifest is None:
            nothing = not previous_run.holds_state(self.folder)
        else:
            nothing = self.claim.action == "new" and not (manifest.files or manifest.runs)
        if nothing:
            shutil.rmtree(self.folder / STATE_FOLDER, ignore_errors=True)
            if self._is_new:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()


def _begin(claim: Claim) -> Manifest:
    """Write the manifest of a run that begins or goes on."""
    assert claim.folder is not None
    found = read_manifest(claim.folder)
    if claim.action == "finished":
        assert found is not None
        return found
    if claim.action == "replace":
        assert found is not None
        _check_links(claim.folder)
        return previous_run.set_aside(found)
    manifest = found or Manifest(claim.folder)
    if claim.action == "restart":
        remove_files(claim.folder, ["metrics.jsonl", "summary.csv"])
    manifest.claim_names()
    manifest.write()
    return manifest


def _check_links(folder: Path) -> None:
    if (folder / "checkpoints").is_symlink():
        raise ValueError(
            f"{folder / 'checkpoints'} is a symbolic link, whose files overwrite=True cannot set "
            "aside: remove the link, or give another output_dir"
        )


@contextlib.contextmanager
def explain_write_errors(folder: Path | None) -> Iterator[None]:
    """Context in which an error of writing the first files of a run says what to do.

    Args:
        folder: Folder of the run; None where nothing is written.

    Raises:
        OSError: The error, with the folder and a way out.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"output_dir {folder} cannot be written to ({error.strerror or error}); found before "
            "training. Free some space, or give another output_dir",
        ) from error


@contextlib.contextmanager
def open_output_folder(claim: Claim, resume: Resume, overwrite: bool) -> Iterator[OutputFolder]:
    """Context in which a run writes to its folder; all ranks enter it.

    Args:
        claim: What is to be done with the folder.
        resume: As in `claim_output_dir`.
        overwrite: As in `claim_output_dir`.

    Yields:
        The folder, with what is done with it.
    """
    output = OutputFolder(claim)
    try:
        output.claim = distributed.from_main(lambda: output.open(resume, overwrite))
        yield output
    finally:
        output.close()
