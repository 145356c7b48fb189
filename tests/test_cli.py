"""The command: flags and their types, help, recipes, exit codes; each call in this process."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from kdtoolkit import cli, distill, list_methods

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = "--student cifar_resnet8 --data digits --train-limit 64 --batch-size 32 --progress false --report-to none".split()


@pytest.fixture
def said(monkeypatch):
    """`train` with flags -> what distill() would get."""

    def call(*flags):
        heard = {}

        def listen(teacher, student, train_data, **given):
            heard.update(given, teacher=teacher, student=student, train_data=train_data)

        listen.__signature__, listen.__doc__ = inspect.signature(distill), distill.__doc__
        monkeypatch.setattr(cli, "distill", listen)
        assert cli.main(["train", "--student", "cifar_resnet8", *flags]) == 0
        return heard

    return call


VALUES = [
    ("--num-workers 2", {"num_workers": 2}),
    ("--num-workers auto", {"num_workers": "auto"}),
    ("--resume true", {"resume": True}),
    ("--resume FALSE", {"resume": False}),
    ("--resume runs/x", {"resume": "runs/x"}),
    ("--channels-last false", {"channels_last": False}),
    ("--progress false --progress auto", {"progress": "auto"}),
    ("--overwrite true --compile false", {"overwrite": True, "compile": False}),
    ("--lr 1 --epochs 3", {"lr": 1.0, "epochs": 3}),
    ("--output-dir 7 --report-to true", {"output_dir": "7", "report_to": "true"}),
    ("--validation 0.2", {"validation": 0.2}),
    ("--validation 20", {"validation": 20}),
    ("--validation none --baseline true", {"validation": "none", "baseline": True}),
    ("--transforms crop-flip", {"transforms": "crop-flip"}),
    ("--milestones 0.3 0.6", {"milestones": [0.3, 0.6]}),
    ("--eval-data PATH --data digits", {"eval_data": "PATH", "train_data": "digits"}),
    (
        "--student-arg shortcut=B --student-arg a=2",
        {"student_args": {"shortcut": "B", "a": 2}, "teacher_args": None},
    ),
    ("--teacher-arg deep=false", {"teacher_args": {"deep": False}}),
    ("--layers 2:3 --layers layer2:blocks.4", {"layers": [(2, 3), ("layer2", "blocks.4")]}),
    ("--layers=-1:-2 --layers layer2:both[1]", {"layers": [(-1, -2), ("layer2", "both[1]")]}),
    (
        "--loss ce=1 --loss kd=0.5 --option detach=False",
        {"losses": {"ce": 1, "kd": 0.5}, "detach": False},
    ),
    ("--teacher a b", {"teacher": ["a", "b"]}),
    ("--teacher a", {"teacher": "a"}),
    ("--method srkd", {"method": "srkd"}),
    ("--freeze 2 --layer-decay 0.75", {"freeze": 2, "layer_decay": 0.75}),
    ("--freeze backbone", {"freeze": "backbone"}),
    ("--freeze conv1,layer1", {"freeze": "conv1,layer1"}),
    (
        "--student-weights a.pth --teacher-weights b.pth",
        {"student_weights": "a.pth", "teacher_weights": "b.pth"},
    ),
    ("--teacher-head finetune --teacher-dir 7", {"teacher_head": "finetune", "teacher_dir": "7"}),
    (
        "--teacher-training epochs=3 --teacher-training lr=0.1",
        {"teacher_training": {"epochs": 3, "lr": 0.1}},
    ),
]


@pytest.mark.parametrize(("flags", "given"), VALUES, ids=[flags for flags, _ in VALUES])
def test_flags_become_values_of_the_right_type(said, flags, given):
    heard = said(*flags.split())
    assert {k: heard[k] for k in given} == given
    assert all(type(heard[k]) is type(v) for k, v in given.items())


def test_flags_left_out_leave_the_defaults(said):
    named = "teacher student train_data method losses student_args teacher_args dry_run".split()
    named += ["teacher_training"]
    assert set(said()) == set(named)


@pytest.mark.parametrize(
    "flag", ["--overwrite maybe", "--epochs many", "--lr x", "--milestones a", "--grad-accum 1.5"]
)
def test_values_of_the_wrong_type_are_refused(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *TINY, *flag.split()])
    assert f"argument {flag.split()[0]}: " in capsys.readouterr().err


def test_help_tells_the_meaning_of_the_flags(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    for command in ("train", "plan"):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
    text = capsys.readouterr().out
    flags = set(re.findall(r"^  --([a-z-]+)", text, re.MULTILINE))
    beyond = {
        "train_data",
        "losses",
        "dry_run",
        "student_args",
        "teacher_args",
    }  # under other names
    beyond |= {"accelerator", "callbacks", "method_options"}  # a shell cannot say them
    assert {
        name.replace("_", "-") for name in set(inspect.signature(distill).parameters) - beyond
    } <= flags
    assert re.search(r"--temperature TEMPERATURE\s+of KD, no unit.*\(default 4.0\)", text)
    assert re.search(r"--validation VALIDATION\s.*10 %.*\(default 'auto'\)", text)


def test_meanings_go_over_several_lines_and_names():
    table = "Train.\n\na, b   one\n       two\nlong_name three: 5 %\n\nRaises it."
    assert cli._meanings(table) == {
        "a": "one two",
        "b": "one two",
        "long_name": "three: 5 %",
        "Raises": "it.",
    }


def test_methods_are_listed(capsys):
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_methods()


def test_plan_reads_nothing_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--student cifar_resnet8 --teacher cifar_resnet20 --method fitnet --layers 2:3 --num-workers 2".split()
    assert cli.main(["plan", *flags]) == 0
    assert "cifar_resnet20" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_train_with_flags_of_each_kind(tmp_path):
    flags = "--method none --max-steps 2 --lr 0.01 --scheduler multistep --milestones 0.5 --channels-last false"
    flags += " --num-workers 0 --resume auto --validation none --student-arg shortcut=B --log-every 1 --overwrite false"
    assert cli.main(["train", *TINY, *flags.split(), "--output-dir", str(tmp_path / "run")]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    told = {
        "channels_last": False,
        "num_workers": 0,
        "progress": False,
        "milestones": [0.5],
        "max_steps": 2,
    }
    assert {k: config[k] for k in told} == told and config["student_args"] == {"shortcut": "B"}
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size and (
        tmp_path / "run" / "student"
    ).is_dir()
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["schedule"]["lr"] == 0.01


# --- recipes


@pytest.mark.parametrize("call", [["run"], ["run", "-h"], ["run", "--help"]], ids=" ".join)
def test_run_lists_the_recipes(call, capsys):
    assert cli.main(call) == 0
    out = capsys.readouterr().out
    for path in RECIPES.glob("*.py"):
        first = path.read_text().splitlines()[0].strip('"')
        assert re.search(rf"^  {path.stem} +{re.escape(first)}$", out, re.MULTILINE)


def test_help_of_a_recipe_shows_its_flags_and_their_comments(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", "srkd_digits", "--help"])
    assert "--teacher-epochs" in (out := capsys.readouterr().out)
    assert "training images of the students, the same for both (default 400)" in out


def test_a_script_shows_the_comments_of_the_class_it_parses(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    script = tmp_path / "own.py"
    script.write_text('''"""Own."""
from dataclasses import dataclass
from kdtoolkit.recipe import parse
@dataclass
class Other:
    rate: float = 1.0  # not this
@dataclass
class Config:
    rate: float = 2.0  # that, 5 %
class Later:
    rate: float = 1.0  # nor this
print("rate is", parse(Config, __doc__).rate)
''')
    assert cli.main(["run", str(script), "--rate", "3"]) == 0
    assert capsys.readouterr().out == "rate is 3.0\n"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", str(script), "-h"])
    assert "that, 5 % (default 2.0)" in capsys.readouterr().out


def test_recipe_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["before"])
    tiny = "--rows 100 --epochs 1 --teacher-epochs 1 --teacher cifar_resnet8".split()
    assert cli.main(["run", "srkd_digits", *tiny, "--output", str(tmp_path)]) == 0
    assert (
        "student alone" in capsys.readouterr().out
        and (tmp_path / "distilled" / "report.md").is_file()
    )
    assert sys.argv == ["before"]


def test_recipes_beside_the_caller_are_found(tmp_path, capsys, monkeypatch):
    (tmp_path / "recipes").mkdir()
    shutil.copy(RECIPES / "train_teacher.py", tmp_path / "recipes" / "mine.py")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run"]) == 0
    assert "\n  mine " in capsys.readouterr().out


# --- exit codes

ERRORS = {
    "unknown recipe": ("run srkd_digit", "no recipe 'srkd_digit'; did you mean 'srkd_digits'"),
    "unknown data": (
        "plan --student cifar_resnet8 --method none --data cifar",
        "Did you mean 'cifar10' or 'cifar100'",
    ),
    "unknown student": (
        "plan --student cifar_resnt8 --method none",
        "unknown model 'cifar_resnt8'",
    ),
    "unknown option": (
        "plan --student cifar_resnet8 --teacher cifar_resnet20 --option detech=1",
        "detech",
    ),
    "flag as an option": (
        "plan --student cifar_resnet8 --option lr=1",
        "it is no option of a method but an argument of its own: write --lr 1",
    ),
    "pair": (
        "train --student cifar_resnet8 --student-arg a",
        "--student-arg 'a': write NAME=VALUE",
    ),
    "layers": ("plan --student cifar_resnet8 --layers 2", "--layers '2': write STUDENT:TEACHER"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_and_code_1(case, capsys):
    call, message = ERRORS[case]
    assert cli.main(call.split()) == 1
    err = capsys.readouterr().err
    assert err.startswith("kdtoolkit: ") and err.count("\n") == 1 and message in err
    with pytest.raises(ValueError, match=re.escape(message)):
        cli.main(["--traceback", *call.split()])


def test_ctrl_c_is_code_130(capsys, tmp_path):
    script = tmp_path / "stopped.py"
    script.write_text("raise KeyboardInterrupt")
    assert cli.main(["run", str(script)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
