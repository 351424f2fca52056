"""The stages around the loop: which kernels run, text to ids before it, report, export and demo after it."""

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer

from cramfast import export, prepare, report
from cramfast.commandline import Request
from cramfast.config import TrainConfig, flatten
from cramfast.cost.roofline import parameter_count
from cramfast.errors import UserError, note
from cramfast.hf import demo
from cramfast.optim import schedule
from cramfast.pages.numbers import short, span
from cramfast.qualify import resolve
from cramfast.runtime.distributed import Team
from cramfast.runtime.progress import Stages
from cramfast.session import checkpoint, kernelchoice, runfolder
from cramfast.session.budget import UNITS_KEPT, Progress, parse_budget
from cramfast.session.microbatch import graph_choice
from cramfast.session.record import Record, read_record
from cramfast.text.curation import summary
from cramfast.text.prepared import is_prepared, read_manifest
from cramfast.text.tokenizer import is_trained


def choose_kernels(config: TrainConfig, followed: Path | None = None) -> None:
    """Take the implementations that the config asks for, and print what runs; on a GPU, where the others are still to
    be tried on the run's own text (qualify_kernels), only take them.

    Raises:
        UserError: an operator or implementation that does not exist, or cannot run on this device in this dtype.
    """
    kernelchoice.override(config.kernels, config.device)
    for choice in kernelchoice.choices(config):
        if choice.obstacle:
            raise UserError(f"--kernels {choice.op}={choice.implementation} is not possible: {choice.obstacle}")
    if not resolve.needed(config):
        print_kernels(config, followed)


def qualify_kernels(request: Request, config: TrainConfig, prepared: Path, team: Team) -> None:
    """Settle what was not asked for, in the run's folder, by its record or a trial on this card; print what runs.

    Raises:
        UserError: the processes' cards differ, or the run's record is damaged.
    """
    resolve.resolve(config, request.run_dir, prepared, request.replay, team, request.qualify_seconds)
    if resolve.needed(config):
        print_kernels(config, request.run_dir if request.resuming else request.replay)


def print_kernels(config: TrainConfig, followed: Path | None = None) -> None:
    """One line per operator: what runs, and why; one for the graph.

    Where the run goes on with another or repeats it (`followed`), say what ran on something else there.
    """
    chosen = kernelchoice.choices(config)
    print(f"kernels on {config.device}, {config.dtype}, {torch.get_num_threads()} threads:")
    for choice in chosen:
        print(f"  {choice.op:<14} {choice.implementation:<10} {choice.reason}", flush=True)
    if followed and (changed := kernelchoice.changes(chosen, followed)):
        print(f"note: {followed} had {', '.join(changed)}: what follows is close to it, not equal bit for bit")
    captured, reason = graph_choice(config)
    print(f"  {'CUDA graph':<14} {'on' if captured else 'off':<10} {reason}", flush=True)


def print_team(config: TrainConfig, team: Team) -> None:
    """One line, where there are several processes: how they divide an update."""
    if team.alone:
        return
    full = max(1, round(config.batch_tokens / config.microbatch_tokens))
    uneven = f"; {full} microbatches an update are no multiple of that: some wait" if full % team.world else ""
    reason = (
        f"each takes every {team.world}th microbatch of the same order and keeps its share of the optimizer's state"
    )
    print(f"  {'processes':<14} {team.world:<10} {reason}{uneven}", flush=True)


def as_prepared(request: Request) -> TrainConfig:
    """The config with what its prepared folder says of the text, if its data are one; the record must not say else.

    Raises:
        UserError: a flag asks for another curation than the folder's; a recipe that does gets a note.
    """
    config = request.config
    if len(config.data) != 1 or not is_prepared(folder := Path(config.data[0])):
        return config
    manifest = read_manifest(folder)
    keys = ("tokenizer", "heldout_fraction", "documents", "text_key", "format", "encoding", "skip_malformed")
    told = {key: manifest[key] for key in keys if key in manifest}
    if not request.resuming:  # a run that recorded another curation, as older ones do, keeps its record
        prepare.check_curation(folder, config.curation, request.curation_flags)
        told["curation"] = prepare.curation_of(folder)
    prepared, asked = replace(config, **told), flatten(config)
    if config.tokenizer == manifest.get("tokenizer_asked"):  # auto, there as here
        asked["tokenizer"] = prepared.tokenizer
    if changed := [f"{key}={value}" for key, value in flatten(prepared).items() if value != asked[key]]:
        print(f"note: {folder} was prepared with {', '.join(changed)}, and stays so")
    return prepared


def prepare_text(config: TrainConfig) -> tuple[Path, TrainConfig]:
    """Prepared folder for the config's text, and the config with the tokenizer's true vocabulary size.

    A run keeps the config as it was asked for: prepared again on resume, the same request finds the same text.

    Raises:
        UserError: no text, or something wrong with it.
    """
    with Stages() as stages:
        prepared = prepare.prepare(
            config.data,
            None,
            tokenizer=config.tokenizer,
            vocab_size=config.model.vocab_size,
            heldout_fraction=config.heldout_fraction,
            documents=config.documents,
            text_key=config.text_key,
            format=config.format,
            encoding=config.encoding,
            skip_malformed=config.skip_malformed,
            curation=config.curation,
            progress=stages,
        )
    for line in summary(read_manifest(prepared)):
        print(line)
    size = Tokenizer.from_file(str(prepared / "tokenizer.json")).get_vocab_size()
    fitted = replace(config, model=replace(config.model, vocab_size=size))
    if fitted != config:
        print(f"the tokenizer has {size} entries: model.vocab_size={size}")
        print(larger_model(config, fitted), end="")
    return prepared, fitted


