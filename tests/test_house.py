"""The structure: who may import whom, file sizes, packaging, and README and CI running the same commands."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import fastnn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()
# What each part of the package may import of it: itself and what is below.
LAYERS = {
    "activations": set(),
    "kernels": set(),
    "reference": {"activations"},
    "seeds": {"dispatch"},
    "dispatch": {"kernels"},
    "costs": {"dispatch", "kernels"},
    "plans": {"costs", "dispatch", "kernels"},
    "specs": {"dispatch", "kernels"},
    "recipes": {"specs", "plans", "dispatch", "kernels", "memory"},
    "ops": {"recipes", "specs", "memory", "plans", "dispatch", "reference", "kernels"},
    "synchronised": {"ops", "recipes", "specs", "memory", "seeds", "dispatch", "reference", "kernels"},
    "functional": {"synchronised", "ops", "memory", "seeds", "plans", "dispatch", "reference", "activations"},
    "runs": {"functional", "activations", "reference"},
    "nodes": {"runs"},
    "rewriting": {"nodes", "runs", "functional"},
    "tracing": set(),
    "fuse": {"tracing", "rewriting", "runs"},
    "compile": {"rewriting"},
    "memory": set(),
    "nn": {"runs", "functional", "dispatch", "kernels", "memory"},  # the last three for nn.utils
    "calls": {"functional", "plans", "dispatch"},
    "graph_observation": {"calls", "tracing", "rewriting", "nodes", "functional"},
    "observation": {"graph_observation", "calls", "nn", "runs"},
    "explanation": {"observation", "calls", "plans", "costs", "dispatch"},
    "plan_table": {"plans", "dispatch"},
    "tuning": {"explanation", "observation", "calls", "plan_table", "functional", "plans", "costs", "dispatch"},
    "optim": {"dispatch", "kernels", "memory"},
}
SOURCES = [
    *ROOT.glob("fastnn/*.py"),
    *ROOT.glob("fastnn/nn/*.py"),
    *ROOT.glob("fastnn/optim/*.py"),
    *ROOT.glob("kernels/*.py"),
]


def part_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    if first == "kernels":
        return "kernels"
    return path.relative_to(ROOT / "fastnn").parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of the package a file imports, from its relative and absolute imports."""
    package = (
        ["fastnn", *path.relative_to(ROOT / "fastnn").parts[:-1]] if "fastnn" in path.parts else ["fastnn", "kernels"]
    )
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            names = [name] if name.count(".") else [f"{name}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("fastnn.")}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    assert imported_parts(path) <= LAYERS[part] | {part}


@pytest.mark.parametrize("path", [*ROOT.glob("kernels/*.py")], ids=lambda path: path.name)
def test_kernels_import_torch_triton_and_themselves_only(path):
    standard = {"collections.abc", "dataclasses", "functools", "math", "operator", "struct", "typing"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= {"torch", "triton"} | standard
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 or node.module in standard | {
                "triton.runtime.driver",
                "triton.tools.tensor_descriptor",
            }


def test_files_and_kernels_stay_small():
    for path in [*SOURCES, *ROOT.glob("examples/*.py")]:
        lines = path.read_text().splitlines()
        assert len(lines) <= 310, path
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}:{node.name}"


@pytest.mark.skipif(not (ROOT / "kernels").exists(), reason="an sdist holds the kernels inside the package")
def test_kernels_are_reached_through_the_package_alone():
    link = ROOT / "fastnn" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()  # the bare name belongs to another package


def test_ci_runs_the_readmes_test_commands():
    commands = re.findall(r"^(pip install -e \"\.\[(test|integration)\]\" && pytest.*)$", README, re.MULTILINE)
    assert [extra for _, extra in commands] == ["test", "integration"]
    for command, _ in commands:
        assert re.search(rf"^{re.escape(command)}$", CI, re.MULTILINE), command
    assert re.search(r'^pip install -e "\.\[examples\]" && python examples/digits\.py$', README, re.MULTILINE)


def test_readmes_python_runs():
    """Every python block of the README, one after another, on the eager path."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_version_is_in_the_changelog():
    assert f"## [{fastnn.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_nothing_names_the_machine_it_was_written_on():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and path.suffix in (".py", ".md", ".toml", ""):
            assert not re.search(r"/(root|home)/\w|/tmp/\w", path.read_text(errors="ignore")), name
