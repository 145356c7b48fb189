"""The command `kdtoolkit`: train, plan, methods, run, reproduce.

Options are defined in kdtoolkit/pipeline/config.py; their help texts are the docstrings there.
torch is imported when a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import ast
import contextlib
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from kdtoolkit.pipeline.config import FIELD_NAMES, DistillConfig
from kdtoolkit.pipeline.shell_values import ShellValue
from kdtoolkit.utils.quiet_exit import show
from kdtoolkit.utils.registry import suggestion
from kdtoolkit.utils.signals import Interrupted, interrupt_on_stop_signals

EXIT_CODE_OF_CTRL_C = 130
USAGE = """usage: kdtoolkit COMMAND [options]

Knowledge distillation for any timm model.

commands:
  train      one distillation from options, or from a configuration file (--config FILE.yaml)
  plan       print taps, shapes, adapters, losses and parameters; no weights are loaded
  methods    list the methods, or show one with its options: kdtoolkit methods NAME
  run        run a recipe: kdtoolkit run RECIPE [its options]; without a name it lists them
  reproduce  run cells of papers' tables: kdtoolkit reproduce srkd:table1 --row srkd

options:
  -h, --help     show this message; kdtoolkit COMMAND --help shows the options of a command
  --traceback    show where an error came from

Shell completion: kdtoolkit train --tyro-print-completion bash | zsh | tcsh"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Words behind `kdtoolkit`. Default: those of the process.

    Returns:
        Exit code: 0; 1 after an error, which is one line; 130 after Ctrl-C, 143 after SIGTERM, 129
        after SIGHUP.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = words[:1] == ["--traceback"]
    words = words[1:] if traceback else words
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        with interrupt_on_stop_signals():
            _call(*words)
    except Interrupted as stopped:
        show(stopped)
        return stopped.exit_code
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "interrupted", file=sys.stderr)
        return EXIT_CODE_OF_CTRL_C
    except (ValueError, OSError, RuntimeError) as error:
        if traceback:
            raise
        if not getattr(error, "is_shown", False):
            message = " ".join(str(error).split())
            print(f"kdtoolkit: {_rank()}{message}", file=sys.stderr)
        return 1
    return 0


def _call(name: str, *options: str) -> None:
    command = COMMANDS.get(name)
    if command is None:
        hint = suggestion(name, COMMANDS) or "."
        raise ValueError(f"unknown command {name!r}{hint} Known: {', '.join(COMMANDS)}")
    command(options)


def _rank() -> str:
    """Where a run has several processes: which one says so."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    return "" if ranks == "1" else f"rank {os.environ.get('RANK', '?')} of {ranks}: "


# ------------------------------------------------------------------------------- train and plan
def parse_config(words: Sequence[str], command: str) -> tuple[DistillConfig, str | None]:
    """The configuration of command-line options.

    Args:
        words: Options, as `--epochs 3`; `--config FILE` is read first, and the options replace its
            values.
        command: "train" or "plan", for `--help`.

    Returns:
        The configuration, and the path of its file.
    """
    words = _with_plain_names(words)
    words, path = _take_config_file(words)
    default = DistillConfig()
    if path is not None:
        from kdtoolkit.pipeline.config_file import read_config

        default = read_config(path)
    with _shell_values():
        config = tyro.cli(
            DistillConfig,
            args=words,
            default=default,
            prog=f"kdtoolkit {command}",
            description=DESCRIPTIONS[command],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
        )
    _check_options(config)
    return config, path


DESCRIPTIONS = {
    "train": "Train a student. --config FILE.yaml reads a configuration, such as the "
    "config.yaml that a run leaves; options replace its values.",
    "plan": "Print what would be compared with what, through which adapter, with which weight: "
    "no weights are loaded; data is opened unless it is a built-in name such as 'cifar10'.",
}
SHORT_NAMES = {  # of options
    "--data": "--train-data",
    "--loss": "--losses",
    "--option": "--options",
    "--student-arg": "--student-args",
    "--teacher-arg": "--teacher-args",
}


def _with_plain_names(words: Sequence[str]) -> list[str]:
    """Short names of options written out."""
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        found.append(SHORT_NAMES.get(name, name) + equals + value)
    return found


def _take_config_file(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The words without `--config FILE`, and FILE."""
    rest: list[str] = []
    path: str | None = None
    remaining = iter(words)
    for word in remaining:
        if word == "--config":
            path = next(remaining, None)
            if path is None:
                raise ValueError("--config: give the path of a YAML file or of a run's folder")
        elif word.startswith("--config="):
            path = word.partition("=")[2]
        else:
            rest.append(word)
    return rest, path


