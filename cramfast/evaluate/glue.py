"""GLUE by fine-tuning under a fixed protocol: python -m cramfast.evaluate glue MODEL --data FOLDER."""

import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cramfast.config import require
from cramfast.errors import UserError, note
from cramfast.evaluate import jobs, results
from cramfast.evaluate.checkpoints import Checkpoint, load
from cramfast.evaluate.examples import dev_name, is_official, load_glue
from cramfast.evaluate.finetune import Protocol
from cramfast.evaluate.jobs import COLUMNS, Job, make_job, table_rows
from cramfast.evaluate.machine import Machine
from cramfast.evaluate.tasks import NUMBERS, TASKS, Task, find_task
from cramfast.pages.scoretable import ScoreTable
from cramfast.text.tally import Tally

FROM_MNLI = ("rte", "mrpc", "sts-b")  # small tasks that the second protocol starts from the weights tuned on MNLI
ANALYSED = "cola"  # its predictions are kept for cramfast.evaluate cola


def glue_table(model: Checkpoint, name: str, stored: dict[str, dict], protocol: Protocol) -> ScoreTable:
    """Scores of every task, their mean where it is one, and what they may be compared with."""
    official = [
        100 * statistics.median(scores)
        for entry in stored.values()
        if not entry["remark"]
        for scores in entry["scores"].values()
        if None not in scores
    ]
    rows = table_rows(stored)
    notes = ["Development sets; points; score after the last epoch; the mean is that of the medians."]
    notes += protocol.notes()
    if official:
        whole = len(official) == NUMBERS
        label = f"mean of the {NUMBERS} numbers" if whole else f"partial mean, {len(official)} of the {NUMBERS} numbers"
        rows.append([label, "", f"{statistics.fmean(official):.2f}", *[""] * (len(COLUMNS) - 3)])
        if not whole:
            notes.append("A partial mean does not compare with published GLUE means.")
    if len({len(entry["seeds"]) for entry in stored.values()}) > 1:
        notes.append("The tasks have unequal numbers of seeds.")
    if any(entry["remark"] for entry in stored.values()):
        notes.append("Rows marked unofficial are on other data than GLUE's; no mean holds them, no paper reports them.")
    if name == "mnli-start":
        notes.append(f"{', '.join(FROM_MNLI)} start from the weights tuned on MNLI with the same seed.")
    return ScoreTable(f"GLUE, protocol {name}: {model.name}", COLUMNS, rows, notes)


def prepare_job(model: Checkpoint, task: Task, data: str, protocol: Protocol, tally: Tally) -> Job:
    """Read and tokenize a task; the tally counts malformed rows.

    Raises:
        UserError: a file is missing, or one of its rows is not as it should be.
    """
    train, dev = load_glue(task, data, tally)
    remark = ""
    if not is_official(task, train, dev):
        parts = ", ".join(f"{len(part.labels):,}" for part in (train, *dev))
        remark = f"unofficial ({parts} rows)"
    named = {dev_name(task, split): part for split, part in zip(task.dev, dev, strict=True)}
    return make_job(
        model,
        protocol,
        task.name,
        task.classes,
        task.metric,
        train,
        named,
        remark,
        keeps_predictions=task.name == ANALYSED,
    )


