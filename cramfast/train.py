"""Pretrain an encoder: `python -m cramfast.train` (--help lists every key). Read this file first.

main() goes through the stages: text -> tokenizer -> ids on disk -> train() -> report, export, demo.
train() is the loop: microbatches -> flat gradient -> update, until the budget is spent.
"""

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from cramfast import checkpoint, runfolder, schedule, stages
from cramfast.allocator import keep_freed_memory
from cramfast.budget import Budget, Progress, Replay, parse_budget, read_replay
from cramfast.commandline import Request, parse, print_config
from cramfast.config import TrainConfig, config_hash, to_json
from cramfast.errors import UserError, command
from cramfast.feed import Feed, evaluate, heldout_batches, to_device, training_source
from cramfast.interrupt import Interrupt
from cramfast.loader import Batch
from cramfast.metrics import Display, MetricsLog
from cramfast.model import Encoder
from cramfast.optim import AdamW, FlatParameters

SKIPS_IN_ROW = 20  # non-finite updates before the run gives up
STEADY_STEPS = 2000  # updates after which float16's loss scale is doubled, as torch.amp does


def train(config: TrainConfig, run_dir: Path, prepared: Path, budget: Budget | Replay) -> bool:
    """Train until the budget is spent, from the newest checkpoint in run_dir or from the start.

    Returns:
        True when the budget is spent, False when a signal ended the session; a checkpoint is there either way.

    Raises:
        UserError: the disk refused a checkpoint, or 20 updates in a row were not finite.
    """
    device = torch.device(config.device)
    model, optimizer, progress, previous = start(config, run_dir)
    source, heldout = training_source(config, prepared), heldout_batches(config, prepared, device)
    run = runfolder.describe(config, model)
    lr_shape, fixed = schedule.SHAPES[config.schedule], {"model": to_json(config.model), "hash": config_hash(config)}
    evaluated = saved = progress.seconds
    with (
        MetricsLog(run_dir, progress.step) as log, Display() as display, Interrupt() as interrupt,
        Feed(source, config.model, device, (progress.epoch, progress.index)) as feed,
    ):  # fmt: skip
        log.write({"run": run})
        warm_up(model, optimizer, to_device(source.batch(0, 0, config.mask_fraction), device))
        if progress.step == 0:
            display.heldout = log.evaluation(progress, *evaluate(model, heldout))
        while (fraction := budget.fraction(progress)) < 1 and not interrupt.requested:
            began = time.perf_counter()
            lr = config.lr * lr_shape(fraction)
            masked = schedule.mask_fraction(fraction, config.mask_fraction, config.mask_fraction_end)
            planned = schedule.microbatches(
                fraction, config.microbatch_tokens, config.batch_tokens, config.ramp_fraction
            )
            microbatches = budget.microbatches(progress, planned)
            loss_sum, tokens, flops = torch.zeros((), device=device), 0, 0.0
            for _ in range(microbatches):  # nothing in here waits for the device
                batch, batch_flops = feed.next(masked)
                loss = model.loss(batch)
                (loss * progress.loss_scale).backward()  # hooks gather the gradients: optim.py
                loss_sum += loss.detach()
                tokens, flops = tokens + batch.tokens, flops + batch_flops
                if interrupt.requested:
                    break
            if interrupt.requested:
                break  # an unfinished update is dropped; a resumed run makes it again, from the same microbatches
            optimizer.step(lr, loss_sum, microbatches * progress.loss_scale)
            skipped = optimizer.skipped  # the first wait for the device in this step
            seconds = time.perf_counter() - began
            progress = advance(progress, feed.position, tokens, flops, seconds, skipped, config.dtype == "float16")
            row = {
                "step": progress.step, "tokens": progress.tokens, "flops": progress.flops, "seconds": progress.seconds,
                "fraction": fraction, "microbatches": microbatches, "lr": lr, "loss": loss_sum.item() / microbatches,
                "grad_norm": optimizer.grad_norm, "skipped": int(skipped), "tokens_per_s": tokens / seconds,
                "mfu": flops / seconds / run["matmul_peak_flops"],
            }  # fmt: skip
            log.row(row)
            display.step(row, spent := budget.fraction(progress), progress.seconds * max(0.0, 1 / spent - 1))
            stop_if_hopeless(progress, previous)
            if progress.seconds - evaluated >= config.eval_interval or spent >= 1:
                display.heldout = log.evaluation(progress, *evaluate(model, heldout))
                evaluated = progress.seconds
            if progress.seconds - saved >= config.checkpoint_interval:
                log.sync()
                previous = checkpoint.save(run_dir, optimizer, {"progress": asdict(progress), **fixed})
                saved = progress.seconds
        log.sync()
        checkpoint.save(run_dir, optimizer, {"progress": asdict(progress), **fixed})
    return budget.fraction(progress) >= 1


def start(config: TrainConfig, run_dir: Path) -> tuple[Encoder, AdamW, Progress, Path | None]:
    """Model, optimizer and progress, as drawn from the seed or as the newest checkpoint (the fourth value) has them."""
    torch.manual_seed(config.seed)
    model = Encoder(config.model).to(config.device)
    optimizer = AdamW(
        FlatParameters(model, getattr(torch, config.dtype)), beta1=config.beta1, beta2=config.beta2,
        eps=config.adam_eps, weight_decay=config.weight_decay, max_norm=config.max_norm,
    )  # fmt: skip
    if previous := checkpoint.newest(run_dir):
        return model, optimizer, Progress(**checkpoint.restore(previous, optimizer)["progress"]), previous
    return model, optimizer, Progress(loss_scale=65536.0 if config.dtype == "float16" else 1.0), None


def warm_up(model: Encoder, optimizer: AdamW, batch: Batch) -> None:
    """One pass whose gradient is dropped: compilers and caches do their first work outside the budget."""
    model.loss(batch).backward()
    optimizer.flat.grad.zero_()


def advance(
    before: Progress, position: tuple[int, int], tokens: int, flops: float, seconds: float, skipped: bool, scaled: bool
) -> Progress:
    """Progress after one more step; with float16 (`scaled`) also the next loss scale."""
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
    config = request.config
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    stages.print_kernels(config)
    budget = choose_budget(request)
    prepared, config = stages.prepare_text(config)
    print_config(config)
    runfolder.create(request.run_dir, config, prepared, request.replay)
    print(f"run folder {request.run_dir}", flush=True)
    with runfolder.locked(request.run_dir):
        finished = train(config, request.run_dir, prepared, budget)
    if not finished:
        print(f"stopped and saved; go on with: python -m cramfast.train --resume {request.run_dir}")
        sys.exit(130)
    stages.publish(request.run_dir)


if __name__ == "__main__":
    command(main)
