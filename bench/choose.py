"""Writes in which order a trial on a GPU takes its candidates: python -m bench.choose RESULTS.jsonl [RESULTS.jsonl ...]

Reads the rows of `pytest bench/ --device cuda --kernels NAME --results RESULTS.jsonl`, run once for each implementation
and once for the floor of stock PyTorch, and updates kernels/measured.json: for every operator, architecture and dtype,
how long each implementation takes relative to the fastest (geometric mean over the shapes). A row counts only when the
tests of its operator passed on that GPU; one red row takes its implementation out.
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path

from cramfast.errors import UserError, command
from cramfast.kernels import dispatch
from cramfast.runtime.jsonfile import dumps

NEEDED = ("op", "shape", "dtype", "kernels", "tests", "capability", "gpu", "torch", "commit")
OF_ALL = ("capability", "gpu", "torch", "commit")  # the same in all rows that are compared


def read_rows(paths: Iterable[Path]) -> list[dict]:
    """The rows of our operators on a GPU: those that name the implementation measured (`kernels`).

    Raises:
        UserError: a file that is missing or damaged, a row without a key that the choice needs.
    """
    rows = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            found = [json.loads(line) for line in lines if line.strip()]
        except OSError as error:
            raise UserError(f"{path}: unreadable ({error.strerror}) — give files of pytest bench/ --results") from None
        except ValueError as error:
            raise UserError(f"{path}: damaged JSON ({error}) — remove the line, or measure again") from None
        for place, row in enumerate(found, 1):
            if row.get("implementation") != "ours" or "capability" not in row:
                continue
            if missing := [key for key in NEEDED if key not in row]:
                raise UserError(f"{path}, row {place}: no {missing[0]!r} — measure again with this version of bench/")
            if row["kernels"] not in dispatch.IMPLEMENTATIONS.get(row["op"], ()):
                raise UserError(f"{path}, row {place}: unknown {row['op']}={row['kernels']} — measure again")
            rows.append(row)
    return rows


def baselines(op: str) -> set[str]:
    """What others have to be faster than, one of them: a form of the floor, or the reference where it was measured."""
    return {"reference", *dispatch.FLOOR.get(op, ("stock",))}


def rank(rows: list[dict]) -> tuple[list[dict], list[str]]:
    """(rows of measured.json, why implementations were left out) from rows of benchmarks.

    Raises:
        UserError: rows of two GPUs, commits or versions of torch for one operator.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["capability"], row["dtype"]), []).append(row)
    ranked, left_out = [], []
    for key, group in sorted(groups.items()):
        for name in OF_ALL:
            if len(values := {row[name] for row in group}) > 1:
                found = " and ".join(sorted(values))
                raise UserError(f"{', '.join(key)}: rows of {name} {found} — compare what was measured together")
        times, reasons = _times(group)
        left_out += [f"{', '.join(key)}: {reason}" for reason in reasons]
        if not baselines(key[0]) & times.keys():
            left_out.append(f"{', '.join(key)}: no row of stock PyTorch with green tests, so nothing to be faster than")
            continue
        means = {name: math.exp(sum(map(math.log, ms.values())) / len(ms)) for name, ms in times.items()}
        fastest = min(means.values())
        place = dict(zip(("op", "architecture", "dtype"), key, strict=True))
        origin = {"device": group[0]["gpu"], "torch": group[0]["torch"], "commit": group[0]["commit"]}
        relative = {name: round(mean / fastest, 3) for name, mean in sorted(means.items(), key=lambda item: item[1])}
        ranked.append(place | {"relative_time": relative} | origin)
    return ranked, left_out


def _times(group: list[dict]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """implementation -> shape -> ms of those that are green and measured on every shape; why the others are not."""
    times: dict[str, dict[str, float]] = {}
    red: dict[str, str] = {}
    for row in group:
        if row["tests"] != "passed" or not row["ms"]:
            red[row["kernels"]] = f"{row['kernels']} left out, its tests were red: {row['tests']}"
        else:
            times.setdefault(row["kernels"], {})[row["shape"]] = row["ms"]
    times = {name: ms for name, ms in times.items() if name not in red}
    shapes = {shape for ms in times.values() for shape in ms}
    partial = [
        f"{name} left out, measured on {len(ms)} of {len(shapes)} shapes"
        for name, ms in times.items()
        if set(ms) != shapes
    ]
    return {name: ms for name, ms in times.items() if set(ms) == shapes}, [*red.values(), *partial]


def update(table: Path, ranked: list[dict]) -> None:
    """Put rows into the table, in place of those with the same operator, architecture and dtype; one row a line."""
    kept = {_key(row): row for row in json.loads(table.read_text(encoding="utf-8"))["rows"]}
    kept |= {_key(row): row for row in ranked}
    lines = ",\n".join(dumps(kept[key]) for key in sorted(kept))
    table.write_text('{"rows": [\n' + lines + "\n]}\n" if kept else '{"rows": []}\n', encoding="utf-8")


def _key(row: dict) -> tuple[str, str, str]:
    return row["op"], row["architecture"], row["dtype"]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.choose", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="files written by pytest bench/ --results")
    parser.add_argument("--table", type=Path, default=dispatch.MEASURED, help="the table to update")
    options = parser.parse_args(arguments)
    ranked, left_out = rank(read_rows(options.results))
    for reason in left_out:
        print(reason)
    if not ranked:
        raise UserError("no row to choose by — see above; benchmarks of a GPU name `kernels` and `tests` in each row")
    update(options.table, ranked)
    for row in ranked:
        times = ", ".join(f"{name} {time:.2f}" for name, time in row["relative_time"].items())
        print(f"{row['op']}, {row['architecture']}, {row['dtype']}: {times}")


if __name__ == "__main__":
    command(main)
