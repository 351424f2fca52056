"""The ordinary trainer for a run of a plan or of a claim: python -m cramfast.scaling.switched SWITCH,SWITCH FLAGS...

FLAGS are those of cramfast.train; "-" stands for no switch. Two things differ. What a switch replaces is put in the
loop's way, so that train.py knows nothing of it. And the run ends with its record: an export and a demonstration of
each of forty models would take a share of the hour.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from cramfast import train
from cramfast.batches.feed import evaluate, heldout_batches
from cramfast.config import TrainConfig
from cramfast.errors import command
from cramfast.optim.make import make_optimizer
from cramfast.scaling.switches import Variant

HELDOUT_LENGTH = TrainConfig().sequence_len  # where a switch changes that of training


def install(variant: Variant) -> None:
    """Let the training loop of this process build its model, optimizer and batches from the variant's classes.

    The held-out set stays the one of the plan, with sequences of its length and isolated documents, so that losses
    compare between variants.
    """
    train.Encoder = variant.encoder
    train.make_optimizer = partial(make_optimizer, kinds=variant.optimizers)

    def source(config: TrainConfig, prepared: Path, microbatch_tokens: int):
        return variant.batches(replace(config, microbatch_tokens=microbatch_tokens), prepared)

    def heldout(config: TrainConfig, prepared: Path, device, most: int = 0):
        return heldout_batches(replace(config, sequence_len=HELDOUT_LENGTH), prepared, device, most)

    train.training_source = source
    if any("sequence_len" in switch.config for switch in variant.switches):
        train.heldout_batches = heldout
    train.evaluate = in_evaluation_mode
    train.stages.publish = lambda run_dir: None


def in_evaluation_mode(model, batches, team):
    """feed.evaluate without dropout."""
    model.eval()
    result = evaluate(model, batches, team)
    model.train()
    return result


def main() -> None:
    """The command line."""
    names, sys.argv = sys.argv[1], [sys.argv[0], *sys.argv[2:]]
    variant = Variant(tuple(name for name in names.split(",") if name != "-"))
    install(variant)
    train.main()


if __name__ == "__main__":
    command(main)
