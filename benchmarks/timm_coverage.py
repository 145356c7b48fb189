"""Taps, stage reset, adapters and plan for every network of timm, on the meta device: no weights, no arithmetic.

    python benchmarks/timm_coverage.py scan        every name of timm.list_models(), and torchvision's classifiers
    python benchmarks/timm_coverage.py graph       the same names without timm's feature_info
    python benchmarks/timm_coverage.py pairs       all ordered pairs of one network per family: adapters by shape
    python benchmarks/timm_coverage.py table       writes benchmarks/results/timm_coverage.md

Each is resumable: what --output holds already is not done again. For every name: the stages and which of them can be
reset; the proof that a reset is exact (kdtoolkit.taps.leaks: with every boundary replaced, each stage and the logits
depend on the boundary in front of them and on nothing else); and two plans with hints, attention transfer and stage
reset, as teacher of resnet18 and as student of vit_tiny_patch16_224, each network at its own image size.
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
from kdtoolkit.features.reset_check import find_reset_leaks
from kdtoolkit.features.stage_matching import pair_stages
from kdtoolkit.features.stages import find_stages

LOSSES = {"fitnet": 1.0, "at": 1.0, "srkd": 1.0}
FIXED = {"inception_v3": 299}  # torchvision's, which does not say so
TOLD = ("feature_info", "num_prefix_tokens", "output_fmt")
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- networks
def names() -> list[str]:
    """timm's own: those that kdtoolkit registers are left out."""
    return [name for name in timm.list_models() if not name.startswith("cifar_")]


def build(name: str, classes: int | None = None) -> nn.Module:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = (
            timm.create_model(name)
            if classes is None
            else timm.create_model(name, num_classes=classes)
        )
    if (
        classes is None and getattr(model, "num_classes", 1) == 0
    ):  # a backbone that is published without a head
        return build(name, 10)
    return model.eval()


def torchvision_model(name: str) -> nn.Module:
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    device = "cpu" if name.startswith("regnet") else "meta"  # its constructor computes with tensors
    with torch.device(device):
        return torchvision.models.get_model(name, weights=None, **options).eval()


# ----------------------------------------------------------------------------------------------------------------- rows
def row(
    name: str, model: nn.Module, size: int | None = None, hints: bool = True, plans: bool = True
) -> Row:
    start = time.perf_counter()
    taps = Taps(model, None, size)
    if not hints:
        with silent(taps.trace.model):
            taps._stages = find_stages(taps.trace)
    taps.select(range(1, len(taps.stages) + 1))
    seconds = time.perf_counter() - start
    ends = taps.stages
    cuts = [key for key in taps.keys if taps.end(key).cut]
    found: Row = {
        "name": name, "size": list(taps.size), "seconds": seconds, "taps": len(ends), "cuts": len(cuts),
        "leaks": find_reset_leaks(taps, cuts), "stages": [[e.name, round(e.stride, 2), e.shape.layout, e.cut] for e in ends],
        "tensors": max((len(e.boundary) for e in ends), default=0),
        "prefix": max((e.shape.prefix for e in ends), default=0),
    }  # fmt: skip
    taps.remove()
    if plans:
        found["as_teacher"] = plan("resnet18", None, model)
        found["as_student"] = plan(model, size, "vit_tiny_patch16_224")
    return found


@contextlib.contextmanager
def silent(model: nn.Module) -> Iterator[None]:
    """A model that says nothing of its stages, its layout and its class tokens."""
    told = [(m, n, getattr(m, n)) for m in model.modules() for n in TOLD if hasattr(m, n)]
    for module, name, _ in told:
        setattr(module, name, None)
    try:
        yield
    finally:
        for module, name, value in told:
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
        "seconds": time.perf_counter() - start, "adapters": made["parameters"]["adapters"], "rows": len(made["losses"])
    }  # fmt: skip


def attempt(name: str, make: Any, **options: Any) -> Row:
    try:
        return row(name, make(), **options)
    except Exception as error:  # a network that fails is a result
        return {"name": name, "error": f"{type(error).__name__}: {error}"}


# ---------------------------------------------------------------------------------------------------------------- parts
def scan(done: set[str]) -> Iterator[Row]:
    for name in names():
        if name not in done:
            yield attempt(name, lambda name=name: build(name)) | {"family": family(name)}
    for name in torchvision.models.list_models(module=torchvision.models):
        key = f"torchvision/{name}"
        if key not in done:
            size = FIXED.get(name, 224)
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
                src, end = stages[student][s - 1], stages[teacher][t - 1]
                apart = round(abs(torch.tensor(src.stride / end.stride).log2().item()))
                found["octaves"][str(apart)] += 1
                for part in end.boundary:
                    if not fits(src.shape, part.shape):
                        found["wrong"].append(f"{student} stage {s} -> {part.name}")
        yield found


