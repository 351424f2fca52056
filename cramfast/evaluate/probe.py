"""What a model has learnt of grammar while it trains: a few BLiMP pairs, judged at every held-out evaluation."""

from pathlib import Path
from statistics import fmean

from tokenizers import Tokenizer

from cramfast.config import TrainConfig
from cramfast.evaluate.blimp import Paradigm, read_blimp, score
from cramfast.evaluate.checkpoints import Checkpoint
from cramfast.model.encoder import Encoder


def read_pairs(config: TrainConfig) -> list[Paradigm]:
    """The pairs that the config's probe takes, none where it has no probe.

    Raises:
        UserError: as `read_blimp`.
    """
    return read_blimp(Path(config.probe_data), config.probe_pairs) if config.probe_data else []


class Probe:
    """Judges the same pairs whenever it is called; it draws no random number and leaves the model as it is.

    Raises:
        UserError: BLiMP is not where the config says, or damaged.
    """

    def __init__(self, config: TrainConfig, prepared: Path):
        self.folder, self.paradigms = prepared, read_pairs(config)
        self.tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json")) if self.paradigms else None

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """{"blimp_accuracy": mean over the paradigms}; {} where the config asks for no probe.

        Raises:
            UserError: a sentence longer than the model takes.
        """
        if not self.paradigms:
            return {}
        model = Checkpoint(self.folder, "the model", encoder, self.tokenizer, None, None)
        return {"blimp_accuracy": fmean(score(model, paradigm).accuracy for paradigm in self.paradigms)}
