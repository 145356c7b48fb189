"""Taps, stage reset, adapters and plan for every network of timm, on the meta device.

    python benchmarks/timm_coverage.py scan     every name of timm.list_models(), and torchvision's
                                                classifiers
    python benchmarks/timm_coverage.py graph    the same names without timm's feature_info
    python benchmarks/timm_coverage.py pairs    all ordered pairs of one network per family:
                                                adapters by shape
    python benchmarks/timm_coverage.py table    writes benchmarks/results/timm_coverage.md

No weights are loaded and nothing is computed. Each part can be interrupted and resumed: names that
--output already holds are skipped. For every name: the stages and which of them can be reset; a
check that a reset is exact (`Taps.find_reset_errors`: with every boundary replaced, each stage and
the logits depend on the boundary in front of them and on nothing else); and two plans with hints,
attention transfer and stage reset, as teacher of resnet18 and as student of vit_tiny_patch16_224,
each network at its own image size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from kdtoolkit import Frozen, Taps, create_method
from kdtoolkit.features.adapters import Adapter
from kdtoolkit.features.stage_matching import pair_stages
from kdtoolkit.features.stages import find_stages

LOSSES = {"fitnet": 1.0, "at": 1.0, "srkd": 1.0}
TORCHVISION_SIZES = {"inception_v3": 299}  # pixels; the model itself does not state them
HINTS = ("feature_info", "num_prefix_tokens", "output_fmt")
Row = dict[str, Any]


# ----------------------------------------------------------------------------------------- networks
def names() -> list[str]:
    """Names of timm's own models; those that kdtoolkit registers are left out."""
    return [name for name in timm.list_models() if not name.startswith("cifar_")]


def build(name: str, classes: int | None = None) -> nn.Module:
    options = {} if classes is None else {"num_classes": classes}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, **options)
    published_without_head = getattr(model, "num_classes", 1) == 0
    if classes is None and published_without_head:
        return build(name, 10)
    return model.eval()


def torchvision_model(name: str) -> nn.Module:
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    device = "cpu" if name.startswith("regnet") else "meta"  # its constructor computes with tensors
    with torch.device(device):
        return torchvision.models.get_model(name, weights=None, **options).eval()


# --------------------------------------------------------------------------------------------- rows
def row(
    name: str, model: nn.Module, size: int | None = None, hints: bool = True, plans: bool = True
) -> Row:
    start = time.perf_counter()
    taps = Taps(model, None, size)
    if not hints:
        with without_hints(taps.trace.model):
            taps._stages = find_stages(taps.trace)
    taps.select(range(1, len(taps.stages) + 1))
    seconds = time.perf_counter() - start
    boundaries = taps.stages
    replaceable = [key for key in taps.keys if taps.boundary_of(key).replaceable]
    found: Row = {
        "name": name,
        "size": list(taps.size),
        "seconds": seconds,
        "stage_count": len(boundaries),
        "replaceable": len(replaceable),
        "reset_errors": taps.find_reset_errors(replaceable),
        "stages": [[b.name, round(b.stride, 2), b.shape.layout, b.replaceable] for b in boundaries],
        "tensors": max((len(b.read_tensors) for b in boundaries), default=0),
        "prefix": max((b.shape.prefix for b in boundaries), default=0),
    }
    taps.remove_hooks()
    if plans:
        found["as_teacher"] = plan("resnet18", None, model)
        found["as_student"] = plan(model, size, "vit_tiny_patch16_224")
    return found


@contextlib.contextmanager
def without_hints(model: nn.Module) -> Iterator[None]:
    """A model without its attributes on stages, layout and class tokens."""
    hints = [(m, n, getattr(m, n)) for m in model.modules() for n in HINTS if hasattr(m, n)]
    for module, name, _ in hints:
        setattr(module, name, None)
    try:
        yield
    finally:
        for module, name, value in hints:
            setattr(module, name, value)


def plan(student: Any, size: int | None, teacher: Any) -> Row:
    """Seconds and adapter parameters of a plan with all losses."""
    start = time.perf_counter()
    nets = [build(net) if isinstance(net, str) else net for net in (student, teacher)]
    frozen = Frozen(nets[1], None)
    try:
        with torch.device("meta"):
            method = create_method(list(LOSSES), Taps(nets[0], None, size), [frozen], losses=LOSSES)
        made = method.plan()
        method.release()
    finally:
        frozen.release()
    return {
        "seconds": time.perf_counter() - start,
        "adapters": made["parameters"]["adapters"],
        "rows": len(made["losses"]),
    }


