"""Pretrain an encoder: `python -m cramfast.train` (--help lists every key). Read this file first.

main() goes through the stages: text -> tokenizer -> ids on disk -> train() -> report, export, demo.
session() is the loop: microbatches -> flat gradient -> update, until the budget is spent.
"""

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cramfast import stages
from cramfast.batches.feed import Feed, detection_loss, evaluate, heldout_batches, to_device, training_source
from cramfast.batches.loader import Batch, Source
from cramfast.commandline import Request, parse, print_config
from cramfast.config import TrainConfig, config_hash, to_json
from cramfast.errors import INTERRUPTED, UserError, command
from cramfast.evaluate.probe import Probe, read_pairs
from cramfast.kernels.linear import allow_half_accumulation
from cramfast.model.electra import Discriminator
from cramfast.model.encoder import Encoder
from cramfast.optim import schedule
from cramfast.optim.adamw import STEADY_STEPS, AdamW, LossScale
from cramfast.optim.make import make_optimizer
from cramfast.qualify.watch import Watch
from cramfast.runtime import distributed
from cramfast.runtime.allocator import keep_freed_memory
from cramfast.runtime.arguments import program
from cramfast.runtime.distributed import ALONE, Team
from cramfast.runtime.interrupt import Interrupt
from cramfast.runtime.output import make_steady
from cramfast.session import checkpoint, memory, runfolder
from cramfast.session.budget import UNITS_KEPT, Budget, Progress, Replay, parse_budget, read_replay, resized
from cramfast.session.ledger import Clock, Ledger, Step
from cramfast.session.metrics import Display, MetricsLog, open_log
from cramfast.session.microbatch import Microbatch, capture_graph, graph_choice
from cramfast.session.profiling import Profile

SKIPS_IN_ROW = 20  # non-finite updates before the run gives up


def train(
    config: TrainConfig, run_dir: Path, prepared: Path, budget: Budget | Replay, team: Team = ALONE,
    schedule_from_here: bool = False,
) -> bool:  # fmt: skip
    """Train until the budget is spent, from the newest checkpoint in run_dir or from the start.

    All processes of a team call it, and take every decision together. Where memory runs out, training goes on from the
    newest checkpoint with the largest smaller microbatches that fit. With `schedule_from_here` the learning rate's
    schedule goes once more over what is left of the budget.

    Returns:
        True when the budget is spent, False when a signal ended the session; a checkpoint is there either way.

    Raises:
        UserError: the disk refused a checkpoint, the memory is too small, or 20 updates in a row were not finite.
    """
    begun = team.first(lambda: latest(config, run_dir)[0])
    anew = tuple(float(begun.spent(unit)) for unit in UNITS_KEPT) if schedule_from_here else ()
    tokens = budget.microbatch_tokens or begun.microbatch_tokens or config.microbatch_tokens
    least = tokens if budget.microbatch_tokens else config.sequence_len  # a replay keeps the size of its record
    error = torch.OutOfMemoryError if team.alone else memory.OutOfMemoryTogether
    return memory.fitting(
        lambda size: session(config, run_dir, prepared, budget, size, team, anew),
        lambda size: trial(config, prepared, size, team),
        tokens, least, error,
    )  # fmt: skip


def trial(config: TrainConfig, prepared: Path, size: int, team: Team) -> None:
    """The start of a session and no more: raises torch.OutOfMemoryError where microbatches of `size` do not fit."""
    start(config, training_source(config, prepared, size), Clock(torch.device(config.device), team), team)


