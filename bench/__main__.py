"""``python -m bench [FILE ...]``: results as figures, and as the block of README between its two markers."""

import argparse
import os
import sys
from pathlib import Path

try:
    from matplotlib.figure import Figure
except ImportError:
    sys.exit('python -m bench: error: figures need matplotlib: pip install -e ".[bench]"')

from bench import figures, page, report, results
from bench.report import Run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    files = sorted(path for path in results.FOLDER.glob("*.json") if ".partial" not in path.name)
    every = "default: all of bench/results"
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", default=files, help=every)
    parser.add_argument("--readme", type=Path, default=results.ROOT / "README.md")
    parser.add_argument("--figures", type=Path, default=results.FOLDER / "figures", metavar="FOLDER")
    return parser.parse_args(arguments)


def shown(path: Path, run: Run, args: argparse.Namespace) -> tuple[list[str], dict[Path, Figure]]:
    """A run's part of README, and its figures by where they go; ValueError if a row lacks what its kind has."""
    try:
        drawn = {args.figures / f"{path.stem}-{name}.svg": figure for name, figure in figures.draw(*run).items()}
        addresses = {
            page.title_of(figure): Path(os.path.relpath(where, args.readme.parent)).as_posix()
            for where, figure in drawn.items()
        }
        return report.section(*run, addresses), drawn
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds a row or machine that is incomplete: {error!r}") from error


def write(args: argparse.Namespace) -> list[Path]:
    """Draws and writes; the paths of what it wrote. Nothing is written if an input is wrong."""
    if not args.files:
        raise ValueError(f"no results in {results.FOLDER}: run pytest bench first")
    if len({path.stem for path in args.files}) < len(args.files):
        raise ValueError("two files of one name would draw the same figures")
    runs = {path: results.load(path) for path in args.files}
    empty = [str(path) for path, (_, rows) in runs.items() if not rows]
    if empty:
        raise ValueError(f"no rows in {', '.join(empty)}")
    parts = [shown(path, run, args) for path, run in runs.items()]
    lines = [*report.awaited(list(runs.values())), *(line for section, _ in parts for line in section)]
    drawn = {where: figure for _, figures_of_run in parts for where, figure in figures_of_run.items()}
    readme = report.replaced(args.readme.read_text(), lines, args.readme)
    args.figures.mkdir(parents=True, exist_ok=True)
    for path, figure in drawn.items():
        page.save(figure, path)
    args.readme.write_text(readme)
    return [*drawn, args.readme]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        written = write(args)
    except (OSError, ValueError) as error:
        sys.exit(f"python -m bench: error: {error}")
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
