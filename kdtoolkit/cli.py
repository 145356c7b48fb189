"""The command: `kdtoolkit run | plan | methods`."""

from __future__ import annotations

import argparse
import ast
import inspect
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import list_methods
from .api import distill
from .data import PRESETS
from .method import METHODS


def main(argv: list[str] | None = None) -> int:
    """Entry point; the process's exit code. An error is one line, `--traceback` shows where it came from."""
    parser = argparse.ArgumentParser("kdtoolkit", description="Knowledge distillation for any timm model.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="run | plan | train | methods")
    runner = commands.add_parser("run", help="run a recipe: a name in recipes/ or a path to a script", add_help=False)
    runner.add_argument("recipe")
    runner.add_argument("flags", nargs=argparse.REMAINDER, help="flags of the recipe; --help lists them")
    runner.set_defaults(do=_run)
    for name, dry, text in (
        ("plan", True, "print taps, shapes, adapters, losses and parameters without weights or data"),
        ("train", False, "one distill() call from flags"),
    ):
        command = commands.add_parser(name, help=text)
        _add_flags(command)
        command.set_defaults(do=_distill, dry=dry)
    commands.add_parser("methods", help="list the methods, their losses and default weights").set_defaults(do=_methods)
    args = parser.parse_args(argv)
    try:
        args.do(args)
    except KeyboardInterrupt as stopped:
        print(stopped or "interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if args.traceback:
            raise
        print(f"kdtoolkit: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    beside = Path(__file__).parents[1] / "recipes"  # of a clone
    places = [Path(args.recipe), Path("recipes") / f"{args.recipe}.py", beside / f"{args.recipe}.py"]
    script = next((p for p in places if p.is_file()), None)
    if script is None:
        known = sorted(p.stem for p in beside.glob("*.py")) or ["none found here"]
        raise ValueError(f"no recipe {args.recipe!r}; give a path to a script, or one of: {', '.join(known)}")
    sys.argv = [str(script), *args.flags]
    runpy.run_path(str(script), run_name="__main__")


def _distill(args: argparse.Namespace) -> None:
    own = ("do", "dry", "traceback", "loss", "option")
    given = {k: v for k, v in vars(args).items() if v is not None and k not in own}
    losses = dict(_pair(p, "--loss") for p in args.loss) or None
    options = dict(_pair(p, "--option") for p in args.option)
    teacher = given.pop("teacher", None)
    result = distill(
        teacher[0] if teacher and len(teacher) == 1 else teacher, given.pop("student"), given.pop("data"),
        losses=losses, dry_run=args.dry, **given, **options,
    )  # fmt: skip
    if args.dry:
        print(result.plan)


def _methods(args: argparse.Namespace) -> None:
    for name in list_methods():
        recipe = METHODS[name]
        terms = {n: f"{w:g}" if isinstance(w, (int, float)) else repr(w) for n, w in recipe.losses.items()}
        weights = " + ".join(f"{weight} {loss}" for loss, weight in terms.items())
        print(f"{name:10} {weights:28} {recipe.title}")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each argument of distill() that a shell can say."""
    add = parser.add_argument
    add("--teacher", nargs="+", help="timm name, local-dir:PATH, hf-hub:ID, PATH.safetensors; or several of them")
    add("--student", required=True, help="timm name or local-dir:PATH")
    add("--data", default="digits", help=f"preset ({', '.join(PRESETS)}), Hub name or folder")
    add("--method", default="kd", help="a name that `kdtoolkit methods` lists")
    add("--loss", action="append", default=[], metavar="NAME=WEIGHT", help="replaces the method's own sum; repeat it")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of a loss, e.g. detach=False; repeat it")
    skip = {"teacher", "student", "train_data", "eval_data", "method", "losses", "dry_run", "layers", "method_options"}
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": _flag, "str": str}
    for name, parameter in inspect.signature(distill).parameters.items():
        kind = kinds.get(_first(str(parameter.annotation)))
        if name not in skip and kind is not None:
            add(f"--{name.replace('_', '-')}", type=kind, default=None, help=f"default {parameter.default!r}")
    add("--validation", default=None, type=_literal, help="'auto', a share, a number of rows, 'none' or 'test'")


def _first(annotation: str) -> str:
    kinds = [k.strip() for k in annotation.split("|")]
    return "str" if "str" in kinds else kinds[0]


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1", "yes")


def _pair(text: str, flag: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{flag} {text!r}: write NAME=VALUE")
    return name, _literal(value)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    sys.exit(main())
