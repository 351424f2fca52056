"""The tables of docs/performance.md from committed results: python -m bench.tables bench/results/*.jsonl [--write PAGE]

Prints Markdown; --write puts it between the two marks of the page instead.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from bench import goals
from cramfast.errors import UserError, command
from cramfast.runtime.jsonfile import dumps

BEGIN, END = "<!-- tables: written by python -m bench.tables -->", "<!-- end of tables -->"
NAMED_PEERS = ("eager", "torch.compile")  # with a column of their own; the others share one


def read(path: Path) -> list[dict]:
    """Rows of one results file.

    Raises:
        UserError: a file that is missing, or a line that is no JSON.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        remedy = "give the file that a benchmark wrote as its --results"
        raise UserError(f"{path}: unreadable ({error.strerror}) — {remedy}") from None
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: damaged JSON ({error}) — remove the line, or measure again") from None
    return rows


def append(path: Path, *rows: Mapping) -> None:
    """Add lines to a results file; none: make sure, before anything is measured, that lines can be added.

    Raises:
        UserError: a folder, or a place that cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as out:
            out.writelines(dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"--results {path}: cannot be written ({error.strerror}) — name another file") from None


def grid(header: Iterable[str], rows: Iterable[Iterable[str]], left: int) -> str:
    """A Markdown table whose first `left` columns are text and whose others are numbers."""
    header = list(header)
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def machine(row: Mapping) -> str:
    """One line on where a file's rows come from."""
    where = f"{row['device']}, {row['threads']} threads, {row['isa']}"
    if "gpu" in row:
        clocks = f", {row['sm_mhz']} MHz" if "sm_mhz" in row else ""
        where = f"{row['gpu']} ({row['capability']}{clocks}), driver {row.get('driver', '?')}, CUDA {row['cuda']}"
    return f"{where}; torch {row['torch']}, Python {row['python']}"


def _times(row: Mapping | None) -> str:
    if row is None:
        return ""
    return row.get("fault", "failed") if row["ms"] is None else f"{row['ours_speedup']:.2f}×"


def operators(rows: Iterable[Mapping]) -> str:
    """One line an operator, shape and dtype: our time, how close to the machine's peaks, and every peer's ratio."""
    cases: dict[tuple, dict[str, Mapping]] = {}
    for row in rows:
        place = (row["op"], row.get("label") or row["shape"], row["dtype"])
        cases.setdefault(place, {})[row["implementation"]] = row
    lines = []
    for place, found in cases.items():
        ours = found.get("ours", {"ms": None})
        others = [f"{name} {_times(row)}" for name, row in found.items() if name not in ("ours", *NAMED_PEERS)]
        time = "tests red" if ours["ms"] is None else f"{ours['ms']:.3g}"
        peaks = [
            "" if ours.get(key) is None else f"{ours[key]:.0f}" for key in ("percent_of_copy", "percent_of_matmul")
        ]
        named = [_times(found.get(name)) for name in NAMED_PEERS]
        lines.append((*place, ", ".join(others), time, *peaks, *named))
    header = ("operator", "shape", "dtype", "other peers", "ours, ms", "% copy", "% matmul", *NAMED_PEERS)
    return grid(header, lines, left=4)


def steps(rows: Iterable[Mapping]) -> str:
    """One line a system."""
    lines = []
    for row in rows:
        size = f"{row['layers']} × {row['width']}, length {row['sequence_len']}"
        if "fault" in row:
            lines.append((row["system"], size, row["fault"], *[""] * 5))
            continue
        phases = ", ".join(f"{name} {ms:.1f}" for name, ms in row["phases_ms"].items())
        faster = "" if row["system"] == "cramfast" else f"{row['ours_speedup']:.2f}×"
        percents = [f"{row[key]:.1f}" if key in row else "" for key in ("mfu", "launch_gaps")]
        memory = f"{row['peak_bytes'] / 1e9:.2f}"
        lines.append((row["system"], size, phases, f"{row['tokens_per_s']:,.0f}", faster, memory, *percents))
    header = ("system", "model", "ms a step by phase", "useful tokens/s", "ours is", "peak GB", "MFU, %", "gaps, %")
    used = 8 if any(line[6] for line in lines) else 6  # a CPU has neither
    return grid(header[:used], [line[:used] for line in lines], left=3)


def goals_table(rows: Iterable[Mapping]) -> str:
    """Every goal for a GPU: reached or missed by how much, or not measured."""
    lines = [(v.goal.what, v.goal.text(), v.case or v.goal.place(), v.text()) for v in goals.verdicts(rows)]
    return grid(("what", "goal", "where", "measured"), lines, left=4)


def markdown(paths: Iterable[Path]) -> str:
    """All tables, one section a file, the goals first."""
    parts, judged = [], []
    for path in sorted(paths):
        # Other implementations of ours are there for bench.choose, not for this page.
        rows = [row for row in read(path) if row.get("kernels", "cpp") == "cpp"]
        if not rows:
            continue
        of_steps = "system" in rows[0]
        judged += goals.step_rows(rows) if of_steps else rows
        title = "The whole step" if of_steps else "Operators, forward + backward"
        parts.append(f"### {title}\n\n`{path.name}`: {machine(rows[0])}\n\n{(steps if of_steps else operators)(rows)}")
    return "\n\n".join([f"### Goals on a GPU\n\n{goals_table(judged)}", *parts])


def written(page: str, tables: str) -> str:
    """The page with the tables between its marks.

    Raises:
        UserError: the marks are missing.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise UserError(f"the page needs one line {BEGIN!r} and one line {END!r}")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="files of pytest bench/ and bench.step --results")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="Markdown page with marks for the tables")
    options = parser.parse_args()
    tables = markdown(options.results)
    if options.write is None:
        print(tables)
        return
    options.write.write_text(written(options.write.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    command(main)
