"""Layers of the package.

A file imports from layers below its own, or sideways in one stated direction; no circles.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kdtoolkit"
# Each layer lists its packages and modules from the bottom to the top: one may import those in
# front of it.
LAYERS = {
    1: ["types", "utils", "schedules", "functional"],
    2: ["features", "models", "data", "metrics"],
    3: ["core", "losses", "callbacks", "methods"],
    4: ["report", "trainer"],
    5: ["pipeline", "kdtoolkit", "reproduce", "cli"],
}
ORDER = [name for names in LAYERS.values() for name in names]
MOST_ROOT_MODULES = 4  # beside __init__.py
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path, root=PACKAGE):
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def package_of(module):
    """kdtoolkit.data.augment -> data; the package itself -> kdtoolkit."""
    return module.removeprefix("kdtoolkit").removeprefix(".").split(".")[0] or "kdtoolkit"


def imported_modules(path, root=PACKAGE):
    """Modules of kdtoolkit that a file imports when it runs, anywhere in it.

    Those that are imported for type checkers alone are left out.
    """
    module = module_of(path, root)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test).endswith("TYPE_CHECKING")
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "kdtoolkit")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *filter(None, [node.module])])
            if base.split(".")[0] == "kdtoolkit":
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    yield inner if inner in MODULES else base


def fault(importer, imported):
    """Why one module may not import another, or None."""
    upper, lower = package_of(importer), package_of(imported)
    for name in (upper, lower):
        if name not in ORDER:
            return f"{name} belongs to no layer: add it to LAYERS in tests/test_layers.py"
    if ORDER.index(lower) > ORDER.index(upper):
        return f"{importer} ({upper}) imports {imported} ({lower}), which lies above it"
    return None


def test_files_import_only_from_below():
    found = [
        f for path in FILES for m in imported_modules(path) if (f := fault(module_of(path), m))
    ]
    assert not found, "\n".join(found)


def test_no_circle_between_files():
    graph = {
        module_of(path): {
            m for m in imported_modules(path) if m != module_of(path) and m != "kdtoolkit"
        }
        for path in FILES
    }
    # a package's __init__ imports its own files; that they lie in it is no circle
    graph = {m: {i for i in found if not m.startswith(f"{i}.")} for m, found in graph.items()}
    assert sum(map(len, graph.values())) > 100
    finished = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for other in sorted(graph.get(module, ())):
                visit(other, [*path, module])
            finished.add(module)

    for module in graph:
        visit(module, [])
    assert finished == set(graph)


def test_the_package_root_stays_small():
    loose = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert len(loose) <= MOST_ROOT_MODULES, loose
    packages = {package_of(module) for module in MODULES}
    assert packages == set(ORDER), packages ^ set(ORDER)


@pytest.mark.parametrize(
    "importer, imported, word",
    [
        ("kdtoolkit.functional.logits", "kdtoolkit.features.extractor", "lies above"),
        ("kdtoolkit.core.method", "kdtoolkit.callbacks.ema", "lies above"),
        ("kdtoolkit.trainer.trainer", "kdtoolkit", "lies above"),
        ("kdtoolkit.nowhere", "kdtoolkit.types", "no layer"),
    ],
)
def test_what_is_refused(importer, imported, word):
    assert word in fault(importer, imported)


@pytest.mark.parametrize("folder", ["recipes", "benchmarks"])
def test_recipes_and_benchmarks_import_only_the_package(folder):
    files = sorted((ROOT / folder).glob("*.py"))
    assert files
    for path in files:
        beside = {p.stem for p in files} | {"tests", "recipes", "benchmarks"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name} imports relatively"
                names = [node.module]
            assert not {n.split(".")[0] for n in names} & beside, f"{path.name} imports {names}"
        assert list(imported_modules(path, path.parent)), f"{path.name} does not use kdtoolkit"
