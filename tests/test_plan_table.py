"""What fastnn.tune keeps on disk: where, what of it is taken, and that processes do not lose each other's."""

import json
import os
from pathlib import Path

import pytest
import torch
from support.processes import without_interpreter

from fastnn import plan_table, plans

CPU = torch.device("cpu")
WELL = {plans.Problem("linear", 8, 6, 5, 2, "half", "none", False): {"apply": 1.0}}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTNN_CACHE_DIR", str(tmp_path / "cache"))


def test_where_the_folder_is(monkeypatch, tmp_path):
    assert plan_table.folder() == tmp_path / "cache"
    monkeypatch.delenv("FASTNN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan_table.folder() == tmp_path / "fastnn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plan_table.folder() == tmp_path / ".cache" / "fastnn"


def table_file():
    path = plan_table.path_of(plan_table.identity(CPU))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def row_with(**changes):
    ((problem, times),) = WELL.items()
    row = {**problem._asdict(), "microseconds": times}
    return {name: value for name, value in (row | changes).items() if value is not None}


def text_of(*rows, **changes):
    return json.dumps({"format": 1, "machine": plan_table.identity(CPU), "problems": list(rows)} | changes)


CORRUPT = {
    "empty": lambda: "",
    "cut off": lambda: text_of(row_with())[:-20],
    "no table": lambda: "[1, 2]",
    "another format": lambda: text_of(format=2),
    "another machine": lambda: text_of(machine={"device": "another"}),
    "no rows": lambda: text_of(problems=3),
    "row of another kind": lambda: text_of([1]),
    "missing field": lambda: text_of(row_with(norm=None)),
    "field of another type": lambda: text_of(row_with(M="8")),
    "bool for a size": lambda: text_of(row_with(M=True)),
    "unknown rule": lambda: text_of(row_with(rule="fast")),
    "plan of another rule": lambda: text_of(row_with(microseconds={"columns": 1.0})),
    "no plan": lambda: text_of(row_with(microseconds={})),
    "no time": lambda: text_of(row_with(microseconds={"apply": "1"})),
    "negative time": lambda: text_of(row_with(microseconds={"apply": -1.0})),
    "time beyond any float": lambda: text_of(row_with(microseconds={"apply": 10**400})),
    "brackets without end": lambda: "[" * 100_000,
    "NaN": lambda: text_of(row_with(microseconds={"apply": float("nan")})),
}


def test_a_file_that_is_well_is_read_as_it_is():
    table_file().write_text(text_of(row_with()))
    assert plan_table.load(plan_table.identity(CPU)) == (WELL, "")


@pytest.mark.parametrize("case", CORRUPT)
def test_what_is_corrupt_or_foreign_is_not_taken_and_replaced(case):
    path, machine = table_file(), plan_table.identity(CPU)
    path.write_text(CORRUPT[case]())
    table, complaint = plan_table.load(machine)
    assert table == {}
    assert complaint.startswith(f"{path} is not taken: ")
    assert plan_table.store(machine, WELL) == ""
    assert plan_table.load(machine) == (WELL, "")


def test_bytes_that_are_no_text_are_not_taken():
    table_file().write_bytes(b"\xff\xfe\x00")
    table, complaint = plan_table.load(plan_table.identity(CPU))
    assert table == {}
    assert "is not taken" in complaint


def test_what_is_stored_is_added():
    machine = plan_table.identity(CPU)
    assert plan_table.load(machine) == ({}, "")
    more = {next(iter(WELL))._replace(M=16): {"epilogue": 2.0, "apply": 3.0}}
    assert plan_table.store(machine, WELL) == plan_table.store(machine, more) == ""
    assert plan_table.load(machine) == (WELL | more, "")


def test_a_write_that_fails_leaves_the_file_and_nothing_else(monkeypatch):
    path, machine = table_file(), plan_table.identity(CPU)
    path.write_text(text_of(row_with()))
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    assert "full" in plan_table.store(machine, {})
    assert path.read_text() == text_of(row_with())
    assert {file.suffix for file in path.parent.iterdir()} == {".json", ".lock"}


def test_ten_processes_on_one_file_lose_nothing():
    assert without_interpreter(Path(__file__).with_name("tuning_processes.py")) == [0] * 10
    (path,) = Path(os.environ["FASTNN_CACHE_DIR"]).glob("*.json")
    rows = json.loads(path.read_text())["problems"]
    assert sorted(row["N"] for row in rows) == list(range(8, 18))
