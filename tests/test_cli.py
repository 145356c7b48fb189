"""The command: options and their types, help, recipes, exit codes; each call in this process."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kdtoolkit import cli, list_methods
from kdtoolkit.pipeline.config import FIELD_NAMES, DistillConfig

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = (
    "--student cifar_resnet8 --data digits --train-limit 64 --batch-size 32 --progress off "
    "--report-to none"
).split()

VALUES = [
    ("--num-workers 2", {"num_workers": 2}),
    ("--num-workers auto", {"num_workers": "auto"}),
    ("--resume true", {"resume": True}),
    ("--resume FALSE", {"resume": False}),
    ("--resume auto", {"resume": "auto"}),
    ("--resume runs/x", {"resume": "runs/x"}),
    ("--channels-last false", {"channels_last": False}),
    ("--progress false", {"progress": False}),
    ("--overwrite --compile", {"overwrite": True, "compile": True}),
    ("--no-overwrite", {"overwrite": False}),
    ("--lr 1 --epochs 3", {"lr": 1.0, "epochs": 3}),
    ("--output-dir 7 --report-to none", {"output_dir": "7", "report_to": "none"}),
    ("--report-to tensorboard wandb", {"report_to": ["tensorboard", "wandb"]}),
    ("--validation 0.2", {"validation": 0.2}),
    ("--validation 20", {"validation": 20}),
    ("--validation none --baseline true", {"validation": "none", "baseline": True}),
    ("--transforms crop-flip", {"transforms": "crop-flip"}),
    ("--milestones 0.3 0.6", {"milestones": (0.3, 0.6)}),
    ("--eval-data PATH --data digits", {"eval_data": "PATH", "train_data": "digits"}),
    ("--student-args shortcut=B a=2", {"student_args": {"shortcut": "B", "a": 2}}),
    ("--teacher-args deep=false", {"teacher_args": {"deep": False}}),
    ("--layers 2:3 layer2:blocks.4", {"layers": [(2, 3), ("layer2", "blocks.4")]}),
    ("--layers=-1:-2", {"layers": [(-1, -2)]}),
    ("--layers auto", {"layers": "auto"}),
    ("--losses ce=1 kd=0.5", {"losses": {"ce": 1, "kd": 0.5}}),
    ("--loss ce=1 kd=0.5", {"losses": {"ce": 1, "kd": 0.5}}),
    ("--options detach=False reset=[2,3]", {"options": {"detach": False, "reset": [2, 3]}}),
    ("--teacher a b", {"teacher": ["a", "b"]}),
    ("--teacher a", {"teacher": "a"}),
    ("--method srkd", {"method": "srkd"}),
    ("--method at srkd", {"method": ["at", "srkd"]}),
    ("--freeze 2 --layer-decay 0.75", {"freeze": 2, "layer_decay": 0.75}),
    ("--freeze backbone", {"freeze": "backbone"}),
    ("--freeze conv1,layer1", {"freeze": "conv1,layer1"}),
    ("--student-weights a.pth", {"student_weights": "a.pth"}),
    ("--teacher-weights b.pth", {"teacher_weights": "b.pth"}),
    ("--teacher-head finetune --teacher-dir 7", {"teacher_head": "finetune", "teacher_dir": "7"}),
    ("--teacher-training epochs=3 lr=0.1", {"teacher_training": {"epochs": 3, "lr": 0.1}}),
    ("--labelled 0.5", {"labelled": 0.5}),
    ("--mixed-precision bf16 --keep all", {"mixed_precision": "bf16", "keep": "all"}),
]


@pytest.mark.parametrize(("flags", "wanted"), VALUES, ids=[flags for flags, _ in VALUES])
def test_options_become_values_of_the_right_type(flags, wanted):
    config, path = cli.parse_config(["--student", "cifar_resnet8", *flags.split()], "train")
    values = config.flat()
    assert path is None and {k: values[k] for k in wanted} == wanted
    assert all(type(values[k]) is type(v) for k, v in wanted.items())


def test_options_left_out_leave_the_defaults():
    config, _ = cli.parse_config(["--student", "cifar_resnet8"], "train")
    assert config == DistillConfig.from_keywords(student="cifar_resnet8")


@pytest.mark.parametrize("flag", [
    "--overwrite maybe", "--epochs many", "--lr x", "--milestones a", "--grad-accum 1.5",
    "--scheduler cos", "--keep some", "--layers 2", "--student-args a", "--lrr 1",
])  # fmt: skip
def test_values_of_the_wrong_type_are_refused(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *TINY, *flag.split()])
    err = capsys.readouterr().err
    assert flag.split()[0].lstrip("-") in err or flag.split()[1] in err


def test_help_shows_every_field_with_its_meaning_in_groups(capsys):
    for command in ("train", "plan"):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
    text = capsys.readouterr().out
    flags = set(re.findall(r"--([a-z][a-z0-9-]+)", text))
    assert {name.replace("_", "-") for name in FIELD_NAMES} <= flags
    for group in ("networks", "data", "loss", "optim", "loop", "output"):
        assert f"{group} options" in text
    words = " ".join(text.replace("│", " ").split())
    assert "Softening of probabilities, no unit." in words
    assert "{cosine,multistep,onecycle,linear,constant}" in words and "--no-overwrite" in words


def test_help_and_the_list_of_commands_need_no_torch():
    code = (
        "import sys; from kdtoolkit import cli; cli.main([{!r}]); sys.exit('torch' in sys.modules)"
    )
    for word in ("--help", "run"):
        subprocess.run([sys.executable, "-c", code.format(word)], check=True, capture_output=True)


def test_shell_completion(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--tyro-print-completion", "bash"])
    assert "--train-limit" in capsys.readouterr().out


def test_a_configuration_file_is_read_first(tmp_path):
    (tmp_path / "c.yaml").write_text("student: cifar_resnet8\nmethod: none\nlr: 0.3\nepochs: 4\n")
    path = str(tmp_path / "c.yaml")
    config, found = cli.parse_config(["--config", path, "--lr", "0.1"], "train")
    assert found == path
    assert config == DistillConfig.from_keywords(
        student="cifar_resnet8", method="none", lr=0.1, epochs=4
    )


def test_train_from_the_file_that_a_run_left(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = "--method none --max-steps 2 --lr 0.01 --num-workers 0 --log-every 1".split()
    assert cli.main(["train", *TINY, *flags, "--output-dir", str(one)]) == 0
    assert cli.main(["train", "--config", str(one / "config.yaml"), "--output-dir", str(two)]) == 0
    rows = [
        [json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()]
        for d in (one, two)
    ]
    losses = [[row["loss"] for row in run if row["event"] == "train"] for run in rows]
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_methods_are_listed_with_their_sums(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["methods"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [name for name in names if name in list_methods()] == list_methods()


def test_a_method_is_shown_with_its_options(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["methods", "srkd", "dkel"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("reset", "detach", "branches", "rampup"))
    assert cli.main(["methods", "srkdd"]) == 1
    assert "did you mean 'srkd'" in capsys.readouterr().err


@pytest.mark.parametrize("name", list_methods())
def test_every_option_of_every_method_has_a_meaning(name):
    from kdtoolkit.pipeline.method_table import method_options

    without = [option.name for option in method_options(name) if not option.meaning]
    assert not without, f"{name}: give these an entry in Args: {without}"


def test_plan_reads_nothing_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--student cifar_resnet8 --teacher cifar_resnet20 --method fitnet --layers 2:3"
    assert cli.main(["plan", *flags.split(), "--data", "cifar10", "--num-workers", "2"]) == 0
    assert "cifar_resnet20" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_train_with_options_of_each_kind(tmp_path):
    flags = (
        "--method none --max-steps 2 --lr 0.01 --scheduler multistep --milestones 0.5 "
        "--channels-last false --num-workers 0 --resume auto --validation none "
        "--student-args shortcut=B --log-every 1 --no-overwrite"
    )
    assert cli.main(["train", *TINY, *flags.split(), "--output-dir", str(tmp_path / "run")]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["loop"]["channels_last"] is False and config["data"]["num_workers"] == 0
    assert config["optim"]["milestones"] == [0.5] and config["optim"]["max_steps"] == 2
    assert config["networks"]["student_args"] == {"shortcut": "B"}
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert (tmp_path / "run" / "student").is_dir()
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["schedule"]["lr"] == 0.01


# ------------------------------------------------------------------------------------- recipes
@pytest.mark.parametrize("call", [["run"], ["run", "-h"], ["run", "--help"]], ids=" ".join)
def test_run_lists_the_recipes(call, capsys):
    assert cli.main(call) == 0
    out = capsys.readouterr().out
    for path in RECIPES.glob("*.py"):
        first = path.read_text().splitlines()[0].strip('"')
        assert re.search(rf"^  {path.stem} +{re.escape(first)}$", out, re.MULTILINE)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.py")))
def test_help_of_a_recipe_shows_its_options_and_their_comments(recipe, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", recipe, "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    script = (RECIPES / f"{recipe}.py").read_text().partition("class Config:")[2]
    script = script.partition("\n\n\n")[0]
    fields = re.findall(r"^    (\w+): \S+.*? = [^#\n]*(?:# (.*))?$", script, re.MULTILINE)
    assert len(fields) > 8
    for name, comment in fields:
        assert f"--{name.replace('_', '-')}" in words
        assert " ".join(comment.split()) in words


def test_recipe_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["before"])
    tiny = "--rows 100 --epochs 1 --teacher-epochs 1 --teacher cifar_resnet8".split()
    assert cli.main(["run", "srkd_digits", *tiny, "--output", str(tmp_path)]) == 0
    assert "student alone" in capsys.readouterr().out
    assert (tmp_path / "distilled" / "report.md").is_file()
    assert sys.argv == ["before"]


def test_recipes_beside_the_caller_are_found(tmp_path, capsys, monkeypatch):
    (tmp_path / "recipes").mkdir()
    shutil.copy(RECIPES / "train_teacher.py", tmp_path / "recipes" / "mine.py")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run"]) == 0
    assert "\n  mine " in capsys.readouterr().out


# ---------------------------------------------------------------------------------- exit codes
ERRORS = {
    "unknown command": ("trian", "unknown command 'trian'; did you mean 'train'"),
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
        "plan --student cifar_resnet8 --teacher cifar_resnet20 --options detech=1",
        "detech",
    ),
    "field as an option": (
        "plan --student cifar_resnet8 --options lr=1",
        "it is no option of a method but an option of its own: write --lr 1",
    ),
    "config": ("train --config nothing.yaml", "there is no configuration file nothing.yaml"),
    "config without a path": ("train --config", "give the path of a YAML file"),
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


@pytest.mark.parametrize(
    "name, code, said",
    [("SIGINT", 130, "Ctrl-C"), ("SIGTERM", 143, "SIGTERM"), ("SIGHUP", 129, "SIGHUP")],
)
def test_a_signal_is_its_exit_code_and_a_line(name, code, said, capsys, tmp_path):
    number = signal.Signals[name]
    before = signal.signal(number, signal.default_int_handler)  # under nohup it would be ignored
    script = tmp_path / "stopped.py"
    script.write_text(f"import signal; signal.raise_signal(signal.{name})")
    try:
        assert cli.main(["run", str(script)]) == code
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == f"kdtoolkit: stopped by {said}\n"