@contextlib.contextmanager
def _shell_values() -> Any:
    """Let tyro read the values of several types as `ShellValue` says."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        kind = info.type
        if not (isinstance(kind, type) and issubclass(kind, ShellValue)):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*" if kind.many else 1,
            metavar=kind.metavar,
            instance_from_str=kind.parse,
            is_instance=lambda value: True,
            str_from_instance=kind.show,
        )

    with registry:
        yield


def _check_options(config: DistillConfig) -> None:
    """An option of a method that is a field of the configuration is a mistake."""
    for name, value in (config.loss.options or {}).items():
        if name in FIELD_NAMES:
            flag = f"--{name.replace('_', '-')} {value}"
            raise ValueError(
                f"--options {name}: it is no option of a method but an option of its own: write "
                f"{flag}"
            )


def _train(words: Sequence[str]) -> None:
    config, path = parse_config(words, "train")
    _distill(config, path, dry_run=False)


def _plan(words: Sequence[str]) -> None:
    config, path = parse_config(words, "plan")
    print(_distill(config, path, dry_run=True).plan)


def _distill(config: DistillConfig, path: str | None, *, dry_run: bool) -> Any:
    from kdtoolkit.pipeline.config_file import read_callbacks
    from kdtoolkit.pipeline.run import run_distillation

    callbacks = [] if path is None else read_callbacks(path)
    return run_distillation(config, callbacks=callbacks, dry_run=dry_run)


# -------------------------------------------------------------------------------------- methods
def _methods(words: Sequence[str]) -> None:
    if words and words[0] in ("-h", "--help"):
        print("usage: kdtoolkit methods [NAME ...]   all methods, or some with their options")
        return
    from kdtoolkit.pipeline.method_table import print_method, print_methods

    if not words:
        print_methods()
    for name in words:
        print_method(name)


# ------------------------------------------------------------------------------------------ run
def _run(words: Sequence[str]) -> None:
    known = _recipes()
    if not words or words[0] in ("-h", "--help"):
        print(
            "usage: kdtoolkit run RECIPE [--help | options of the recipe]; RECIPE is a path to a "
            "script, or one of:\n"
        )
        width = max(map(len, known), default=0)
        for name, path in known.items():
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"  {name:{width}} {doc.partition(chr(10))[0]}")
        return
    recipe, *options = words
    script = Path(recipe) if Path(recipe).is_file() else known.get(recipe)
    if script is None:
        names = ", ".join(known) or "none found here"
        raise ValueError(
            f"no recipe {recipe!r}{suggestion(recipe, known)}; give a path or one of: {names}"
        )
    before, sys.argv = sys.argv, [str(script), *options]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before


def _recipes() -> dict[str, Path]:
    """Name -> script, of this clone and of recipes/ in the current folder, which comes first."""
    folders = Path(__file__).parents[1] / "recipes", Path("recipes")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.py"))}


def _reproduce(words: Sequence[str]) -> None:
    from kdtoolkit.reproduce.command import reproduce

    reproduce(words)


COMMANDS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "plan": _plan,
    "methods": _methods,
    "run": _run,
    "reproduce": _reproduce,
}

if __name__ == "__main__":
    sys.exit(main())