def session(
    config: TrainConfig, run_dir: Path, prepared: Path, budget: Budget | Replay, size: int, team: Team,
    schedule_from: tuple[float, ...] = (),
) -> bool:  # fmt: skip
    """train() with microbatches of `size` tokens; raises torch.OutOfMemoryError where they do not fit."""
    device = torch.device(config.device)
    source, probe = training_source(config, prepared, size), Probe(config, prepared)
    heldout = heldout_batches(config, prepared, device, size)[team.rank :: team.world]
    ledger = Ledger(Clock(device, team))
    model, optimizer, microbatch = start(config, source, ledger.clock, team)
    progress, previous = restore(config, run_dir, optimizer, size, team)
    progress = replace(progress, schedule_from=schedule_from or progress.schedule_from)
    watch = Watch(config, run_dir, prepared, model, optimizer, size, team)
    run = team.first(lambda: runfolder.describe(config, model, team.world)) | {"microbatch_tokens": size}
    lr_shape, fixed = schedule.SHAPES[config.schedule], {"model": to_json(config.model), "hash": config_hash(config)}
    fixed["config"] = team.first(lambda: runfolder.asked_for(run_dir))  # which a resume compares
    pieces = round(config.microbatch_tokens / size)  # of a microbatch of the size that was asked for

    def look() -> dict[str, float]:
        with optimizer.averaged():
            rtd = config.objective == "rtd"
            more = {"heldout_detection_loss": detection_loss(model, heldout, team)} if rtd else {}
            predictor = model.generator if rtd else model
            loss, accuracy = evaluate(predictor, heldout, team)
            more |= team.first(lambda: {} if interrupt.requested else probe(predictor))
        return log.evaluation(progress, loss, accuracy, **more)

    evaluated = saved = progress.seconds
    with (
        open_log(run_dir, progress.step, team) as log, Display() as display, Interrupt(team.rank > 0) as interrupt,
        Profile(config, model, run_dir, team.rank) as profile,
        Feed(source, config.model, device, (progress.epoch, progress.index), config.objective, team) as feed,
    ):  # fmt: skip
        team.watch(interrupt)
        log.write({"run": run})
        if progress.step == 0:
            display.evaluation = look()
        while (fraction := budget.fraction(ahead := ledger.ahead(progress))) < 1:
            if interrupt.requested and team.alone:
                break  # several processes stop together, in accumulate()
            profile.before(ahead.step + 1)
            ledger.begin()
            of_rate, of_rest = budget.schedules(ahead)
            lr = config.lr * lr_shape(of_rate)
            masked = schedule.mask_fraction(of_rest, config.mask_fraction, config.mask_fraction_end)
            lengthened = schedule.lengthened(of_rest, config.short_sequence_len, config.short_fraction)
            planned = pieces * schedule.microbatches(
                of_rest, config.microbatch_tokens, config.batch_tokens, config.ramp_fraction
            )
            microbatches = budget.microbatches(ahead, planned)
            share = feed.share(microbatches, masked, lengthened)
            tokens, flops, stopped = accumulate(share, microbatch, interrupt, team)
            if stopped:
                break  # an unfinished update is dropped; a resumed run makes it again, from the same microbatches
            loss_sum, weight = team.total(torch.stack([microbatch.loss_sum, microbatch.weight]))
            optimizer.step(lr, loss_sum, weight)
            settings = {"fraction": fraction, "microbatches": microbatches, "lr": lr}
            settings |= {"schedule": of_rate} if of_rate != fraction else {}
            ledger.add(Step(feed.position, tokens, flops, settings), loss_sum / weight, optimizer.verdict)
            if not ledger.due(budget, progress):
                continue  # nothing so far has waited for the GPU, which works through what was enqueued
            progress, row = settle(ledger, progress, log, run, previous, watch.note)
            watch.look(progress, previous)
            spent = budget.fraction(progress)
            display.step(row, spent, progress.seconds * max(0.0, 1 / spent - 1))
            if progress.seconds - evaluated >= config.eval_interval:
                display.evaluation = look()
                evaluated = progress.seconds
            # Updates that are skipped may be the end of a run: what was saved before them must outlive it.
            if progress.seconds - saved >= config.checkpoint_interval and not progress.skipped_in_row:
                log.sync()
                previous = checkpoint.save(run_dir, optimizer, {"progress": asdict(progress), **fixed})
                saved = progress.seconds
        progress, _ = settle(ledger, progress, log, run, previous)
        if budget.fraction(progress) >= 1 and log.evaluated != progress.step:
            look()
        log.sync()
        sound = not progress.skipped_in_row
        checkpoint.save(run_dir, optimizer, {"progress": asdict(progress), **fixed}, prune=sound)
    return budget.fraction(progress) >= 1


