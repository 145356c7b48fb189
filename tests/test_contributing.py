"""The samples of CONTRIBUTING.md, followed word for word in a copy of the package."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r'^```python title="([^"]+)"\n(.*?)^```', GUIDE, re.MULTILINE | re.DOTALL)
NEW_FILES = [path for path, _ in BLOCKS if not path.endswith("__init__.py")]
NEW_MODULES = [path for path in NEW_FILES if path.startswith("kdtoolkit/")]
# those of the suites of methods that ask for the name of a method and end within seconds
SUITES = ["tests/methods/test_contract.py", "tests/methods/test_strategies.py"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package and its tests with the samples written into them."""
    root = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("kdtoolkit", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "README.md").touch()
    for path, text in BLOCKS:
        target = root / path
        if target.name == "__init__.py":
            add_import_line(target, text)
        else:
            assert not target.exists(), f"{path} exists: choose another name for the sample"
            target.parent.mkdir(exist_ok=True)
            target.write_text(text, encoding="utf-8")
    return root


def add_import_line(path, line):
    """Behind the last import of the file."""
    text = path.read_text(encoding="utf-8")
    imports = [n for n in ast.parse(text).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    lines = text.splitlines(keepends=True)
    lines.insert(imports[-1].end_lineno, line)
    path.write_text("".join(lines), encoding="utf-8")


def run(copy, *command):
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *command]
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_there_are_two_samples_of_three_files():
    assert len(NEW_FILES) >= 4
    assert len(BLOCKS) - len(NEW_FILES) >= 2  # import lines


def test_samples_pass_ruff(copy):
    run(copy, "ruff", "check", "--no-cache", *NEW_FILES)
    run(copy, "ruff", "format", "--no-cache", "--check", *NEW_FILES)


def test_samples_pass_mypy(copy):
    found = ROOT / ".mypy_cache"
    if found.is_dir():  # saves a minute; entries that do not fit are made again
        shutil.copytree(found, copy / ".mypy_cache")
    run(copy, "mypy", *NEW_MODULES)  # strict, by pyproject.toml


def test_samples_pass_the_contract(copy):
    tests = [path for path in NEW_FILES if path.startswith("tests/")]
    common = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    run(copy, "pytest", *common, *tests)
    out = run(copy, "pytest", *common, *SUITES, "-k", "(xyz and not xyzzy) or agree")
    passed = int(re.search(r"(\d+) passed", out).group(1))
    assert passed >= 12, out
