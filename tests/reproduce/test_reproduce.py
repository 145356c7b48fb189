"""Tables of papers: every cell is a run that can be planned; a run is not repeated."""

import dataclasses
import json
import re

import pytest

from kdtoolkit import cli
from kdtoolkit.methods.factory import list_methods
from kdtoolkit.pipeline.distill import distill
from kdtoolkit.reproduce.cells import choose_cells, find_tables, read_tables
from kdtoolkit.reproduce.run import Budget, read_results, run_cells
from kdtoolkit.reproduce.show import mean_and_deviation

TABLES = read_tables()
CELLS = [(t, c) for t in TABLES.values() for c in t.cells]
# one cell of each method and set of options, as networks and data change nothing in it
DISTINCT = {
    (t.document, json.dumps({k: v for k, v in c.settings.items() if k not in ("teacher", "student",
    "train_data", "lr")}, sort_keys=True, default=str)): (t, c)
    for t, c in CELLS
    if not c.missing
}  # fmt: skip


def test_every_table_of_the_documents_is_there():
    expected = {
        "srkd": ["table1", "table2", "table3", "table4", "figure7"],
        "dcl": ["table1", "table2", "table3", "figures2-3"],
        "dkel": ["table1-cifar10", "table1-cifar100", "table2", "table3", "table4", "figure6"],
        "survey": ["table1"],
    }
    wanted = {f"{document}:{name}" for document, names in expected.items() for name in names}
    assert wanted <= set(TABLES)


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda t: t.key)
def test_published_values_are_accuracies_and_rows_that_are_missing_say_why(table):
    for cell in table.cells:
        assert set(cell.published) <= set(table.metrics)
        for value in cell.published.values():
            assert re.fullmatch(r"\d\d\.\d\d(±0\.\d\d)?", value)
        method = cell.settings.get("method")
        assert bool(cell.missing) == (
            method not in (None, *list_methods()) or "names no teacher" in cell.missing
        )


def test_a_number_of_each_document():
    def published(key, row, column):
        (cell,) = choose_cells(TABLES[key], row, column)
        return cell.published["top1"]

    assert published("srkd:table1", "srkd", "resnet56-resnet20") == "71.84"
    assert published("srkd:table4", "stage3+2+1", None) == "71.83"
    assert published("dkel:table1-cifar100", "dkel", "resnet32") == "74.83±0.12"
    assert published("dkel:table3", "decoupled", "cifar100") == "74.67"
    assert published("dcl:table1", "dcl", "wrn16_4") == "69.32"
    assert published("survey:table1", "sp", None) == "93.14"


@pytest.mark.parametrize("key", DISTINCT, ids=lambda key: key[0])
def test_cells_can_be_planned(key):
    table, cell = DISTINCT[key]
    settings = dict(cell.settings)
    small = {"student": "cifar_resnet8", "train_data": "cifar10"}
    if settings.get("teacher") is not None:
        small["teacher"] = "cifar_resnet14"
    plan = distill(**{"teacher": None} | settings | small, dry_run=True).plan
    assert f"{settings['epochs']} epochs" in str(plan), table.key


def test_networks_of_the_tables_can_be_planned():
    pairs = {(c.settings.get("teacher"), c.settings["student"]) for _, c in CELLS if not c.missing}
    for teacher, student in sorted(pairs, key=str):
        method = "none" if teacher is None else "srkd"
        distill(teacher, student, "cifar10", method=method, dry_run=True)


def test_protocols_of_dcl():
    names = ("dcl:table1", "dcl:table1-released")
    paper, released = (TABLES[name].cells[0].settings for name in names)
    wrn = choose_cells(TABLES["dcl:table1"], "dcl", "wrn16_4")[0].settings
    assert (wrn["optimizer"], wrn["lr"], wrn["weight_decay"]) == ("nesterov", 0.1, 1e-4)
    assert paper["lr"] == 0.001 and paper["gamma"] == 0.1  # a pre-trained network
    assert released["lr"] == 0.001 and released["gamma"] == 0.2


