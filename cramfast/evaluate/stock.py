"""Masked-language models of other architectures, computed by transformers with their own tokenizers.

Weights come from safetensors alone, and code that a folder brings with it is never run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn

from cramfast.errors import UserError
from cramfast.evaluate.checkpoints import NotOurs, load, name_of
from cramfast.evaluate.masked import Hidden, MaskedModel
from cramfast.hf.check import quiet_transformers
from cramfast.text.tokenizer import for_text

BATCH_TOKENS = 2048  # of one forward pass, padding included; the logits of all of them are held at once
REFUSALS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError)
SPECIAL = ("cls", "sep", "mask", "pad")


@dataclass(frozen=True)
class StockModel:
    """A masked-language model of transformers; attributes as masked.MaskedModel has them.

    Attributes:
        module: float32, on the CPU, in evaluation mode.
        pad: id of the token that fills a batch up; attention leaves it out.
    """

    folder: Path
    name: str
    module: nn.Module
    tokenizer: Tokenizer
    cls: int
    sep: int
    mask: int
    pad: int
    unk: int
    max_len: int
    run_dir: None = None

    def description(self) -> dict:
        """What the JSON of an evaluation says about the model."""
        return {"name": self.name, "parameters": sum(p.numel() for p in self.module.parameters())}

    def masked_logits(self, sequences: Sequence[Hidden]) -> Iterator[tuple[Tensor, Tensor]]:
        """As masked.MaskedModel has it: sequences in padded batches."""
        device = next(self.module.parameters()).device
        for batch in _batches(sequences):
            ids_SL = torch.full((len(batch), max(len(s.ids) for s in batch)), self.pad)
            attended_SL = torch.zeros_like(ids_SL)
            for row, sequence in enumerate(batch):
                ids_SL[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
                attended_SL[row, : len(sequence.ids)] = 1
            logits_SLV = self.module(input_ids=ids_SL.to(device), attention_mask=attended_SL.to(device)).logits
            rows_M = torch.tensor([row for row, sequence in enumerate(batch) for _ in sequence.places])
            places_M, target_M = (
                torch.tensor([value for s in batch for value in getattr(s, key)], device=device)
                for key in ("places", "targets")
            )
            yield logits_SLV[rows_M.to(device), places_M].float(), target_M


def _batches(sequences: Sequence[Hidden]) -> Iterator[Sequence[Hidden]]:
    """The sequences in order, so many at a time that they hold about BATCH_TOKENS when padded to the longest."""
    begin = longest = 0
    for end, sequence in enumerate(sequences):
        longest = max(longest, len(sequence.ids))
        if end > begin and longest * (end + 1 - begin) > BATCH_TOKENS:
            yield sequences[begin:end]
            begin, longest = end, len(sequence.ids)
    if begin < len(sequences):
        yield sequences[begin:]


def load_masked(folder: Path) -> MaskedModel:
    """A run or folder that our encoder can express, by it; any other masked-language model by transformers.

    Raises:
        UserError: neither of them can be read; the model fills no masks.
    """
    try:
        return load(folder)
    except NotOurs:
        return load_stock(Path(folder))


def load_stock(folder: Path) -> StockModel:
    """A folder with config.json, safetensors and a fast tokenizer, as transformers' AutoModelForMaskedLM reads it.

    Raises:
        UserError: a missing or damaged file, an architecture that transformers does not have, weights missing, among
            them those of the prediction head; a tokenizer without the special tokens.
    """
    from huggingface_hub.errors import StrictDataclassError  # a config of impossible values
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            module, report = AutoModelForMaskedLM.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
            )
    except (*REFUSALS, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder}: transformers cannot load it ({reason}) — it takes safetensors and no code"
        ) from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder}: no weights for {missing[0]} — the model fills no masks, or its file is incomplete")
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: no tokenizer.json — save it with the fast tokenizer of transformers")
    ids = {key: getattr(tokenizer, f"{key}_token_id") for key in SPECIAL}
    if absent := [key for key, number in ids.items() if number is None]:
        raise UserError(f"{folder}: the tokenizer has no {absent[0]} token — a masked-language model needs one")
    unk = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    name, fast = f"{name_of(folder)}, by transformers", for_text(tokenizer.backend_tokenizer)
    return StockModel(folder, name, module.eval(), fast, unk=unk, max_len=longest_sequence(module), **ids)


def longest_sequence(module: nn.Module) -> int:
    """How many tokens the positions last for; those of RoBERTa begin after the id of the padding."""
    for name, table in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    if longest := getattr(module.config, "max_position_embeddings", None):
        return longest
    raise UserError(
        f"{module.config.model_type}: config.json does not say how long a sequence may be — add max_position_embeddings"
    )