def larger_model(asked: TrainConfig, fitted: TrainConfig) -> str:
    """A line where a prepared vocabulary makes the model larger than the one that was asked for; else nothing."""
    if fitted.model.vocab_size <= asked.model.vocab_size or not is_trained(asked.tokenizer):
        return ""
    before, after = (short(parameter_count(config.model)) for config in (asked, fitted))
    return (
        f"note: that makes {after} parameters instead of {before} — for the smaller model, prepare the text with "
        f"--vocab-size {asked.model.vocab_size}\n"
    )


def print_start(run_dir: Path, found: Path | None) -> None:
    """Where a run that has recorded steps is resumed without a checkpoint: that it begins anew."""
    if found or not (run_dir / "metrics.jsonl").exists():
        return
    if steps := read_record(run_dir).steps:
        last = f"step {steps[-1]['step']:,}"
        note(f"{run_dir}: no checkpoint is there, though {last} is recorded: the run begins anew at its first step")


def print_schedule(request: Request, config: TrainConfig, progress: Progress) -> None:
    """Where a resumed run has another budget than before, or its schedule begins anew: the rate before and after."""
    if config.budget == request.budget_before and not request.schedule_from_here:
        return
    if (request.run_dir / runfolder.REPLAYED).exists():
        raise UserError(f"{request.run_dir} repeats another run step by step, and ends with it — leave out its budget")
    before, budget = parse_budget(request.budget_before), parse_budget(config.budget)
    anew = replace(progress, schedule_from=tuple(float(progress.spent(unit)) for unit in UNITS_KEPT))
    then = anew if request.schedule_from_here else progress
    spent, shape = budget.fraction(progress), schedule.SHAPES[config.schedule]
    what = f"budget {request.budget_before} -> {config.budget}: {min(1.0, spent):.0%} of it is spent"
    if spent >= 1:
        note(f"{what}, so the run ends here")
        return
    rates = [config.lr * shape(of.schedules(at)[0]) for of, at in ((before, progress), (budget, then))]
    advice = " — --schedule-from-here raises and lowers it over the new part alone"
    over = "what is left"
    if not request.schedule_from_here:
        over = f"the part since step {progress.schedule_from[0]:.0f}" if progress.schedule_from else "the whole budget"
    note(
        f"{what}; the learning rate goes from {rates[0]:.2g} to {rates[1]:.2g} with the next update, then as "
        f"{config.schedule} over {over}" + ("" if request.schedule_from_here else advice)
    )


def rehearse_export(config: TrainConfig, prepared: Path) -> None:
    """Export and check a model of this shape before it is trained, so that no budget is spent on one that cannot be.

    Raises:
        UserError: transformers would read the model or its texts otherwise than they were trained.
    """
    try:
        export.rehearse(config.model, config.objective != "rtd", prepared)
    except UserError as error:
        raise UserError(f"before the first step: {error}") from None


def publish(run_dir: Path) -> None:
    """Hugging Face folder with checked logits, report, fill-mask demo, and where everything lies.

    Raises:
        UserError: the exported model disagrees with ours, or its folder holds what no export wrote; the rest is there.
    """
    print("export: writing the Hugging Face folder and comparing logits with stock transformers", flush=True)
    try:
        exported = export.export(run_dir, run_dir / "hf", overwrite=True)
    except UserError:
        present(run_dir)
        raise
    present(run_dir)
    print(f"{export.describe(exported)}\n{'Hugging Face folder':<20} {exported.path}")


def present(run_dir: Path) -> None:
    """Write the report, which says how to load the export if there is one; print the demo and the run's figures."""
    page = report.write_report(run_dir)
    record = read_record(run_dir)
    print_demo(run_dir)
    before, after = record.heldout
    if record.config.get("objective") == "rtd":
        detected = record.last("heldout_detection_loss")
        print(f"\nheld-out detection loss {detected:.4f} nats per token; what follows is of the generator", end="")
    print(
        f"\nheld-out loss {before:.3f} -> {after:.3f} nats per masked token (unigram entropy "
        f"{record.unigram_entropy:.3f}), {record.middle('tokens_per_s'):,.0f} tokens/s, "
        f"MFU {record.middle('mfu'):.0%}{record.mfu_mark}, "
        f"{record.last('tokens'):,.0f} tokens in {span(record.last('seconds'))}"
    )
    if record.skipped:
        print(f"note: {record.skipped} of {len(record.steps)} updates were skipped: loss or gradient was not finite")
    if after > before:
        print("note: the held-out loss is worse than before the first step: try a lower --lr")
    print(partly_read(record), end="")
    print(f"{'run folder':<20} {run_dir}\n{'report':<20} {page}")


def partly_read(record: Record) -> str:
    """A line for a run in a sorted order that ended within its first epoch: it saw one kind of text; else nothing."""
    order = record.config.get("order", "shuffled")
    if order == "shuffled":
        return ""
    share = record.last("tokens") / record.manifest["splits"]["train"]["tokens"]
    if share >= 1:
        return ""
    return (
        f"note: by order={order} these were the first {share:.0%} of the text; what comes last in that order was never "
        "seen — give less text or a larger budget, or use --order shuffled\n"
    )


def print_demo(run_dir: Path) -> None:
    """Fill one mask in each of five held-out sentences."""
    model, _ = checkpoint.load_model(run_dir)
    if not model.fills_masks:
        print("\nno demonstration: a model trained by replaced-token detection fills no masks; fine-tune it")
        return
    tokenizer = Tokenizer.from_file(str(run_dir / "tokenizer.json"))
    sentences = (run_dir / "heldout.txt").read_text(encoding="utf-8").splitlines()
    print("\nfill-mask on held-out sentences:\n")
    demo.show(Console(), demo.fill_mask(model, tokenizer, sentences))
