"""A second look during training: weights that have moved reach values that the first microbatch did not."""

from pathlib import Path

import torch

from cramfast.batches.feed import to_device, training_source
from cramfast.config import TrainConfig
from cramfast.errors import UserError
from cramfast.model.encoder import Encoder
from cramfast.optim.adamw import AdamW
from cramfast.qualify.agreement import Comparison, sizes
from cramfast.qualify.resolve import remember
from cramfast.qualify.verdict import as_flags, in_force
from cramfast.runtime.distributed import ALONE, Team
from cramfast.session.budget import Progress

STEPS = (100, 1000)
SKIPS = 3  # updates in a row that were not finite
PART = 4  # of a microbatch is compared, so that float32 fits beside what training holds


class Watch:
    """Compares a part of a microbatch by the floor and by what runs, at steps 100 and 1,000 and after three skipped
    updates in a row; nothing where the floor is all that runs, and never on a CPU.

    Args:
        tokens: size of the run's microbatches.
    """

    def __init__(
        self, config: TrainConfig, run_dir: Path, prepared: Path, model: Encoder, optimizer: AdamW, tokens: int,
        team: Team = ALONE,
    ):  # fmt: skip
        self.config, self.run_dir, self.prepared, self.tokens = config, run_dir, prepared, tokens
        self.model, self.optimizer, self.team = model, optimizer, team
        self.verdicts = in_force()
        self.due = False

    def note(self, progress: Progress) -> None:
        """Follow one step."""
        if progress.step in STEPS or progress.skipped_in_row == SKIPS:
            self.due = any(verdict.replaces_floor for verdict in self.verdicts)

    def look(self, progress: Progress, previous: Path | None) -> None:
        """Compare if it is time; between two updates, by all processes together. It costs the run's budget nothing.

        What departs is remembered as failed (resolve.remember).

        Raises:
            UserError: an operator departs; the last checkpoint stays.
        """
        if not self.due:
            return
        self.due = False
        found = self.departed()
        (wrong,) = self.team.added(bool(found))
        if not wrong:
            return
        verdicts = [v for v in self.verdicts if v.name in found] or [v for v in self.verdicts if v.replaces_floor]
        said = [f"{v.name} {v.implementation} departs from {v.floor}: {found.get(v.name, '?')}" for v in verdicts]
        flags = as_flags(verdicts, self.verdicts, self.config.kernels)
        own = [v for v in verdicts if v.name in found]
        why = [f"departed from {v.floor} at step {progress.step}: {found[v.name]}" for v in own]
        remember(self.config, self.run_dir, list(zip(own, why, strict=True)))
        then = f"{previous} is kept — go on with --resume {self.run_dir} {flags}"
        if not previous:
            then = f"no checkpoint was written yet — start anew with {flags}"
        raise UserError(f"step {progress.step}: {'; '.join(said)}; {then}")

    def departed(self) -> dict[str, str]:
        """Comparison.departed() with the weights as they are now, in the largest part that the memory holds."""
        config = self.config
        for size in sizes(max(config.sequence_len, self.tokens // PART), config.sequence_len):
            try:
                batch = training_source(config, self.prepared, size).batch(0, 0, config.mask_fraction)
                batch = to_device(batch, self.optimizer.flat.master.device)
                scale = float(self.optimizer.loss_scale.value)
                return Comparison(self.model, self.optimizer, batch, scale, self.verdicts).departed()
            except torch.OutOfMemoryError:
                self.optimizer.flat.grad.zero_()
            torch.cuda.empty_cache()
        print("note: no memory is left to compare the kernels with stock PyTorch; training goes on")
        return {}
