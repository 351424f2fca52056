"""Predicted beside measured: tokens/s and peak memory of whole training steps on the CPU, python -m bench.plan.

Each preset has a process of its own, so that its peak memory is its own. Parts and whole steps are measured in turns,
so that both see the same weather. The goal is an error of at most 15 %.
"""

import multiprocessing
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import machine, tables
from cramfast.batches.loader import Batch
from cramfast.cost import calibration, footprint
from cramfast.cost.forecast import forecast
from cramfast.cost.roofline import microbatch_parts, update_parts
from cramfast.kernels.cases import ragged_lengths
from cramfast.model.encoder import Encoder
from cramfast.optim.make import make_optimizer
from cramfast.recipes import resolve, starting_config
from cramfast.runtime.allocator import keep_freed_memory
from cramfast.session.ledger import Clock
from cramfast.session.microbatch import Microbatch

GOAL = 0.15


@dataclass(frozen=True)
class Options:
    """Hold cramfast.plan against measured steps of one microbatch each."""

    presets: tuple[str, ...] = ("mini", "small", "base")
    microbatch_tokens: tuple[int, ...] = (4096, 2048, 1024)
    """Of each preset."""
    rounds: int = 3
    """Turns of calibration and steps."""
    steps: int = 3
    """Steps in a turn."""
    results: Path | None = None
    """Append one JSON line for every preset to this file."""


def random_batch(config, tokens: int) -> Batch:
    """A full microbatch of random ids in paragraphs' lengths."""
    lengths = torch.tensor([0, *ragged_lengths(tokens, config.sequence_len)])
    masked = torch.randperm(tokens)[: round(config.mask_fraction * tokens)].sort().values
    ids, target = (torch.randint(5, config.model.vocab_size, (n,)) for n in (tokens, len(masked)))
    offsets = lengths.cumsum(0).to(torch.int32)
    return Batch(ids.to(torch.int32), offsets, masked, target, max_seqlen=config.sequence_len, tokens=tokens)


def measure(preset: str, tokens: int, options: Options, pipe) -> None:
    """Send one row: prediction and measurement of a preset."""
    keep_freed_memory()
    config = resolve(replace(starting_config(preset, None, "cpu"), device="cpu", microbatch_tokens=tokens))
    baseline = footprint.resident_bytes()
    model = Encoder(config.model)
    optimizer = make_optimizer(config, model)
    microbatch, batch = Microbatch(model, optimizer, Clock(torch.device("cpu"))), random_batch(config, tokens)

    def step() -> float:
        start = time.perf_counter()
        microbatch.run(batch)
        optimizer.step(1e-4, microbatch.loss_sum, 1)
        return time.perf_counter() - start

    step()
    peak = footprint.resident_bytes()  # before the calibration takes memory of its own
    parts, dtype = microbatch_parts(config, tokens) + update_parts(config), getattr(torch, config.dtype)
    predicted, measured = [], []

    def rate() -> float:
        return tokens / statistics.median(step() for _ in range(options.steps))

    for _ in range(options.rounds):
        before = rate()
        card = calibration.machine_at_hand("cpu", dtype)
        made = forecast(config, card, tokens, calibration.measure(card, parts, dtype, rounds=options.steps))
        predicted.append(made.tokens_per_s(1))
        measured.append((before + rate()) / 2)
    pipe.send({
        "preset": preset, "microbatch_tokens": tokens, "dtype": config.dtype,
        "predicted_tokens_per_s": predicted, "measured_tokens_per_s": measured,
        "error": statistics.median(p / m for p, m in zip(predicted, measured, strict=True)) - 1,
        "predicted_bytes": footprint.training_bytes(config, tokens, baseline), "measured_bytes": peak,
        "baseline_bytes": baseline,
        "parts_ms": {line.part.name: 1e3 * line.seconds for line in made.microbatch + made.update},
    })  # fmt: skip


def main() -> None:
    """Measure, print, append to the results file."""
    import tyro

    options = tyro.cli(Options, description=__doc__)
    if options.results:
        tables.append(options.results)
    context = multiprocessing.get_context("spawn")
    for preset, tokens in zip(options.presets, options.microbatch_tokens, strict=True):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(preset, tokens, options, sender))
        process.start()
        sender.close()
        row = receiver.recv()
        process.join()
        memory = row["predicted_bytes"] / row["measured_bytes"] - 1
        print(
            f"{preset}, {tokens} tokens: predicted {statistics.median(row['predicted_tokens_per_s']):,.0f}, measured "
            f"{statistics.median(row['measured_tokens_per_s']):,.0f} tokens/s, error {row['error']:+.1%} "
            f"({'reached' if abs(row['error']) <= GOAL else 'missed'}); memory predicted "
            f"{row['predicted_bytes'] / 1e9:.2f}, measured {row['measured_bytes'] / 1e9:.2f} GB, error {memory:+.1%}",
            flush=True,
        )
        if options.results:
            tables.append(options.results, row | machine.description())


if __name__ == "__main__":
    from cramfast.errors import command

    command(main)
