"""DKEL's simulation (benchmarks/homogeneity.py): what holds in it, with few draws."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SPEC = importlib.util.spec_from_file_location(
    "homogeneity", Path(__file__).parents[2] / "benchmarks" / "homogeneity.py"
)
homogeneity = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(homogeneity)
simulate, TRIALS = homogeneity.simulate, 500


def test_one_step_to_the_truth_brings_students_nearer_to_it():
    copied, stepped = (
        simulate(method, TRIALS)["student"].mean(1) for method in ("PCL, copy", "DK")
    )
    assert copied[0] == stepped[0]
    assert (stepped[2:] < 0.99 * copied[2:]).all()  # by 2 to 7 % over the epochs


def test_the_moving_average_makes_every_teacher_its_student():
    for method in homogeneity.METHODS:
        run = simulate(method, TRIALS)
        assert run["apart"][-1].mean() < 0.05 * run["student"][0].mean()
    copied, stepped, drawn = (
        simulate(m, TRIALS)["apart"][0].mean() for m in ("PCL, copy", "DK", "PCL, random")
    )
    assert copied == 0 < stepped < drawn


def test_a_loop_from_the_description_gives_the_same_points():
    rng = np.random.default_rng(3)
    truth, peers = rng.standard_normal(2), rng.standard_normal((3, 2))
    found = simulate("DKEL", 1, epochs=2, seed=3)
    teachers = peers + 0.1 * (truth - peers)
    for epoch in range(2):
        middle, new = peers.mean(0), []
        for i, p in enumerate(peers):
            a, b = (teachers[j] for j in range(3) if j != i)
            step = (
                (truth - p)
                + (middle - p)
                + ((a - p) + (b - p)) / 2
                + np.exp(-0.5 * epoch) * ((a + b) / 2 - p)
            )
            new.append(p + 0.1 * step)
        peers = np.array(new)
        teachers = 0.9 * teachers + 0.1 * peers
    assert np.allclose(found["student"][-1], np.linalg.norm(peers - truth, axis=1).mean())
    assert np.allclose(found["apart"][-1], np.linalg.norm(peers - teachers, axis=1).mean())


def test_mixed_in_the_mean_of_teachers_changes_nothing():
    assert np.allclose(*(simulate(m, TRIALS, mixed=True)["student"] for m in ("DK", "DKEL")))
    with pytest.raises(ValueError, match="allowed: PCL, random"):
        simulate("pcl", 1)


def test_tables_and_figure(tmp_path):
    lines = homogeneity.tables(20)
    assert (
        sum(line.startswith("| ") for line in lines)
        == len(homogeneity.METHODS) + len(homogeneity.READINGS) + 2
    )
    pytest.importorskip("matplotlib")
    homogeneity.draw(tmp_path / "homogeneity.png", 20)
    assert 1000 < (tmp_path / "homogeneity.png").stat().st_size < 150_000