def accumulate(
    share: Iterable[tuple[Batch, float, bool]], microbatch: Microbatch, interrupt: Interrupt, team: Team
) -> tuple[int, float, bool]:
    """Run this process's microbatches of an update; each adds to the loss and to the flat gradient, whose sum over the
    processes then lies with the owners of its entries.

    Returns:
        (tokens, FLOPs, whether a signal asked to stop) over all processes.

    Raises:
        torch.OutOfMemoryError: in all processes, where the memory of one is too small.
    """
    tokens, flops, full = 0, 0.0, False
    microbatch.clear()
    try:
        for batch, batch_flops, last in share:
            if interrupt.requested:
                break
            microbatch.run(batch, last)
            tokens, flops = tokens + batch.tokens, flops + batch_flops
    except torch.OutOfMemoryError:
        if team.alone:
            raise
        full = True
    tokens, flops, stopped, full = team.added(tokens, flops, interrupt.requested, full)
    microbatch.optimizer.sharding.reduce()  # after any end: others may have begun, and wait for this process
    if full:
        raise memory.OutOfMemoryTogether
    return tokens, flops, stopped


def start(config: TrainConfig, source: Source, clock: Clock, team: Team) -> tuple[Encoder, AdamW, Microbatch]:
    """Model, optimizer and microbatch as drawn from the seed, after one trial step that changed nothing.

    Compilers and caches do their first work in that step, outside the budget, and memory that is too small shows.
    """
    torch.manual_seed(config.seed)
    team.connect(torch.device(config.device))
    model = (Discriminator if config.objective == "rtd" else Encoder)(config.model).to(config.device)
    model.z_loss = config.z_loss
    optimizer = make_optimizer(config, model, team)
    microbatch = Microbatch(model, optimizer, clock, capture_graph if graph_choice(config)[0] else None)
    most_masked = max(config.mask_fraction, config.mask_fraction_end)
    batch = to_device(source.batch(0, 0, most_masked), torch.device(config.device))
    accumulate([(batch, 0.0, True)], microbatch, Interrupt(), team)
    optimizer.step(0.0, team.total(microbatch.loss_sum), team.world)
    optimizer.reset()
    return model, optimizer, microbatch


def latest(config: TrainConfig, run_dir: Path) -> tuple[Progress, Path | None]:
    """Progress at the newest checkpoint, and that checkpoint; of a run without one, the start."""
    if previous := checkpoint.newest(run_dir):
        return checkpoint.read_part(previous, "progress", Progress), previous
    return Progress(loss_scale=LossScale.START if config.dtype == "float16" else 1.0), None


def restore(
    config: TrainConfig, run_dir: Path, optimizer: AdamW, size: int, team: Team
) -> tuple[Progress, Path | None]:
    """Weights and moments of the newest checkpoint, if there is one; the rest as latest(), counted in `size`."""
    progress, previous = team.first(lambda: latest(config, run_dir))
    if previous:
        checkpoint.restore(previous, optimizer)
    optimizer.loss_scale.set(progress.loss_scale, progress.steady_steps)
    return resized(progress, size), previous


def settle(
    ledger: Ledger, progress: Progress, log: MetricsLog, run: dict[str, Any], previous: Path | None,
    note: Callable[[Progress], None] = lambda progress: None,
) -> tuple[Progress, dict[str, Any]]:  # fmt: skip
    """Wait for the device, write a row for each step since the last log point and `note` it; progress, and the last
    row."""
    row, scaled = {}, run["dtype"] == "float16"
    for step, figures in ledger.read():
        progress = advance(progress, step.position, step.tokens, step.flops, figures.seconds, figures.skipped, scaled)
        row = {
            "step": progress.step, "tokens": progress.tokens, "flops": progress.flops, "seconds": progress.seconds,
            **step.settings, "loss": figures.loss,
            "grad_norm": figures.grad_norm, "skipped": int(figures.skipped),
            "tokens_per_s": step.tokens / figures.seconds,
            "mfu": step.flops / figures.seconds / run["matmul_peak_flops"],
        }  # fmt: skip
        log.row(row)
        note(progress)
        stop_if_hopeless(progress, previous)
    return progress, row


