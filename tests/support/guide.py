"""The blocks of docs/training-guide.md, and what runs them.

    PYTHONPATH=.:tests python -m support.guide             # all of it, from the checkout's root: writes docs/figures
    PYTHONPATH=.:tests python -m support.guide python 6    # one section's Python

A section's Python runs after that of *Before you start*, in names of its own. A block of `text` is what the Python
before it prints. Each line of a `console` block that begins with `$ ` is a command.
"""

import contextlib
import io
import subprocess
import sys
from typing import Any

from support.examples import ROOT, environment

GUIDE = ROOT / "docs" / "training-guide.md"
Block = tuple[str, str, int]  # language, code and the line it begins in


def read_sections() -> dict[str, list[Block]]:
    """Blocks by the section's title; those before the first one are left out."""
    sections: dict[str, list[Block]] = {}
    fence, start, lines = "", 0, []  # type: ignore[var-annotated]
    for number, line in enumerate(GUIDE.read_text().splitlines(), 1):
        if line.startswith("```"):
            if fence and sections:
                [*sections.values()][-1].append((fence, "\n".join(lines) + "\n", start))
            fence, start, lines = "" if fence else line[3:] or "plain", number, []
        elif fence:
            lines.append(line)
        elif line.startswith("## "):
            sections[line[3:]] = []
    return sections


def run_python(blocks: list[Block], names: dict[str, Any]) -> None:
    """Raises AssertionError where what is printed is not what the guide says."""
    printed = ""
    for language, code, line in blocks:
        if language == "python":
            written = io.StringIO()
            with contextlib.redirect_stdout(written):
                exec(compile("\n" * line + code, str(GUIDE), "exec"), names)
            printed = written.getvalue()
        elif language == "text":
            assert printed == code, f"line {line} of the guide: printed\n{printed}instead of\n{code}"


def commands_of(blocks: list[Block]) -> list[str]:
    lines = [line for language, code, _ in blocks if language == "console" for line in code.splitlines()]
    return [line[2:] for line in lines if line.startswith("$ ")]


def main(kind: str = "all", *chosen: str) -> None:
    sections = read_sections()
    setup = next(iter(sections.values()))
    for title, blocks in list(sections.items())[1:]:
        if chosen and not title.startswith(tuple(f"{number}." for number in chosen)):
            continue
        print(title, flush=True)
        if kind in ("all", "python"):
            names: dict[str, Any] = {"__name__": "guide"}
            run_python(setup, names)
            run_python(blocks, names)
            names["plt"].close("all")
        if kind in ("all", "console"):
            for command in commands_of(blocks):
                print(f"$ {command}", flush=True)
                warnings = {} if command.startswith("python") else {"PYTHONWARNINGS": ""}  # TensorBoard's own
                subprocess.run(command, shell=True, check=True, env=environment() | warnings)


if __name__ == "__main__":
    main(*sys.argv[1:])
