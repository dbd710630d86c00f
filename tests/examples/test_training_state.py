"""Checkpoints of examples/digits.py: interrupted anywhere and resumed, training ends with the same weights."""

import pathlib
import signal
import subprocess
import sys
import time

import digits
import pytest
import runs
import torch
from support.examples import ROOT, environment

SCRIPT = str(ROOT / "examples" / "digits.py")
SMALL = ["--hidden", "8", "--batch-size", "628", "--epochs", "3", "--device", "cpu", "--dropout", "0.5"]
SMALL += ["--noise", "0.1", "--shift", "1"]


@pytest.fixture
def main(call, monkeypatch):
    """digits.py without its figure: exit code, lines of error."""
    monkeypatch.setattr(digits, "draw", lambda *_: None)

    def called(*arguments):
        torch.manual_seed(int(torch.initial_seed()) + 1)  # nothing is owed to the state that another run left
        code, _, error = call(digits, *SMALL, *arguments)
        return code, error

    return called


def content(path):
    return torch.load(path, weights_only=True)


def assert_same(one, other):
    """To the bit, in all but the milliseconds."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"ms", "--checkpoint"}:
            assert_same(one[key], other[key])
    else:
        assert one == other


def interrupt_at(monkeypatch, owner, name, number, before=True):
    """Ctrl-C in that call of the function, counted from 0."""
    function, calls = getattr(owner, name), iter(range(1000))

    def interrupted(*args, **kwargs):
        if next(calls) == number:
            if not before:
                function(*args, **kwargs)
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(
    ("interpreted", "settings"),
    [
        (False, ["--optimizer", "adamw", "--schedule", "onecycle"]),
        (False, ["--optimizer", "nesterov", "--schedule", "plateau", "--patience", "1"]),
        (False, ["--optimizer", "nadam", "--schedule", "multiplicative", "--clip-norm", "1", "--l1", "1e-4"]),
        (True, ["--optimizer", "nadam", "--schedule", "multiplicative", "--clip-norm", "1", "--l1", "1e-4"]),
    ],
)
def test_interrupted_at_any_epoch_and_resumed_is_the_same_to_the_bit(
    main, take_path, monkeypatch, tmp_path, settings, interpreted
):
    """At the end of each epoch's steps, before it is kept; on the eager path and by the kernels."""
    take_path(interpreted)
    assert main(*settings, "--checkpoint", "whole.pt") == (0, [])
    whole = content(tmp_path / "whole.pt")
    assert whole["finished"]
    trained = sum(len(state["history"]["loss"]) for state in whole["runs"].values())
    for epoch in range(trained) if not interpreted else (1, trained - 1):
        path = tmp_path / f"{epoch}.pt"
        with monkeypatch.context() as patch:
            interrupt_at(patch, digits, "evaluate", epoch)
            code, (line,) = main(*settings, "--checkpoint", path.name)
        assert code == 130
        assert ("--resume" in line) == path.exists() == (epoch > 0)
        if epoch:
            assert sum(len(state["history"]["loss"]) for state in content(path)["runs"].values()) == epoch
            assert main(*settings, "--checkpoint", path.name, "--resume") == (0, [])
            assert_same(whole, content(path))


@pytest.mark.parametrize(("name", "before"), [("save", True), ("save", False)])
def test_an_interrupt_while_a_checkpoint_is_written_leaves_the_one_before(main, monkeypatch, tmp_path, name, before):
    with monkeypatch.context() as patch:
        interrupt_at(patch, runs.torch, name, 2, before)
        code, (line,) = main()
    assert code == 130
    assert "--resume" in line
    assert [len(state["history"]["loss"]) for state in content(tmp_path / "digits.pt")["runs"].values()] == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["digits.pt"]


def test_a_finished_checkpoint_resumes_to_the_report_alone(main, monkeypatch, tmp_path):
    assert main() == (0, [])
    before = content(tmp_path / "digits.pt")
    monkeypatch.setattr(digits, "train", None)
    assert main("--resume") == (0, [])
    assert_same(before, content(tmp_path / "digits.pt"))
    assert before["finished"]


def test_a_new_run_replaces_a_finished_one(main, tmp_path):
    assert main() == (0, [])
    assert main("--lr", "0.01") == (0, [])
    assert content(tmp_path / "digits.pt")["settings"]["--lr"] == 0.01


def unfinished(main, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, digits, "evaluate", 2)
        assert main()[0] == 130


def damaged(path):
    path.write_bytes(path.read_bytes()[:-1000])


def of_another_kind(path):
    path.write_text("not a checkpoint")


def with_code(path):
    torch.save({"settings": {}, "runs": pathlib.Path(), "finished": False}, path)  # calls what it likes when loaded


def without_an_entry(path):
    kept = content(path)
    del kept["runs"]["adam torch.nn"]["optimizer"]
    torch.save(kept, path)


def of_another_shape(path):
    kept = content(path)
    kept["runs"]["adam torch.nn"]["model"]["0.weight"] = torch.zeros(9, 64)
    torch.save(kept, path)


def with_another_rate(path):
    kept = content(path)
    kept["settings"]["--lr"] = 0.5
    torch.save(kept, path)


def of_a_model(path):
    torch.save({"0.weight": torch.zeros(8, 64)}, path)


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (damaged, ["--resume"], "digits.pt is no checkpoint, or a damaged one"),
        (of_another_kind, ["--resume"], "digits.pt is no checkpoint, or a damaged one"),
        (of_another_kind, [], "digits.pt is no checkpoint, or a damaged one"),
        (with_code, ["--resume"], "digits.pt is no checkpoint, or a damaged one"),
        (of_a_model, ["--resume"], "digits.pt is no checkpoint of this program"),
        (without_an_entry, ["--resume"], "digits.pt does not fit"),
        (of_another_shape, ["--resume"], "size mismatch for 0.weight"),
        (None, ["--resume", "--hidden", "16"], "was made with --hidden [8], not [16]"),
        (None, ["--resume", "--lr", "0.1"], "was made with --lr its default, not 0.1"),
        (with_another_rate, ["--resume"], "was made with --lr 0.5, not its default"),
        (None, [], "digits.pt holds an unfinished run"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_left_as_it_is(main, monkeypatch, tmp_path, change, arguments, words):
    unfinished(main, monkeypatch)
    path = tmp_path / "digits.pt"
    if change:
        change(path)
    before = path.read_bytes()
    code, (line,) = main(*arguments)
    assert code == 2
    assert "argument --checkpoint: " in line
    assert words in line
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_in_a_terminal(main, eager, tmp_path):
    """A signal to a process on the eager path, resumed by what the line says."""
    arguments = [*SMALL, "--epochs", "60", "--optimizer", "adamw"]
    command = [sys.executable, SCRIPT, *arguments, "--checkpoint", "cut.pt"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), cwd=tmp_path, **pipes) as process:
        while not (tmp_path / "cut.pt").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = error.splitlines()
    assert "cut.pt has the last whole epoch" in line
    again = line.partition("Go on: ")[2].split()
    assert again == ["python", SCRIPT, *arguments, "--checkpoint", "cut.pt", "--resume"]
    assert not content(tmp_path / "cut.pt")["finished"]
    assert main(*again[2:]) == (0, [])
    assert main(*arguments, "--checkpoint", "whole.pt") == (0, [])
    assert_same(content(tmp_path / "whole.pt"), content(tmp_path / "cut.pt"))
