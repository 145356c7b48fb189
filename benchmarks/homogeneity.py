"""The two-dimensional Monte Carlo simulation of DKEL (Shao and Chen 2023, section 3.4, figure 5).

    python benchmarks/homogeneity.py [--trials 10000] [--figure benchmarks/results/homogeneity.png]

A distribution is a point of the plane, a loss the way from a point to its target, an ensemble the
mean of its points. Of three student peers each takes one step an epoch, learning rate 0.1, towards
the sum of three targets: the truth, the mean of the student's peers, and the other peers' teachers;
then each teacher moves by EMA. Reported: mean distance of the students and of the teachers to the
truth (the paper's gap), and of every teacher to its student (homogeneity).

    PCL, random    teachers drawn independently of the students
    PCL, copy      teachers start as copies
    DK             copies, then one step of 0.1 to the truth
    DKEL           DK, and early the mean of the others' teachers
    DKEL, coded    as its public code has it: the two supervisions mixed, EMA
                   min(1 - 1 / (step + 1), 0.9) with step from 0, so that the first step makes the
                   teacher the student
    PCL, coded     PCL, copy with that EMA

Chosen, because the paper's text does not say: all points and the truth from a standard normal; EMA
0.9; the other teachers' pulls averaged; "way" is the vector, not its direction; DKEL's term added,
with weight exp(-0.5 epoch). `READINGS` holds other choices.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np

from kdtoolkit.report.plots import PALETTE, TEACHER_COLOR, new_figure, save_figure

PEERS = 3
METHODS = ("PCL, random", "PCL, copy", "DK", "DKEL", "DKEL, coded", "PCL, coded")
READINGS: dict[str, dict] = {
    "as chosen": {},
    "DKEL's term mixed in": {"mixed": True},
    "other teachers summed": {"summed": True},
    "summed and mixed in": {"summed": True, "mixed": True},
    "steps of length 0.1": {"unit": True},
    "truth in the centre": {"centre": True},
    "EMA 0.8": {"ema": 0.8},
    "EMA 0.99": {"ema": 0.99},
    "EMA 0.999": {"ema": 0.999},
}


def simulate(
    method: str,
    trials: int,
    *,
    epochs: int = 90,
    lr: float = 0.1,
    ema: float = 0.9,
    decay: float = 0.5,
    mixed: bool = False,
    summed: bool = False,
    unit: bool = False,
    centre: bool = False,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Simulate one method.

    Args:
        method: One of `METHODS`; the same seed draws the same points for every method.
        trials: Number of independent simulations.
        epochs: Number of steps.
        lr: Length of a step as a fraction of the way to its target.
        ema: Decay of the teachers' moving average.
        decay: Rate at which DKEL's additional term decays, per epoch.
        mixed: DKEL's term is mixed with the other teachers' instead of added.
        summed: The other teachers' pulls are summed instead of averaged.
        unit: Ways have length 1.
        centre: The truth is the origin.
        seed: Seed of all draws.

    Returns:
        Mean distances in every trial, (epochs + 1, trials) each: "student" and "teacher" to the
        truth, "apart" between the two.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}; allowed: {', '.join(METHODS)}")
    rng, coded = np.random.default_rng(seed), method.endswith("coded")
    truth = rng.standard_normal((trials, 1, 2)) * (0.0 if centre else 1.0)
    student = rng.standard_normal((trials, PEERS, 2))
    drawn = rng.standard_normal((trials, PEERS, 2))

    def way(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        length = np.linalg.norm(b - a, axis=-1, keepdims=True)
        return (b - a) / np.maximum(length, 1e-12) if unit else b - a

    teacher = drawn if method == "PCL, random" else student.copy()
    if "DK" in method:
        teacher = teacher + lr * way(teacher, truth)
    found: dict[str, list[np.ndarray]] = {"student": [], "teacher": [], "apart": []}
    for epoch in range(epochs + 1):
        for name, gap in (
            ("student", student - truth),
            ("teacher", teacher - truth),
            ("apart", teacher - student),
        ):
            found[name].append(np.linalg.norm(gap, axis=-1).mean(-1))
        others = [np.roll(teacher, -k, axis=1) for k in range(1, PEERS)]  # of peer i: teacher i + k
        each = sum(way(student, t) for t in others) / (1 if summed else PEERS - 1)
        early = np.exp(-decay * epoch) if "DKEL" in method else 0.0
        share = 1 - early if mixed or coded else 1.0
        to_teachers = share * each + early * way(student, sum(others) / (PEERS - 1))
        to_peers = way(student, student.mean(1, keepdims=True))
        student = student + lr * (way(student, truth) + to_peers + to_teachers)
        keep = min(1 - 1 / (epoch + 1), ema) if coded else ema
        teacher = keep * teacher + (1 - keep) * student
    return {name: np.array(values) for name, values in found.items()}


def converged(gap: np.ndarray, share: float = 0.05) -> int | None:
    """First epoch at which the mean gap is below a share of what it was."""
    below = np.nonzero(gap.mean(1) < share * gap[0].mean())[0]
    return int(below[0]) if len(below) else None


def change(a: np.ndarray, b: np.ndarray, epoch: int) -> str:
    """By how much a's mean gap differs from b's, in per cent of b's, with its standard error.

    The error is that of the paired differences over the trials.
    """
    pairs, base = a[epoch] - b[epoch], b[epoch].mean() / 100
    return f"{pairs.mean() / base:+.2f} ± {pairs.std(ddof=1) / len(pairs) ** 0.5 / base:.2f}"


def tables(trials: int) -> list[str]:
    runs = {m: simulate(m, trials) for m in METHODS}
    lines = [
        "| method | student's gap at epoch 0, 10, 60, 90 | teacher's gap "
        "| below 5 % at epoch: student, teacher | teacher to student |",
        "|---|---|---|---|---|",
    ]
    for method, run in runs.items():
        at = [
            ", ".join(f"{run[n][e].mean():.3f}" for e in (0, 10, 60, 90))
            for n in ("student", "teacher", "apart")
        ]
        lines.append(
            f"| {method} | {at[0]} | {at[1]} | {converged(run['student'])}, "
            f"{converged(run['teacher'])} | {at[2]} |"
        )
    lines += [
        "",
        "| reading | DK against PCL, copy: epochs 10, 60 | DK against PCL, random "
        "| DKEL against DK: 5, 10, 60 | below 5 %: PCL random, copy, DK, DKEL |",
        "|---|---|---|---|---|",
    ]
    for reading, options in READINGS.items():
        gaps = [simulate(m, trials, **options)["student"] for m in METHODS[:4]]
        random, copy, dk, dkel = gaps
        cells = [
            ", ".join(change(dk, copy, e) for e in (10, 60)),
            ", ".join(change(dk, random, e) for e in (10, 60)),
            ", ".join(change(dkel, dk, e) for e in (5, 10, 60)),
            ", ".join(str(converged(gap) or "-") for gap in gaps),
        ]
        lines.append(f"| {reading} | " + " | ".join(cells) + " |")
    return lines


def scan(trials: int) -> str:
    """DKEL against DK over every combination of the choices."""
    found: dict[int, list[float]] = {5: [], 10: [], 60: [], 90: []}
    earlier = []
    for *flags, ema in itertools.product(*[(False, True)] * 4, (0.5, 0.8, 0.9, 0.99)):
        options = dict(zip(("mixed", "summed", "unit", "centre"), flags, strict=True))
        dk, dkel = (simulate(m, trials, ema=ema, **options)["student"] for m in ("DK", "DKEL"))
        for epoch, changes in found.items():
            changes.append(100 * (dkel[epoch].mean() / dk[epoch].mean() - 1))
        ends = converged(dk), converged(dkel)
        if None not in ends:
            earlier.append(ends[0] - ends[1])
    ranges = ", ".join(f"{min(c):+.1f} to {max(c):+.1f} % at epoch {e}" for e, c in found.items())
    return (
        f"All {len(found[5])} combinations of mixed, summed, unit, centre and EMA 0.5, 0.8, 0.9, "
        f"0.99, {trials} trials; DKEL against DK: {ranges}. Both converge in {len(earlier)}, "
        f"DKEL {min(earlier)} to {max(earlier)} epochs earlier."
    )


def draw(file: Path, trials: int) -> None:
    figure = new_figure(8.4, 3.6)
    panels = figure.subplots(1, 2)
    styles = dict(zip(METHODS, [TEACHER_COLOR, *PALETTE], strict=False))
    for method, color in styles.items():
        run = simulate(method, trials)
        for axes, name in zip(panels, ("student", "apart"), strict=True):
            style = (0, (4, 3)) if method in ("DKEL", "PCL, coded") else "-"
            axes.plot(run[name].mean(1), color=color, linestyle=style, linewidth=1.6, label=method)
    for axes, title in zip(panels, ("student to truth", "teacher to its student"), strict=True):
        axes.set(
            title=title, xlabel="epoch (steps)", ylabel="mean distance (no unit)", ylim=(0, None)
        )
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=9,
    )
    save_figure(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--figure", default="", help="PNG to write; needs matplotlib")
    args = parser.parse_args()
    print("\n".join(tables(args.trials)))
    print("\n" + scan(args.trials // 10))
    if args.figure:
        draw(Path(args.figure), args.trials)


if __name__ == "__main__":
    main()