def attempt(name: str, make: Any, **options: Any) -> Row:
    try:
        return row(name, make(), **options)
    except Exception as error:  # a network that fails is a result
        return {"name": name, "error": f"{type(error).__name__}: {error}"}


# -------------------------------------------------------------------------------------------- parts
def scan(done: set[str]) -> Iterator[Row]:
    for name in names():
        if name not in done:
            yield attempt(name, lambda name=name: build(name)) | {"family": family(name)}
    for name in torchvision.models.list_models(module=torchvision.models):
        key = f"torchvision/{name}"
        if key not in done:
            size = TORCHVISION_SIZES.get(name, 224)
            yield attempt(key, lambda name=name: torchvision_model(name), size=size) | {
                "family": "torchvision"
            }


def graph(done: set[str]) -> Iterator[Row]:
    for name in names():
        if name not in done:
            yield attempt(name, lambda name=name: build(name), hints=False, plans=False) | {
                "family": family(name)
            }


def pairs(done: set[str]) -> Iterator[Row]:
    """Every adapter between the paired stages of two networks runs and gives the other's shape."""
    per_family: dict[str, str] = {}
    for name in names():
        per_family.setdefault(family(name), name)
    stages = {name: Taps(build(name), None).stages for name in per_family.values()}
    for teacher in stages:
        if teacher in done:
            continue
        found: Row = {"name": teacher, "pairs": 0, "wrong": [], "octaves": Counter()}
        for student in stages:
            if student == teacher:
                continue
            found["pairs"] += 1
            for s, t in pair_stages(stages[student], stages[teacher]):
                source, target = stages[student][s - 1], stages[teacher][t - 1]
                ratio = torch.tensor(source.stride / target.stride)
                found["octaves"][str(round(abs(ratio.log2().item())))] += 1
                for tensor in target.read_tensors:
                    if not fits(source.shape, tensor.shape):
                        found["wrong"].append(f"{student} stage {s} -> {tensor.name}")
        yield found


def fits(src: Any, dst: Any) -> bool:
    def feature(shape: Any) -> torch.Tensor:
        return torch.empty(2 * shape.windows[0] * shape.windows[1], *shape, device="meta")

    with torch.device("meta"):
        return Adapter(src, dst)(feature(src)).shape == feature(dst).shape


def family(name: str) -> str:
    return timm.models._registry._model_to_module[name]


# -------------------------------------------------------------------------------------------- table
def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_exact(row: Row, boundaries: int) -> bool:
    """Two stages or more, so many replaceable boundaries or more, and every reset is exact."""
    if "error" in row or row["stage_count"] < 2:
        return False
    return row["replaceable"] >= boundaries and not row["reset_errors"]


def count_exact(rows: Iterable[Row], boundaries: int = 0) -> int:
    return sum(is_exact(row, boundaries) for row in rows)


def summary(ours: list[Row], others: list[Row], plain: list[Row]) -> list[tuple[str, str]]:
    """What was checked, and how many networks passed.

    Args:
        ours: Rows of timm's networks.
        others: Rows of torchvision's networks.
        plain: Rows of timm's networks without hints.
    """

    def of(rows: list[Row], boundaries: int = 0) -> str:
        return f"{count_exact(rows, boundaries)} of {len(rows)}"

    planned = {side: str(sum(side in r for r in ours)) for side in ("as_teacher", "as_student")}
    return [
        ("timm: two stages or more found, each tap fires once", of(ours)),
        ("timm: reset verified exact at two boundaries or more", of(ours, 2)),
        ("... at three or more", str(count_exact(ours, 3))),
        ("... at four or more", str(count_exact(ours, 4))),
        ("timm: planned as teacher of resnet18 with hints, AT and SRKD", planned["as_teacher"]),
        ("timm: planned as student of vit_tiny_patch16_224", planned["as_student"]),
        ("torchvision's classifiers, no metadata: taps and exact resets", of(others, 2)),
        (
            "timm without its feature_info, layout and class-token hints: two taps, exact resets",
            of(plain, 2),
        ),
        ("... at three or more", str(count_exact(plain, 3))),
    ]


