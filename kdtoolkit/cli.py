"""The command: `kdtoolkit run | plan | methods`."""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdtoolkit.core.registries import METHODS
from kdtoolkit.data.presets import PRESETS
from kdtoolkit.methods.factory import list_methods
from kdtoolkit.pipeline.distill import distill
from kdtoolkit.utils.registry import suggestion


def main(argv: list[str] | None = None) -> int:
    """Entry point; the process's exit code. An error is one line, `--traceback` shows where it came from."""
    parser = argparse.ArgumentParser(
        "kdtoolkit", description="Knowledge distillation for any timm model."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="run | plan | train | methods")
    runner = commands.add_parser(
        "run", help="run a recipe: a name in recipes/ or a path to a script", add_help=False
    )
    runner.add_argument(
        "-h", "--help", action="store_true"
    )  # before a recipe: the list; behind it: its flags
    runner.add_argument("recipe", nargs="?")
    runner.add_argument("flags", nargs=argparse.REMAINDER)
    runner.set_defaults(do=_run)
    for name, dry, text in (
        (
            "plan",
            True,
            "print taps, shapes, adapters, losses and parameters without weights or data",
        ),
        ("train", False, "one distill() call from flags"),
    ):
        command = commands.add_parser(name, help=text)
        _add_flags(command)
        command.set_defaults(do=_distill, dry=dry)
    commands.add_parser(
        "methods", help="list the methods, their losses and default weights"
    ).set_defaults(do=_methods)
    args = parser.parse_args(argv)
    try:
        args.do(args)
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if args.traceback:
            raise
        print(f"kdtoolkit: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    known = _recipes()
    if args.recipe is None or args.help:
        print(
            "usage: kdtoolkit run RECIPE [--help | flags of the recipe]; RECIPE is a path to a script, or one of:\n"
        )
        for name, path in known.items():
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"  {name:16} {doc.partition(chr(10))[0]}")
        return
    script = Path(args.recipe) if Path(args.recipe).is_file() else known.get(args.recipe)
    if script is None:
        names = ", ".join(known) or "none found here"
        raise ValueError(
            f"no recipe {args.recipe!r}{suggestion(args.recipe, known)}; give a path or one of: {names}"
        )
    before, sys.argv = sys.argv, [str(script), *args.flags]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before


def _recipes() -> dict[str, Path]:
    """Name -> script: of the clone that this file lies in, and of recipes/ here, which comes first."""
    folders = Path(__file__).parents[1] / "recipes", Path("recipes")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.py"))}


def _distill(args: argparse.Namespace) -> None:
    own = "do dry traceback loss option student_arg teacher_arg teacher_training layers".split()
    given = {k: v for k, v in vars(args).items() if v is not None and k not in own}
    options = _pairs(args.option, "--option")
    taken = next((name for name in options if name in inspect.signature(distill).parameters), None)
    if taken:
        flag = f"--{taken.replace('_', '-')} {options[taken]}"
        raise ValueError(
            f"--option {taken}: it is no option of a method but an argument of its own: write {flag}"
        )
    if args.layers:
        given["layers"] = [_layers(text) for text in args.layers]
    teacher = given.pop("teacher", None)
    result = distill(
        teacher[0] if teacher and len(teacher) == 1 else teacher, given.pop("student"), given.pop("data"),
        losses=_pairs(args.loss, "--loss") or None, student_args=_pairs(args.student_arg, "--student-arg") or None,
        teacher_args=_pairs(args.teacher_arg, "--teacher-arg") or None,
        teacher_training=_pairs(args.teacher_training, "--teacher-training") or None,
        dry_run=args.dry, **given, **options,
    )  # fmt: skip
    if args.dry:
        print(result.plan)


def _methods(args: argparse.Namespace) -> None:
    for name in list_methods():
        recipe = METHODS[name]
        rising = {n: getattr(w, "weight", w) for n, w in recipe.losses.items()}
        terms = {
            n: f"{rising[n]:g}" + ("" if w == rising[n] else "↑") for n, w in recipe.losses.items()
        }
        weights = " + ".join(f"{weight} {loss}" for loss, weight in terms.items())
        print(f"{name:10} {weights:28} {recipe.title}")


