"""docs/differences.md: each of its lines is of torch and fastnn, has a name of its own, and names tests there are."""

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "differences.md"
NAME = re.compile(r"^- \*\*([a-z0-9-]+)\*\*: ")
LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")


@functools.cache
def tests_of(path: Path) -> set[str]:
    """The tests that pytest collects from a file."""
    if not path.is_file() or not path.name.startswith("test_"):
        return set()
    functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    return {function.name for function in functions if function.name.startswith("test_")}


def lines_of(page: str) -> list[str]:
    """What stands under headings, each line of the list with those that go on with it."""
    found: list[str] = []
    for line in page[page.index("\n## ") :].splitlines():
        if not line or line.startswith(("## ", "<!--")):
            continue
        if line.startswith("  ") and found:
            found[-1] += " " + line.strip()
        else:
            found.append(line)
    return found


def complaints(page: str) -> list[str]:
    found, names = [], Counter[str]()
    for line in lines_of(page):
        named = NAME.match(line)
        if named is None:
            found.append(f"no name: {line}")
            continue
        name, links = named[1], LINK.findall(line)
        names[name] += 1
        found += [f"{name}: no {word}" for word in ("torch", "fastnn") if word not in LINK.sub("", line)]
        if not links:
            found.append(f"{name}: no test")
        for test, target in links:
            if test not in tests_of((PAGE.parent / target).resolve()):
                found.append(f"{name}: no {test} in {target}")
    return found + [f"{name}: twice" for name, count in names.items() if count > 1]


def test_every_line_names_its_tests():
    page = PAGE.read_text()
    assert complaints(page) == []
    assert len(lines_of(page)) > 70


def test_readme_leads_there():
    assert "](docs/differences.md)" in (ROOT / "README.md").read_text()


HERE = "[test_every_line_names_its_tests](../tests/test_differences.py)"


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (f"- **a**: torch and fastnn. {HERE}", []),
        (f"- **a**: torch and\n  fastnn.\n  {HERE}", []),
        ("- **a**: torch and fastnn.", ["a: no test"]),
        (f"- torch and fastnn. {HERE}", [f"no name: - torch and fastnn. {HERE}"]),
        ("torch and fastnn differ.", ["no name: torch and fastnn differ."]),
        (f"- **a**: torch and fastnn. {HERE}\n- **a**: fastnn and torch. {HERE}", ["a: twice"]),
        (f"- **a**: fastnn alone. {HERE}", ["a: no torch"]),
        ("- **a**: torch and fastnn. [test_x](../tests/test_house.py)", ["a: no test_x in ../tests/test_house.py"]),
        ("- **a**: torch and fastnn. [complaints](../tests/test_differences.py)",
         ["a: no complaints in ../tests/test_differences.py"]),
        ("- **a**: torch and fastnn. [test_x](../tests/test_none.py)", ["a: no test_x in ../tests/test_none.py"]),
    ],
)  # fmt: skip
def test_a_wrong_page_is_caught(lines, complaint):
    assert complaints(f"# Page\n\nWords.\n\n## Heading\n\n{lines}\n") == complaint