def fits(src: Any, dst: Any) -> bool:
    def feature(shape: Any) -> torch.Tensor:
        return torch.empty(2 * shape.windows[0] * shape.windows[1], *shape, device="meta")

    with torch.device("meta"):
        return Adapter(src, dst)(feature(src)).shape == feature(dst).shape


def family(name: str) -> str:
    return timm.models._registry._model_to_module[name]


# ---------------------------------------------------------------------------------------------------------------- table
def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def good(rows: Iterable[Row], cuts: int = 0) -> int:
    return sum(
        "error" not in r and r["taps"] >= 2 and r["cuts"] >= cuts and not r["leaks"] for r in rows
    )


def table(folder: Path) -> str:
    rows, plain, paired = (read(folder / f"{part}.jsonl") for part in ("scan", "graph", "pairs"))
    ours = [r for r in rows if r["family"] != "torchvision"]
    others = [r for r in rows if r["family"] == "torchvision"]
    built = [r for r in ours if "error" not in r]
    seconds = sorted(r["seconds"] for r in built)
    plans = sorted(r[side]["seconds"] for r in built for side in ("as_teacher", "as_student"))
    text = [
        "# Which networks kdtoolkit covers", "",
        f"timm {timm.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}, meta device, one "
        "CPU thread beside other work. Commands: `python benchmarks/timm_coverage.py scan`, then `graph`, `pairs`, "
        "`table`.", "",
        "| what | networks |", "|---|---|",
        f"| timm: two stages or more found, each tap fires once | {good(ours)} of {len(ours)} |",
        f"| timm: reset proven exact at two boundaries or more | {good(ours, 2)} of {len(ours)} |",
        f"| ... at three or more | {good(ours, 3)} |",
        f"| ... at four or more | {good(ours, 4)} |",
        f"| timm: planned as teacher of resnet18 with hints, AT and SRKD | {sum('as_teacher' in r for r in built)} |",
        f"| timm: planned as student of vit_tiny_patch16_224 | {sum('as_student' in r for r in built)} |",
        f"| torchvision's classifiers, no metadata: taps and exact resets | {good(others, 2)} of {len(others)} |",
        "| timm without its feature_info, layout and class-token hints: two taps and exact resets | "
        f"{good(plain, 2)} of {len(plain)} |",
        f"| ... at three or more | {good(plain, 3)} |",
    ]  # fmt: skip
    if paired:
        count, octaves = sum(r["pairs"] for r in paired), Counter()
        for r in paired:
            octaves.update(r["octaves"])
        wrong = sum(bool(r["wrong"]) for r in paired)
        share = ", ".join(
            f"{k} octaves {100 * v / octaves.total():.1f} %" for k, v in sorted(octaves.items())
        )
        text += [
            f"| ordered pairs of one network per family, every adapter fits | {count - wrong} of {count} |"
        ]
        text += ["", f"Strides of the paired stages differ by: {share}."]
    text += [
        "", f"Finding the stages takes {statistics.median(seconds):.2f} s in the median, {seconds[-1]:.1f} s at most "
        f"({max(built, key=lambda r: r['seconds'])['name']}); a whole plan, both networks built without weights, "
        f"{statistics.median(plans):.2f} s in the median, {plans[int(0.99 * len(plans))]:.2f} s for 99 in 100, "
        f"{plans[-1]:.1f} s at most.", "",
    ]  # fmt: skip
    text += failures("Failures", [r for r in rows if good([r], 2) == 0])
    text += failures("Failures without feature_info", [r for r in plain if good([r], 2) == 0])
    few = [r["name"] for r in built if r["cuts"] < 3]
    text += [f"Two boundaries only ({len(few)}): {', '.join(few)}.", ""]
    return "\n".join([*text, *by_family(built)])


def failures(title: str, rows: list[Row]) -> list[str]:
    lines = [
        f"- {r['name']}: {r.get('error') or r.get('leaks') or str(r['taps']) + ' stages'}"
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
            for key in ("taps", "cuts", "tensors", "prefix")
        ]  # fmt: skip
        layouts = "/".join(sorted({s[2] for r in members for s in r["stages"]}))
        text.append(
            f"| {name} | {len(members)} | {cells[0]} | {cells[1]} | {strides} | {layouts} | {cells[2]} | {cells[3]} |"
        )
    note = "Tensors: at the widest boundary. Prefix: class, register and distillation tokens. Strides: the commonest."
    return [*text, "", note, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["scan", "graph", "pairs", "table"])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/timm_coverage"), help="folder of raw rows"
    )
    args = parser.parse_args()
    if args.part == "table":
        target = Path(__file__).parent / "results" / "timm_coverage.md"
        target.write_text(table(args.output), encoding="utf-8")
        print(f"wrote {target.name}")
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
            found.get("error") or found.get("leaks") or found.get("wrong") or "ok",
            flush=True,
        )


if __name__ == "__main__":
    main()
