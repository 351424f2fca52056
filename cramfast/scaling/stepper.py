"""Training steps of a variant in this process, to be timed: calibration of a plan, and interleaved rounds of claims."""

import time
from pathlib import Path

import torch

from cramfast.batches.feed import evaluate, heldout_batches, to_device
from cramfast.config import TrainConfig
from cramfast.kernels.linear import allow_half_accumulation
from cramfast.optim import schedule
from cramfast.optim.make import make_optimizer
from cramfast.runtime.allocator import keep_freed_memory
from cramfast.scaling.switches import Variant
from cramfast.session import microbatch
from cramfast.session.ledger import Clock
from cramfast.session.metrics import synchronize
from cramfast.session.microbatch import Microbatch, capture_graph

WARM_UPS = 2
TIMED_LR = 1e-6  # without the warm-up of a schedule the full one might end in NaN, whose updates are skipped and fast


def as_the_trainer(config: TrainConfig) -> None:
    """Threads and allocator of this process as cramfast.train sets them."""
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()


class Stepper:
    """One model in training; batches are made in the step, not ahead of it, the same for every variant."""

    def __init__(self, config: TrainConfig, prepared: Path, variant: Variant = Variant(())):  # noqa: B008
        self.variant, self.config, self.prepared = variant, variant.config(config), prepared
        config, self.device = self.config, torch.device(config.device)
        self.source = variant.batches(config, prepared)
        torch.manual_seed(config.seed)
        self.model = variant.encoder(config.model).to(self.device)
        self.model.z_loss = config.z_loss
        self.optimizer = make_optimizer(config, self.model, kinds=variant.optimizers)
        with variant.kernels(config.device):
            captured = microbatch.graph_choice(config)[0]
            self.microbatch = Microbatch(
                self.model, self.optimizer, Clock(self.device), capture_graph if captured else None
            )
        self.index = 0

    def step(self) -> tuple[int, int]:
        """One update of the full batch; (tokens of it that are not padding, all of them)."""
        config, tokens, slots = self.config, 0, 0
        microbatches = schedule.microbatches(1.0, config.microbatch_tokens, config.batch_tokens, 0.0)
        allow_half_accumulation(config.half_accumulation)  # of the whole process, and the other side differs
        with self.variant.kernels(config.device):
            self.microbatch.loss_sum.zero_()
            for _ in range(microbatches):
                batch = self.source.batch(0, self.index % self.source.batches(0), config.mask_fraction)
                self.microbatch.run(to_device(batch, self.device))
                tokens, slots, self.index = tokens + batch.tokens, slots + len(batch.ids_N), self.index + 1
            self.optimizer.step(TIMED_LR, self.microbatch.loss_sum, microbatches)
        return tokens, slots

    def turn(self, seconds: float) -> tuple[float, float]:
        """Train for at least so long; (useful tokens, slots) a second."""
        tokens = slots = 0
        start = time.perf_counter()
        while True:
            useful, all_of_them = self.step()
            tokens, slots = tokens + useful, slots + all_of_them
            synchronize(self.device)
            if (elapsed := time.perf_counter() - start) >= seconds:
                return tokens / elapsed, slots / elapsed

    def evaluation_s(self) -> float:
        """Seconds of one held-out evaluation."""
        batches = heldout_batches(self.config, self.prepared, self.device)
        start = time.perf_counter()
        evaluate(self.model, batches[:1])
        return (time.perf_counter() - start) * len(batches)

    def warm_up(self) -> "Stepper":
        for _ in range(WARM_UPS):
            self.step()
        synchronize(self.device)
        return self