def advance(
    before: Progress, position: tuple[int, int], tokens: int, flops: float, seconds: float, skipped: bool, scaled: bool
) -> Progress:
    """Progress after one more step; with float16 (`scaled`) also the loss scale, which optim.adamw.LossScale moved by
    the same rule on the device."""
    after = replace(
        before, step=before.step + 1, tokens=before.tokens + tokens, flops=before.flops + flops,
        seconds=before.seconds + seconds, epoch=position[0], index=position[1], skipped=before.skipped + skipped,
        skipped_in_row=before.skipped_in_row + 1 if skipped else 0, steady_steps=before.steady_steps + 1,
    )  # fmt: skip
    if scaled and skipped:
        return replace(after, loss_scale=before.loss_scale / 2, steady_steps=0)
    if scaled and after.steady_steps >= STEADY_STEPS:
        return replace(after, loss_scale=before.loss_scale * 2, steady_steps=0)
    return after


def stop_if_hopeless(progress: Progress, previous: Path | None) -> None:
    """Raise UserError after 20 non-finite updates in a row; the last checkpoint stays."""
    if progress.skipped_in_row >= SKIPS_IN_ROW:
        kept = f"{previous} is kept" if previous else "no checkpoint was written yet"
        raise UserError(
            f"step {progress.step}: loss or gradient was not finite {SKIPS_IN_ROW} times in a row; {kept} — "
            "start anew with a lower --lr, a smaller --max-norm or --dtype float32"
        )


def choose_budget(request: Request) -> Budget | Replay:
    """The recorded budget of a replay, also of one that is resumed; else what the config says."""
    record = request.replay / "metrics.jsonl" if request.replay else request.run_dir / runfolder.REPLAYED
    return read_replay(record) if request.replay or record.exists() else parse_budget(request.config.budget)


def main() -> None:
    """The command line: every stage, with its progress, from text to an exported model."""
    if sys.stdout is sys.__stdout__:  # not where a caller, or a test, has put something else
        make_steady()
    with distributed.team(checkpoint.newest) as team:
        carry_out(team.first(parse), team)


def carry_out(request: Request, team: Team) -> None:
    """What the command line asks for, in this process of the team; process 0 does all but the training."""
    team.run_dir = request.run_dir
    budget = team.first(lambda: choose_budget(request))  # a fault is named before anything is shown
    config = stages.as_prepared(request)
    team.use(config.device)
    if threads := config.threads or team.threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    allow_half_accumulation(config.half_accumulation)
    stages.choose_kernels(config, request.run_dir if request.resuming else request.replay)
    stages.print_team(config, team)
    team.first(lambda: read_pairs(config))  # a fault is named before the text is prepared
    prepared, fitted = team.first(lambda: stages.prepare_text(config))
    print_config(fitted)
    with runfolder.locked(request.run_dir) if team.rank == 0 else nullcontext():
        team.first(lambda: runfolder.create(request.run_dir, config, prepared, request.replay))
        print(f"run folder {request.run_dir}", flush=True)
        if not request.resuming:
            team.first(lambda: stages.rehearse_export(fitted, prepared))
        stages.qualify_kernels(request, fitted, prepared, team)
        if request.resuming and team.rank == 0:
            progress, found = latest(fitted, request.run_dir)
            stages.print_start(request.run_dir, found)
            stages.print_schedule(request, fitted, progress)
        if not train(fitted, request.run_dir, prepared, budget, team, request.schedule_from_here):
            print(f"stopped and saved; go on with: {program('train')} --resume {request.run_dir}", flush=True)
            sys.exit(INTERRUPTED)
        team.first(lambda: stages.publish(request.run_dir))


if __name__ == "__main__":
    command(main)