def test_cells_are_trained_once_with_their_teacher(tmp_path, capsys, digits_table):
    budget = Budget(epochs=1, rows=96, seeds=2, output=tmp_path)
    run_cells({digits_table: digits_table.cells}, budget)
    results = sorted(tmp_path.rglob("seed*.json"))
    assert len(results) == 2 + 2 * 2  # two seeds of the teacher and of two cells that learn
    teacher = next(p for p in results if "teachers" in p.parts)
    assert (teacher.with_suffix("") / "student/model.safetensors").exists()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    run_cells({digits_table: digits_table.cells}, budget)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    (kd,) = choose_cells(digits_table, "kd", None)
    assert len(read_results(digits_table, kd, budget)) == 2
    same = dataclasses.replace(budget, settings={"num_workers": 0})  # changes no number
    assert len(read_results(digits_table, kd, same)) == 2
    # numbers of another teacher, precision or budget are not these
    others = {"teacher": str(teacher)}, {"settings": {"mixed_precision": "bf16"}}, {"rows": 64}
    for other in others:
        assert not read_results(digits_table, kd, dataclasses.replace(budget, **other))
    (alone,) = choose_cells(digits_table, "alone", None)  # it has no teacher
    given = dataclasses.replace(budget, teacher=str(teacher))
    assert len(read_results(digits_table, alone, given)) == 2


@pytest.fixture
def digits_table(monkeypatch, tmp_path):
    """Two cells on digits, in a document of the user's own folder."""
    from kdtoolkit.reproduce import cells

    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "own.yaml").write_text(
        """
protocols:
  short: {epochs: 3, batch_size: 32, lr: 0.05, validation: none, num_workers: 0, progress: "off",
    report_to: none, allow_weak_teacher: true}
tables:
  table1:
    title: digits
    protocol: short
    settings: {train_data: digits}
    columns:
      pair: {teacher: cifar_resnet14, student: cifar_resnet8}
    rows:
      teacher: {settings: {network: teacher}}
      alone: {settings: {method: none}, published: [50.0]}
      kd: {settings: {method: kd}}
      future: {settings: {method: nowhere}}
""",
        encoding="utf-8",
    )
    monkeypatch.setattr(cells, "TABLES", tmp_path / "tables")
    (table,) = cells.read_tables().values()
    return table


def test_command_lists_plans_and_shows(capsys, tmp_path, digits_table):
    assert cli.main(["reproduce"]) == 0
    assert "own:table1" in capsys.readouterr().out
    assert cli.main(["reproduce", "own:table1", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:3]] == ["planned"] * 3
    assert "the method 'nowhere' is not there yet" in lines[3]
    folder = str(tmp_path / "runs")
    assert cli.main(["reproduce", "own:table1", "--show", "--output", folder]) == 0
    shown = capsys.readouterr().out
    assert "50.00" in shown and "not yet run" in shown and "3 epochs" in shown
    budget = ["--epochs", "1", "--rows", "64", "--row", "alone", "--output", folder]
    assert cli.main(["reproduce", "own", *budget]) == 0
    assert "at a smaller budget, 1 epoch, 64 training rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["srkd:tabel1"], "no table 'srkd:tabel1'"),
        (["srkd:table1", "--row", "srdk"], "has no row 'srdk'; did you mean 'srkd'"),
        (["srkd:table1", "--column", "x"], "has no column 'x'"),
        (["srkd", "--seeds", "0"], "seeds is 0"),
        (["srkd", "--epochs", "-1"], "epochs is -1"),
    ],
)
def test_command_says_what_is_wrong(words, message, capsys):
    assert cli.main(["reproduce", *words]) == 1
    assert message in capsys.readouterr().err


def test_find_tables_of_a_document():
    assert {t.document for t in find_tables("dkel")} == {"dkel"}


def test_mean_and_deviation():
    assert mean_and_deviation([], "top1") == "not yet run"
    assert mean_and_deviation([{"top1": 50.0}], "top1") == "50.00"
    assert mean_and_deviation([{"top1": 50.0}, {"top1": 52.0}], "top1") == "51.00 ± 1.41"
