"""Every notebook of examples/ runs as it stands, and is committed without outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
SECONDS = 300  # for one cell; a whole notebook takes less than 60 on a free core
# The client runs in a process of its own, whose sockets and event loop end with it.
EXECUTE = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.execute(notebook, cwd=sys.argv[2], timeout=int(sys.argv[3]), kernel_name="python3")
nbformat.write(notebook, sys.argv[2] + "/executed.ipynb")
"""
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2


@every_notebook
def test_notebook_runs(path, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    environment.pop("MPLBACKEND", None)  # the kernel sets its own
    command = [sys.executable, "-c", EXECUTE, str(path), str(tmp_path), str(SECONDS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cells = code_cells(tmp_path / "executed.ipynb")
    assert cells
    assert all(cell.execution_count for cell in cells)


@every_notebook
def test_notebook_is_committed_without_outputs(path):
    for cell in code_cells(path):
        assert not cell.outputs, cell.source
        assert cell.execution_count is None, cell.source