# --------------------------------------------------------------------------------------------------------------- flags
KINDS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
BY_HAND = "teacher student train_data eval_data method layers losses dry_run student_args teacher_args".split()
BY_HAND += ["teacher_training"]
SAYABLE = {
    "transforms": "str",
    "validation": "float | int | str",
    "baseline": "bool | str",
}  # of those of any type


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each argument of distill() that a shell can say."""
    add = parser.add_argument
    repeat: dict[str, Any] = {"action": "append", "default": []}
    add(
        "--teacher",
        nargs="+",
        help="timm name, local-dir:PATH, hf-hub:ID, PATH.safetensors; or several of them",
    )
    add("--student", required=True, help="timm name or local-dir:PATH")
    add(
        "--data",
        default="digits",
        help=f"preset ({', '.join(PRESETS)}), Hub name or folder (default 'digits')",
    )
    add("--eval-data", help="the test set, like --data (default: the test split of --data)")
    add("--method", default="kd", help="a name that `kdtoolkit methods` lists (default 'kd')")
    add("--loss", **repeat, metavar="NAME=WEIGHT", help="replaces the method's own sum; repeat it")
    add("--option", **repeat, metavar="NAME=VALUE", help="of a loss, e.g. detach=False; repeat it")
    add(
        "--layers",
        **repeat,
        metavar="S:T",
        help="student tap and teacher tap, stages or modules (write --layers=-1:-1); repeat it",
    )
    add(
        "--student-arg",
        **repeat,
        metavar="NAME=VALUE",
        help="of the student's constructor; repeat it",
    )
    add(
        "--teacher-arg",
        **repeat,
        metavar="NAME=VALUE",
        help="of the teacher's constructor; repeat it",
    )
    add(
        "--teacher-training",
        **repeat,
        metavar="NAME=VALUE",
        help="of its fine-tuning, e.g. epochs=3; repeat it",
    )
    meanings = _meanings(inspect.getdoc(distill) or "")
    for name, parameter in inspect.signature(distill).parameters.items():
        allowed = [kind.strip() for kind in SAYABLE.get(name, str(parameter.annotation)).split("|")]
        many = "Sequence[float]" in allowed
        if name not in BY_HAND and (many or {"bool", *KINDS} & set(allowed)):
            told = meanings.get(name, "")
            if not told or (
                parameter.default is not None and f"default {parameter.default}" not in told
            ):
                told = f"{told} (default {parameter.default!r})".lstrip()
            kind, shape = (float, "+") if many else (_parser(allowed), None)
            add(
                f"--{name.replace('_', '-')}",
                type=kind,
                nargs=shape,
                default=None,
                help=told.replace("%", "%%"),
            )


def _meanings(table: str) -> dict[str, str]:
    """Argument -> meaning, from lines "name   text" and the deeper ones that go on from them."""
    found: dict[str, str] = {}
    for names, text in re.findall(r"^(\w+(?:, \w+)*)[ ]+(.+(?:\n[ ]+.+)*)", table, re.MULTILINE):
        found = {name: " ".join(text.split()) for name in names.split(", ")} | found
    return found


def _parser(allowed: list[str]) -> Callable[[str], Any]:
    """Text -> a value of one of the allowed types, the narrowest that fits."""
    numbers = [KINDS[kind] for kind in ("int", "float") if kind in allowed]
    if allowed[0] in KINDS and not {"bool", "str"} & set(allowed) and len(numbers) == 1:
        return numbers[0]  # argparse names the type in its message

    def parse(text: str) -> Any:
        if "bool" in allowed and text.lower() in ("true", "false"):
            return text.lower() == "true"
        for number in numbers:
            with contextlib.suppress(ValueError):
                return number(text)
        if "str" not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
        return text

    return parse


def _layers(text: str) -> tuple[int | str, int | str]:
    student, colon, teacher = text.partition(":")
    if not (student and colon and teacher):
        raise ValueError(f"--layers {text!r}: write STUDENT:TEACHER, e.g. 2:3 or layer2:layer3")
    numbers = [int(tap) if tap.removeprefix("-").isdecimal() else tap for tap in (student, teacher)]
    return numbers[0], numbers[1]


def _pairs(texts: list[str], flag: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"{flag} {text!r}: write NAME=VALUE")
        found[name] = {"true": True, "false": False}.get(value.lower(), _literal(value))
    return found


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    sys.exit(main())
