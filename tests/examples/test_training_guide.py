"""docs/training-guide.md: its Python and its commands run, and make its figures."""

import re
import subprocess
import sys

import matplotlib
import pytest
from support.examples import ROOT, environment
from support.guide import GUIDE, commands_of, read_sections, run_python

TEXT = GUIDE.read_text()
SECTIONS = read_sections()
FIGURES = set(re.findall(r"\]\(figures/([\w-]+\.svg)\)", TEXT))
COMMITTED = ROOT / "docs" / "figures"


@pytest.fixture
def checkout(tmp_path):
    """A folder with the examples and no figure yet."""
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def run_guide(folder, *arguments):
    settings = environment()
    settings["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    command = [sys.executable, "-m", "support.guide", *arguments]
    done = subprocess.run(command, env=settings, cwd=folder, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.name for path in (folder / "docs" / "figures").iterdir()}
    assert all(("</svg>" in (folder / "docs" / "figures" / name).read_text()) for name in made)
    return made, done.stdout


def made_by(language):
    blocks = [code for blocks in SECTIONS.values() for kind, code, _ in blocks if kind == language]
    names = re.findall(r'^save\(figure, "([\w-]+)"\)|docs/figures/([\w-]+)\.svg', "\n".join(blocks), re.MULTILINE)
    return {f"{one or other}.svg" for one, other in names if one or other}


def test_the_python_runs_prints_what_is_said_and_makes_its_figures(checkout):
    made, output = run_guide(checkout, "python")
    assert made == made_by("python")
    assert output.splitlines() == list(SECTIONS)[1:]


def test_the_optimizers_equations_hold_for_the_kernels(take_path):
    take_path(True)
    (blocks,) = [blocks for title, blocks in SECTIONS.items() if title.endswith("Optimizers")]
    names = {}
    with matplotlib.rc_context():
        run_python(next(iter(SECTIONS.values())), names)
        run_python(blocks, names)


def with_torch(blocks):
    """fastnn's Sequential and optimizers replaced by torch's."""
    names = ("fastnn.nn.Sequential", "nn.Sequential"), ("fastnn.optim", "torch.optim"), ("import fastnn\n", "")
    for old, new in names:
        blocks = [(kind, code.replace(old, new) if kind == "python" else code, line) for kind, code, line in blocks]
    return blocks


def python_of(blocks):
    return "".join(code for kind, code, _ in blocks if kind == "python")


OURS_ALONE = re.compile(r"fastnn|\bl1=|max_grad_norm=")  # what torch has nothing for
OF_BOTH = [
    title for title in SECTIONS if (code := python_of(with_torch(SECTIONS[title]))) and not OURS_ALONE.search(code)
]


@pytest.mark.parametrize("title", OF_BOTH)
def test_nothing_but_the_import_changes(title, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    names = {}
    with matplotlib.rc_context():
        run_python(with_torch(SECTIONS["Before you start"]), names)
        run_python(with_torch(SECTIONS[title]), names)
    names["plt"].close("all")
    assert "fastnn" not in names


def test_most_sections_are_torchs_as_well():
    assert {title.partition(".")[0] for title in OF_BOTH} == {"1", "2", "4", "6", "7", "10", "11"}


@pytest.mark.parametrize("title", [title for title, blocks in SECTIONS.items() if commands_of(blocks)])
def test_the_commands_run(checkout, title):
    made, output = run_guide(checkout, "console", title.partition(".")[0])
    commands = "\n".join(commands_of(SECTIONS[title]))
    assert made == {f"{name}.svg" for name in re.findall(r"docs/figures/([\w-]+)\.svg", commands)}
    if "final recipe" in title:
        accuracies = dict(re.findall(r"^(torch\.nn|fastnn\.nn) +([\d.]+)", output, re.MULTILINE))
        assert accuracies.keys() == {"torch.nn", "fastnn.nn"}
        assert min(map(float, accuracies.values())) >= 97


def test_what_is_printed_is_compared():
    with pytest.raises(AssertionError, match="instead of"):
        run_python([("python", "print(1)\n", 1), ("text", "2\n", 4)], {})


def test_every_figure_is_made_committed_and_small():
    committed = {path.name: path.stat().st_size for path in COMMITTED.iterdir()}
    assert committed.keys() == FIGURES == made_by("python") | made_by("console")
    assert sum(committed.values()) < 500_000


def test_links_and_the_install_command_lead_somewhere():
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in SECTIONS}
    assert set(re.findall(r"\(#([\w-]+)\)", TEXT)) == anchors
    for target in re.findall(r"\]\((\.\./[^)#]+)\)", TEXT):
        assert (GUIDE.parent / target).exists(), target
    assert 'pip install -e ".[examples]"' in TEXT
    assert re.search(r'^test = \["fastnn\[examples\]"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
