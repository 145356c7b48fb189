"""The house: a file imports only from floors below its own; no climb, no step sideways, no circle.

A room is a file of kdtoolkit/ or a folder with all its files; files of one folder may import each other. Where one
room of architecture.md's floor reads another of the same floor, the lower one stands half a floor down:

* `types` and `distributed` carry floor 0: schedules, trace and watch read them.
* `layout`, `ends`, `stages` and `fold` use what `trace` (0.4) found: 0.53 to 0.6, as does `preprocess`, 0.5, because
  `models` (1) and `taps` (1) both read it.
* `tails` uses taps and tuning, methods use it: 2.5.
* `callbacks/base.py` is a room of its own, below the methods and above the types.
* `networks` and `fingerprint` read models, data and `tuning`; `assemble` and `finetune` read them: 7.3.
* `evaluation` and `settings` read data, metrics and method, the engine reads them: 6.5. `assemble` and `finish`, which
  `api` (8) puts in front of and behind the engine: 7.5. The package itself 9, and what is written for people at a
  shell (`cli`, `recipe`) 10.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kdtoolkit"
FLOORS = {
    0: "allocator restore types distributed functional registry files signals",
    0.4: "trace",
    0.5: "schedules preprocess watch",
    0.53: "layout",
    0.54: "ends",
    0.55: "stages pairing",
    0.6: "fold",
    1: "models taps callbacks.base",
    2: "modules tuning",
    2.5: "tails",
    3: "method",
    4: "offline data metrics checkpoint report journal plan",
    5: "objectives callbacks",
    6: "methods",
    6.5: "evaluation settings",
    7: "engine",
    7.3: "networks fingerprint",
    7.5: "assemble finish finetune told",
    8: "api",
    9: "kdtoolkit",
    10: "cli recipe",
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path, root):
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    """kdtoolkit.data.augment -> data; kdtoolkit.callbacks.base -> callbacks.base; kdtoolkit -> kdtoolkit."""
    inside = module.removeprefix("kdtoolkit").removeprefix(".")
    return inside if inside == "callbacks.base" else inside.split(".")[0] or "kdtoolkit"


def imports(path, root=PACKAGE, type_checking=False):
    """Modules of kdtoolkit that a file imports, anywhere in it; those for annotations alone are no imports."""
    module, modules = module_of(path, root), {module_of(p, PACKAGE) for p in FILES} if root == PACKAGE else set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test).endswith("TYPE_CHECKING")
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "kdtoolkit")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *filter(None, [node.module])])
            if base.split(".")[0] == "kdtoolkit":
                for alias in node.names:  # `from . import checkpoint` is a module, `from .types import Step` a name
                    inner = f"{base}.{alias.name}"
                    yield inner if inner in modules else base


def wrong(importer, imported):
    """Why one module may not import another, or None."""
    a, b = room_of(importer), room_of(imported)
    if a == b or (a, b) == ("callbacks", "callbacks.base"):
        return None
    for room in (a, b):
        if room not in FLOOR:
            return f"{room} has no floor: give it one in tests/test_floors.py"
    if FLOOR[b] >= FLOOR[a]:
        way = "climbs to" if FLOOR[b] > FLOOR[a] else "goes sideways to"
        return f"{importer} (floor {FLOOR[a]}) {way} {imported} (floor {FLOOR[b]})"
    return None


def test_no_climb_and_no_step_sideways():
    found = [w for p in FILES for m in imports(p) if (w := wrong(module_of(p, PACKAGE), m))]
    assert not found, "\n".join(found)


def test_no_circle_between_files():
    graph = {}
    for path in FILES:
        module = module_of(path, PACKAGE)
        graph[module] = {m for m in imports(path) if m != module and not module.startswith(m + ".")}
    assert sum(map(len, graph.values())) > 100

    def walk(module, way):
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in sorted(graph.get(module, ())):
                walk(other, [*way, module])
            done.add(module)

    done = set()
    for module in graph:
        walk(module, [])
    assert done == set(graph)


@pytest.mark.parametrize("importer, imported, word", [
    ("kdtoolkit.functional", "kdtoolkit.taps", "climbs"),
    ("kdtoolkit.offline", "kdtoolkit.data.augment", "sideways"),
    ("kdtoolkit.callbacks.base", "kdtoolkit.callbacks.progress", "climbs"),
    ("kdtoolkit.engine", "kdtoolkit", "climbs"),
    ("kdtoolkit.nowhere", "kdtoolkit.types", "no floor"),
])  # fmt: skip
def test_what_is_refused(importer, imported, word):
    assert word in wrong(importer, imported)


def test_every_room_stands_on_a_floor():
    rooms = {room_of(module_of(p, PACKAGE)) for p in FILES}
    assert rooms <= set(FLOOR), f"without a floor: {sorted(rooms - set(FLOOR))}"


@pytest.mark.parametrize("folder", ["recipes", "benchmarks"])
def test_recipes_and_benchmarks_import_kdtoolkit_and_no_file_beside_them(folder):
    files = sorted((ROOT / folder).glob("*.py"))
    assert files
    for path in files:
        beside = {p.stem for p in files} | {"tests", "recipes", "benchmarks"}
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name} imports relatively"
                names = [node.module]
            assert not {n.split(".")[0] for n in names} & beside, f"{path.name} imports {names}"
        assert list(imports(path, path.parent)), f"{path.name} does not use kdtoolkit"
