"""What recipes share: a protocol's numbers, options of any method, runs of several seeds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from kdtoolkit.methods.resolve import method_options
from kdtoolkit.pipeline.distill import distill
from kdtoolkit.pipeline.result import DistillResult
from kdtoolkit.reproduce.cells import read_protocols
from kdtoolkit.reproduce.show import mean_and_deviation
from kdtoolkit.utils.validation import check_choice, check_whole_number

logger = logging.getLogger(__name__)
SHOWN = ("top1", "exported", "exported_reason", "networks")


def protocol_settings(document: str, protocol: str, **given: Any) -> dict[str, Any]:
    """The numbers of a protocol, in which those that are given replace the protocol's.

    Args:
        document: Short name of the document, such as "dcl".
        protocol: Name of one of its protocols, such as "paper".
        **given: Keywords of `distill()`; None is the protocol's number.

    Returns:
        Keywords of `distill()`.

    Raises:
        ValueError: If the document has no such protocol.
    """
    known = read_protocols(document)
    check_choice("protocol", protocol, tuple(known))
    return dict(known[protocol]) | {k: v for k, v in given.items() if v is not None}


def options_for(method: str, *, networks: int | None = None, **given: Any) -> dict[str, Any]:
    """Those of the given options that a method has; a line says which are left out.

    Args:
        method: Name of the method.
        networks: Number of networks, which a method calls peers or branches; None is its own.
        **given: Options by name; None is the method's own default.

    Returns:
        Options of `distill()`.

    Raises:
        ValueError: If there is no such method.
    """
    known = method_options(method)
    name_of_count = "branches" if "branches" in known else "peers"
    given = {name_of_count: networks} | given
    given = {name: value for name, value in given.items() if value is not None}
    unknown = [name for name in given if name not in known]
    if unknown:
        logger.info("method %r has no option %s: left out", method, ", ".join(unknown))
    return {name: value for name, value in given.items() if name in known}


def distill_seeds(
    seeds: int, *networks_and_data: Any, seed: int = 0, output_dir: str | Path, **keywords: Any
) -> list[DistillResult]:
    """Run `distill()` with the seeds seed, seed + 1, ...

    One run lies in `output_dir` itself, several in its folders seed0, seed1, ... by seed.

    Args:
        seeds: Number of runs, from 1.
        *networks_and_data: Teacher, student and training data, as of `distill()`.
        seed: The first seed.
        output_dir: Folder of the run, or of all runs.
        **keywords: Further keywords of `distill()`.

    Returns:
        The results, by seed.

    Raises:
        ValueError: If `seeds` is not a whole number from 1.
    """
    return [
        distill(*networks_and_data, seed=number, output_dir=folder, **keywords)
        for number, folder in seed_folders(seeds, seed, output_dir).items()
    ]


def seed_folders(seeds: int, seed: int, output_dir: str | Path) -> dict[int, Path]:
    """The folder of the run of each seed.

    Args:
        seeds: Number of runs, from 1.
        seed: The first seed.
        output_dir: Folder of one run, or of all runs.

    Returns:
        Seed -> folder: `output_dir` itself of one run, "seed0", "seed1", ... in it of several.

    Raises:
        ValueError: If `seeds` is not a whole number from 1.
    """
    check_whole_number("seeds", seeds, meaning="runs, with seeds from --seed on")
    if seeds == 1:
        return {seed: Path(output_dir)}
    return {number: Path(output_dir) / f"seed{number}" for number in range(seed, seed + seeds)}


def print_results(results: Sequence[DistillResult], shown: Sequence[str] = SHOWN) -> None:
    """Print the metrics of runs, and of several their mean and standard deviation; rank 0 alone.

    Args:
        results: The runs.
        shown: Names of the metrics to print.
    """
    if not PartialState().is_main_process:
        return
    runs = [result.metrics for result in results]
    for metrics in runs:
        print({name: metrics[name] for name in shown if name in metrics})
    if len(runs) > 1:
        print(summary(runs))


def summary(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line on several runs.

    Args:
        runs: Metrics of every run.

    Returns:
        Mean and standard deviation of the top-1 in percent, and of what epoch they are.
    """
    chosen = " and ".join(dict.fromkeys(str(run["chosen"]) for run in runs if "chosen" in run))
    return f"top-1 {mean_and_deviation(runs, 'top1')} %, n = {len(runs)}, {chosen} epoch"