@dataclass(frozen=True)
class Arguments:
    """Fine-tune on GLUE tasks and score their development sets.

    Scores are added to those of other tasks under the same protocol. After a cut-off, the same command leaves finished
    tasks as they are and goes on with the others after their last seed; once all are finished, it measures them anew.
    """

    model: tyro.conf.Positional[Path]
    """Run folder, or a Hugging Face ModernBERT folder."""
    data: str = "hf:nyu-mll/glue"
    """Folder in GLUE's original layout (CoLA/train.tsv, ...), plain or compressed; or hf:NAME, read by the datasets
    package: a name on the hub, or the folder of a clone of nyu-mll/glue."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Tasks; NAME-lite and NAME-nqg are stand-ins from folders so called, marked unofficial."""
    protocol: Literal["cramming", "mnli-start"] = "cramming"
    """cramming: the paper's, every task from the pretrained weights; mnli-start: RTE, MRPC, STS-B from MNLI's.
    Cut off, mnli-start never goes on: the same command starts from the first fit."""
    seeds: int = 5
    """Fits of each task, with seeds 0, 1, ..."""
    skip_malformed: int = 0
    """Rows that may be left out where they cannot be used, of all tasks together; one more is an error."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = field(default_factory=lambda: Machine(dtype="auto"))
    out: Path | None = None
    """JSON to write; by default evaluations/glue-PROTOCOL.json in the run folder, or for a Hugging Face folder
    FOLDER.glue-PROTOCOL.json here."""

    def run(self, console) -> None:
        """Fine-tune, print, write after every fit.

        Raises:
            UserError: bad data or model.
        """
        require(self.seeds >= 1, f"seeds={self.seeds}", "use 1 or more")
        require(self.skip_malformed >= 0, f"skip_malformed={self.skip_malformed}", "use 0 or more")
        require(len(self.tasks) > 0, "no --tasks", f"name some of {', '.join(TASKS)}")
        tasks = [find_task(name) for name in dict.fromkeys(self.tasks)]
        if self.protocol == "mnli-start" and not any(task.name.startswith("mnli") for task in tasks):
            tasks.append(TASKS["mnli"])
        tasks.sort(key=lambda task: not task.name.startswith("mnli"))  # others may start from it
        model = load(self.model)
        protocol = Protocol().at(model.encoder.config.max_len)
        tally = Tally(self.skip_malformed)
        prepared = [prepare_job(model, task, self.data, protocol, tally) for task in tasks]
        for line in tally.notes():
            note(line)
        if self.protocol == "mnli-start":
            prepared = [_marked(job, prepared[0]) for job in prepared]
        for job in prepared:
            console.print(job.name, *job.class_lines(), sep="\n", markup=False, highlight=False, soft_wrap=True)
        device, dtype = self.machine.resolve()
        settings = {"protocol": self.protocol, "dtype": str(dtype), **asdict(protocol)}
        path = results.path_of(model, f"glue-{self.protocol}", self.out)
        before = results.earlier(console, path, model, settings)
        anew = self._measured_anew(prepared, before)
        for job in prepared:
            scored = before.get(job.name, {})
            if job.name in anew and scored.get("rows") == job.rows and len(scored["seeds"]) > self.seeds:
                kept = f"{path}: has {len(scored['seeds'])} seeds of {job.name}"
                raise UserError(f"{kept}, which {self.seeds} would replace — ask for more, or name another --out")
        stored = {name: entry for name, entry in before.items() if name not in anew}
        for seed in range(self.seeds):
            tuned = model.encoder
            for job in prepared:
                if seed in stored.get(job.name, {}).get("seeds", []):
                    continue  # of an evaluation that was cut off
                started = self.protocol == "mnli-start" and job.name in FROM_MNLI
                done = jobs.run(
                    job, tuned if started else model.encoder, protocol, seed, device, dtype, console, stored
                )
                if job is prepared[0]:
                    tuned = done.encoder
                shown = glue_table(model, self.protocol, stored, protocol)
                result = {"kind": "glue", "model": model.description(), "settings": settings, "tasks": stored}
                results.write(path, result, shown)
        shown.show(console)
        results.announce(console, path, model, self.out)

    def _measured_anew(self, prepared: list[Job], before: dict[str, dict]) -> set[str]:
        """The tasks that start from seed 0: those without scores on this data, or all if nothing was cut off.

        All with an MNLI start too, where a seed needs the encoder that was tuned on MNLI with the same seed.
        """
        names = {job.name for job in prepared}
        begun = {job.name for job in prepared if before.get(job.name, {}).get("rows") == job.rows}
        finished = begun == names and all(len(before[name]["seeds"]) >= self.seeds for name in names)
        return names if finished or self.protocol == "mnli-start" else names - begun


def _marked(job: Job, mnli: Job) -> Job:
    """A job that starts from unofficial MNLI data is unofficial itself."""
    if job.name in FROM_MNLI and mnli.remark and not job.remark:
        return Job(**vars(job) | {"remark": f"unofficial (started from {mnli.name})"})
    return job
