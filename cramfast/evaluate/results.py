"""Where scores go: a JSON file, the run's report and the exported model card."""

from pathlib import Path

from cramfast import report
from cramfast.errors import UserError
from cramfast.evaluate.checkpoints import name_of
from cramfast.evaluate.masked import MaskedModel
from cramfast.hf import modelcard
from cramfast.pages.scoretable import ScoreTable
from cramfast.runtime import atomic
from cramfast.runtime.jsonfile import dumps, read_json
from cramfast.session.record import EVALUATIONS, SCORES_REMEDY, read_record


def path_of(model: MaskedModel, name: str, out: Path | None) -> Path:
    """--out, or RUN/evaluations/NAME.json; for a folder that is no run, ./FOLDER.NAME.json, or ./RUN-hf.NAME.json.

    Raises:
        UserError: `out` is a folder.
    """
    if out is not None:
        if out.is_dir():
            raise UserError(f"--out {out}: a folder — name a file")
        return out
    if model.run_dir is not None:
        return model.run_dir / EVALUATIONS / f"{name}.json"
    return Path(f"{name_of(model.folder).replace('/', '-')}.{name}.json")


def write(path: Path, result: dict, table: ScoreTable) -> None:
    """Write `result` and the table it is shown as.

    Raises:
        UserError: the disk refused.
    """
    write_text(path, dumps(result | {"table": table.to_json()}, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all; a missing folder is made.

    Raises:
        UserError: the disk refused.
    """
    try:
        atomic.write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}) — choose another --out") from None


def earlier(console, path: Path, model: MaskedModel, settings: dict) -> dict[str, dict]:
    """The tasks in `path`, to be extended; {} where they are of another model or under another one of `settings`.

    Which tasks those are, and what differs, is printed: the next `write` to `path` drops them.
    """
    stored = read_json(path, SCORES_REMEDY)
    found, wanted = stored.get("model", {}) | stored.get("settings", {}), model.description() | settings
    different = [f"{key}={found.get(key)}, now {value}" for key, value in wanted.items() if found.get(key) != value]
    tasks = stored.get("tasks", {})
    if not tasks or not different:
        return tasks
    note = f"{path}: puts aside the scores of {', '.join(tasks)} ({'; '.join(different)}) — another --out keeps them"
    console.print(note, markup=False, highlight=False, soft_wrap=True)
    return {}


def publish(model: MaskedModel) -> list[Path]:
    """Bring the report and the exported card of a run up to date with its evaluations; the files that changed."""
    if model.run_dir is None or not (model.run_dir / "metrics.jsonl").exists():
        return []
    changed = [report.write_report(model.run_dir)]
    card = model.run_dir / "hf" / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        write_text(card, modelcard.with_scores(text, read_record(model.run_dir).scores))
        changed.append(card)
    return changed


def announce(console, path: Path, model: MaskedModel, out: Path | None) -> None:
    """Bring report and card up to date, unless the result went elsewhere by --out, and name every file written."""
    for word, changed in (("written", [path]), ("updated", [] if out else publish(model))):
        for file in changed:
            console.print(f"{word}: {file}", markup=False, highlight=False, soft_wrap=True)