def table(folder: Path) -> str:
    rows, plain, paired = (read(folder / f"{part}.jsonl") for part in ("scan", "graph", "pairs"))
    ours = [r for r in rows if r["family"] != "torchvision"]
    others = [r for r in rows if r["family"] == "torchvision"]
    built = [r for r in ours if "error" not in r]
    seconds = sorted(r["seconds"] for r in built)
    slowest = max(built, key=lambda r: r["seconds"])["name"]
    plans = sorted(r[side]["seconds"] for r in built for side in ("as_teacher", "as_student"))
    text = [
        "# Which networks kdtoolkit covers",
        "",
        f"timm {timm.__version__}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, meta device, one CPU thread beside other work. "
        "Commands: `python benchmarks/timm_coverage.py scan`, then `graph`, `pairs`, `table`.",
        "",
        "| what | networks |",
        "|---|---|",
        *(f"| {what} | {count} |" for what, count in summary(ours, others, plain)),
    ]
    if paired:
        count, octaves = sum(r["pairs"] for r in paired), Counter()
        for r in paired:
            octaves.update(r["octaves"])
        wrong = sum(bool(r["wrong"]) for r in paired)
        share = ", ".join(
            f"{k} octaves {100 * v / octaves.total():.1f} %" for k, v in sorted(octaves.items())
        )
        text += [
            f"| ordered pairs of one network per family, every adapter fits | {count - wrong} of "
            f"{count} |"
        ]
        text += ["", f"Strides of the paired stages differ by: {share}."]
    text += [
        "",
        f"Finding the stages takes {statistics.median(seconds):.2f} s in the median, "
        f"{seconds[-1]:.1f} s at most ({slowest}); a whole plan, both networks built without "
        f"weights, {statistics.median(plans):.2f} s in the median, "
        f"{plans[int(0.99 * len(plans))]:.2f} s for 99 in 100, {plans[-1]:.1f} s at most.",
        "",
    ]
    text += failures("Failures", [r for r in rows if not is_exact(r, 2)])
    text += failures("Failures without feature_info", [r for r in plain if not is_exact(r, 2)])
    few = [r["name"] for r in built if r["replaceable"] < 3]
    text += [f"Two boundaries only ({len(few)}): {', '.join(few)}.", ""]
    return "\n".join([*text, *by_family(built)])


def failures(title: str, rows: list[Row]) -> list[str]:
    lines = [
        f"- {r['name']}: {r.get('error') or r['reset_errors'] or str(r['stage_count']) + ' stages'}"
        for r in rows
    ]
    return [f"## {title} ({len(rows)})", "", *(lines or ["None."]), ""]


def by_family(rows: list[Row]) -> list[str]:
    families: dict[str, list[Row]] = defaultdict(list)
    for r in rows:
        families[r["family"]].append(r)
    text = [
        "## By family",
        "",
        "| family | networks | stages | boundaries | strides | layout | tensors | prefix |",
    ]
    text += ["|---|---|---|---|---|---|---|---|"]
    for name, members in sorted(families.items()):
        strides = Counter(
            "/".join(f"{s[1]:.0f}" for s in r["stages"]) for r in members
        ).most_common(1)[0][0]
        cells = [
            "/".join(map(str, sorted({r[key] for r in members})))
            for key in ("stage_count", "replaceable", "tensors", "prefix")
        ]
        layouts = "/".join(sorted({s[2] for r in members for s in r["stages"]}))
        text.append(
            f"| {name} | {len(members)} | {cells[0]} | {cells[1]} | {strides} | {layouts} | "
            f"{cells[2]} | {cells[3]} |"
        )
    note = (
        "Tensors: at the widest boundary. Prefix: class, register and distillation tokens. "
        "Strides: the commonest."
    )
    return [*text, "", note, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["scan", "graph", "pairs", "table"])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/timm_coverage"), help="folder of raw rows"
    )
    results = Path(__file__).parent / "results" / "timm_coverage.md"
    parser.add_argument("--table", type=Path, default=results, help="file that `table` writes")
    args = parser.parse_args()
    if args.part == "table":
        args.table.write_text(table(args.output), encoding="utf-8")
        print(f"wrote {args.table.name}")
        return
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.part}.jsonl"
    done = {r["name"] for r in read(path)}
    for found in {"scan": scan, "graph": graph, "pairs": pairs}[args.part](done):
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(
            found["name"],
            found.get("error") or found.get("reset_errors") or found.get("wrong") or "ok",
            flush=True,
        )


if __name__ == "__main__":
    main()
