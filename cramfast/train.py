"""Pretrain an encoder: `python -m cramfast.train` (--help lists every key). Read this file first.

main() goes through the stages: text -> tokenizer -> ids on disk -> train() -> report, export, demo.
session() is the loop: microbatches -> flat gradient -> update, until the budget is spent.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cramfast import checkpoint, fit, runfolder, schedule, stages
from cramfast.allocator import keep_freed_memory
from cramfast.budget import Budget, Progress, Replay, parse_budget, read_replay, resized
from cramfast.commandline import Request, parse, print_config
from cramfast.config import TrainConfig, config_hash, to_json
from cramfast.electra import Discriminator
from cramfast.errors import UserError, command
from cramfast.evaluate.probe import Probe, read_pairs
from cramfast.feed import Feed, detection_loss, evaluate, heldout_batches, to_device, training_source
from cramfast.interrupt import Interrupt
from cramfast.kernels.linear import allow_half_accumulation
from cramfast.ledger import Clock, Ledger, Step
from cramfast.loader import Source
from cramfast.metrics import Display, MetricsLog
from cramfast.microbatch import Microbatch, capture_graph, graph_choice
from cramfast.model import Encoder
from cramfast.muon import Muon
from cramfast.optim import STEADY_STEPS, AdamW, FlatParameters, LossScale, StableAdamW
from cramfast.profiling import Profile

SKIPS_IN_ROW = 20  # non-finite updates before the run gives up
OPTIMIZERS = {"adamw": AdamW, "stable_adamw": StableAdamW, "muon": Muon}


def train(config: TrainConfig, run_dir: Path, prepared: Path, budget: Budget | Replay) -> bool:
    """Train until the budget is spent, from the newest checkpoint in run_dir or from the start.

    Where memory runs out, training goes on from the newest checkpoint with microbatches of half the size.

    Returns:
        True when the budget is spent, False when a signal ended the session; a checkpoint is there either way.

    Raises:
        UserError: the disk refused a checkpoint, the memory is too small, or 20 updates in a row were not finite.
    """
    tokens = budget.microbatch_tokens or latest(config, run_dir)[0].microbatch_tokens or config.microbatch_tokens
    least = tokens if budget.microbatch_tokens else config.sequence_len  # a replay keeps the size of its record
    return fit.halving(lambda size: session(config, run_dir, prepared, budget, size), tokens, least)


def session(config: TrainConfig, run_dir: Path, prepared: Path, budget: Budget | Replay, size: int) -> bool:
    """train() with microbatches of `size` tokens; raises torch.OutOfMemoryError where they do not fit."""
    device = torch.device(config.device)
    source, heldout = training_source(config, prepared, size), heldout_batches(config, prepared, device)
    probe, ledger = Probe(config, prepared), Ledger(Clock(device))
    model, optimizer, microbatch = start(config, source, ledger.clock)
    progress, previous = restore(config, run_dir, optimizer, size)
    run = runfolder.describe(config, model) | {"microbatch_tokens": size}
    lr_shape, fixed = schedule.SHAPES[config.schedule], {"model": to_json(config.model), "hash": config_hash(config)}
    pieces = round(config.microbatch_tokens / size)  # of a microbatch of the size that was asked for

    def look() -> dict[str, float]:
        with optimizer.averaged():
            more = {"heldout_detection_loss": detection_loss(model, heldout)} if config.objective == "rtd" else {}
            predictor = model.generator if more else model
            loss, accuracy = evaluate(predictor, heldout)
            more |= probe(predictor)
        return log.evaluation(progress, loss, accuracy, **more)

    evaluated = saved = progress.seconds
    with (
        MetricsLog(run_dir, progress.step) as log, Display() as display, Interrupt() as interrupt,
        Profile(config, model, run_dir) as profile,
        Feed(source, config.model, device, (progress.epoch, progress.index), config.objective) as feed,
    ):  # fmt: skip
        log.write({"run": run})
        if progress.step == 0:
            display.evaluation = look()
        while (fraction := budget.fraction(ahead := ledger.ahead(progress))) < 1 and not interrupt.requested:
            profile.before(ahead.step + 1)
            ledger.begin()
            lr = config.lr * lr_shape(fraction)
            masked = schedule.mask_fraction(fraction, config.mask_fraction, config.mask_fraction_end)
            lengthened = schedule.lengthened(fraction, config.short_sequence_len, config.short_fraction)
            planned = pieces * schedule.microbatches(
                fraction, config.microbatch_tokens, config.batch_tokens, config.ramp_fraction
            )
            microbatches = budget.microbatches(ahead, planned)
            tokens, flops, loss_sum = 0, 0.0, microbatch.loss_sum.zero_()
            for _ in range(microbatches):
                batch, batch_flops = feed.next(masked, lengthened)
                microbatch.run(batch)  # adds to the loss and to the flat gradient
                tokens, flops = tokens + batch.tokens, flops + batch_flops
                if interrupt.requested:
                    break
            if interrupt.requested:
                break  # an unfinished update is dropped; a resumed run makes it again, from the same microbatches
            optimizer.step(lr, loss_sum, microbatches)
            settings = {"fraction": fraction, "microbatches": microbatches, "lr": lr}
            ledger.add(Step(feed.position, tokens, flops, settings), loss_sum, optimizer.verdict)
            if not ledger.due(budget, progress):
                continue  # nothing so far has waited for the GPU, which works through what was enqueued
            progress, row = settle(ledger, progress, log, run, previous)
            spent = budget.fraction(progress)
            display.step(row, spent, progress.seconds * max(0.0, 1 / spent - 1))
            if progress.seconds - evaluated >= config.eval_interval:
                display.evaluation = look()
                evaluated = progress.seconds
            if progress.seconds - saved >= config.checkpoint_interval:
                log.sync()
                previous = checkpoint.save(run_dir, optimizer, {"progress": asdict(progress), **fixed})
                saved = progress.seconds
        progress, _ = settle(ledger, progress, log, run, previous)
        if budget.fraction(progress) >= 1 and log.evaluated != progress.step:
            look()
        log.sync()
        checkpoint.save(run_dir, optimizer, {"progress": asdict(progress), **fixed})
    return budget.fraction(progress) >= 1


def start(config: TrainConfig, source: Source, clock: Clock) -> tuple[Encoder, AdamW, Microbatch]:
    """Model, optimizer and microbatch as drawn from the seed, after one trial step that changed nothing.

    Compilers and caches do their first work in that step, outside the budget, and memory that is too small shows.
    """
    torch.manual_seed(config.seed)
    model = (Discriminator if config.objective == "rtd" else Encoder)(config.model).to(config.device)
    model.z_loss = config.z_loss
    optimizer = OPTIMIZERS[config.optimizer](
        FlatParameters(model, getattr(torch, config.dtype)), beta1=config.beta1, beta2=config.beta2,
        eps=config.adam_eps, weight_decay=config.weight_decay, max_norm=config.max_norm, ema_decay=config.ema_decay,
    )  # fmt: skip
    microbatch = Microbatch(model, optimizer, clock, capture_graph if graph_choice(config)[0] else None)
    most_masked = max(config.mask_fraction, config.mask_fraction_end)
    microbatch.run(to_device(source.batch(0, 0, most_masked), torch.device(config.device)))
    optimizer.step(0.0, microbatch.loss_sum, 1)
    optimizer.reset()
    return model, optimizer, microbatch


def latest(config: TrainConfig, run_dir: Path) -> tuple[Progress, Path | None]:
    """Progress at the newest checkpoint, and that checkpoint; of a run without one, the start."""
    if previous := checkpoint.newest(run_dir):
        return checkpoint.read_part(previous, "progress", Progress), previous
    return Progress(loss_scale=LossScale.START if config.dtype == "float16" else 1.0), None


def restore(config: TrainConfig, run_dir: Path, optimizer: AdamW, size: int) -> tuple[Progress, Path | None]:
    """Weights and moments of the newest checkpoint, if there is one; the rest as latest(), counted in `size`."""
    progress, previous = latest(config, run_dir)
    if previous:
        checkpoint.restore(previous, optimizer)
    optimizer.loss_scale.set(progress.loss_scale, progress.steady_steps)
    return resized(progress, size), previous


def settle(
    ledger: Ledger, progress: Progress, log: MetricsLog, run: dict[str, Any], previous: Path | None
) -> tuple[Progress, dict[str, Any]]:
    """Wait for the device and write a row for each step since the last log point; progress, and the last row."""
    row, scaled = {}, run["dtype"] == "float16"
    for step, figures in ledger.read():
        progress = advance(progress, step.position, step.tokens, step.flops, figures.seconds, figures.skipped, scaled)
        row = {
            "step": progress.step, "tokens": progress.tokens, "flops": progress.flops, "seconds": progress.seconds,
            **step.settings, "loss": figures.loss_sum / step.settings["microbatches"],
            "grad_norm": figures.grad_norm, "skipped": int(figures.skipped),
            "tokens_per_s": step.tokens / figures.seconds,
            "mfu": step.flops / figures.seconds / run["matmul_peak_flops"],
        }  # fmt: skip
        log.row(row)
        stop_if_hopeless(progress, previous)
    return progress, row


def advance(
    before: Progress, position: tuple[int, int], tokens: int, flops: float, seconds: float, skipped: bool, scaled: bool
) -> Progress:
    """Progress after one more step; with float16 (`scaled`) also the loss scale, which optim.LossScale has moved by
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
    request = parse()
    config = stages.as_prepared(request.config)
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    allow_half_accumulation(config.half_accumulation)
    stages.choose_kernels(config, request.run_dir if request.resuming else request.replay)
    stages.print_graph(config)
    budget = choose_budget(request)
    read_pairs(config)  # a fault is named before the text is prepared
    prepared, fitted = stages.prepare_text(config)
    print_config(fitted)
    with runfolder.locked(request.run_dir):
        runfolder.create(request.run_dir, config, prepared, request.replay)
        print(f"run folder {request.run_dir}", flush=True)
        if not train(fitted, request.run_dir, prepared, budget):
            print(f"stopped and saved; go on with: python -m cramfast.train --resume {request.run_dir}")
            sys.exit(130)
        stages.publish(request.run_dir)


if __name__ == "__main__":
    command(main)
