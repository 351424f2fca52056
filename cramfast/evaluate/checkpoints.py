"""What there is to evaluate: a run folder of ours or a Hugging Face ModernBERT folder, as one Encoder.

Weights are read from safetensors and shapes from JSON; nothing of a checkpoint is ever executed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from cramfast import export
from cramfast.config import ModelConfig
from cramfast.errors import UserError
from cramfast.evaluate.masked import Hidden, batches
from cramfast.model.encoder import Encoder
from cramfast.runtime.jsonfile import read_json
from cramfast.session import checkpoint
from cramfast.text.tokenizer import for_text

SPECIAL = ("[CLS]", "[SEP]", "[MASK]", "[UNK]")
LOGIT_ROWS = 1024  # rows of the decoder's output held at once


class NotOurs(UserError):
    """A model that our encoder cannot express; transformers may."""


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate.

    Attributes:
        folder: as given.
        name: for tables: the folder's own name and, of a run, the step.
        encoder: float32, on the CPU, in evaluation mode.
        tokenizer: adds and cuts nothing by itself.
        decoder_bias: (V,) added to the logits, or None; ours have none, stock ModernBERT has.
        cls, sep, mask, unk: token ids.
        run_dir: the run it belongs to, or None.
    """

    folder: Path
    name: str
    encoder: Encoder
    tokenizer: Tokenizer
    decoder_bias: Tensor | None
    run_dir: Path | None

    def __post_init__(self):
        for token in SPECIAL:
            if self.tokenizer.token_to_id(token) is None:
                raise NotOurs(f"{self.folder}: the tokenizer has no {token} — only BERT's special tokens are known")

    @property
    def cls(self) -> int:
        return self.tokenizer.token_to_id("[CLS]")

    @property
    def sep(self) -> int:
        return self.tokenizer.token_to_id("[SEP]")

    @property
    def mask(self) -> int:
        return self.tokenizer.token_to_id("[MASK]")

    @property
    def unk(self) -> int:
        return self.tokenizer.token_to_id("[UNK]")

    @property
    def max_len(self) -> int:
        return self.encoder.config.max_len

    @property
    def module(self) -> nn.Module:
        return self.encoder

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.encoder.parameters())

    def description(self) -> dict:
        """What the JSON of an evaluation says about the model."""
        return {"name": self.name, "parameters": self.parameters}

    def masked_logits(self, sequences: Sequence[Hidden]) -> Iterator[tuple[Tensor, Tensor]]:
        """As masked.MaskedModel has it: packed, and only the hidden positions go through the decoder.

        Raises:
            UserError: the decoder was never trained.
        """
        if not self.encoder.fills_masks:
            raise UserError(
                f"{self.folder}: trained by replaced-token detection, so it fills no masks — use glue or task"
            )
        device = self.encoder.final_norm.weight.device
        bias_V = None if self.decoder_bias is None else self.decoder_bias.to(device)
        for batch in batches(sequences, device):
            hidden_MD = self.encoder.masked_hidden(batch)
            for rows_D, target_M in zip(hidden_MD.split(LOGIT_ROWS), batch.target_M.split(LOGIT_ROWS), strict=True):
                logits_MV = self.encoder.logits(rows_D).float()
                yield logits_MV if bias_V is None else logits_MV + bias_V, target_M


def load(folder: Path) -> Checkpoint:
    """Read the newest checkpoint of a run, one checkpoint of it, or an exported or stock ModernBERT folder.

    Raises:
        NotOurs: a model that our encoder cannot express.
        UserError: neither of them, a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder — give a run folder or a Hugging Face folder")
    name = name_of(folder)
    kind = read_json(folder / "config.json").get("model_type")
    if kind == export.OWN_TYPE:
        encoder, tokenizer = export.load(folder)
        return Checkpoint(folder, name, encoder, for_text(tokenizer), None, None)
    if kind == "modernbert":
        encoder, bias = read_modernbert(folder)
        return Checkpoint(folder, name, encoder, _read_tokenizer(folder), bias, None)
    if kind is not None:
        raise NotOurs(f"{folder}: a {kind} model — cramfast evaluates its own runs and ModernBERT folders")
    encoder, _ = checkpoint.load_model(folder)
    newest = checkpoint.newest(folder)
    run = folder if newest else folder.resolve().parent.parent
    step = (newest or folder.resolve()).name.removeprefix("step-").lstrip("0") or "0"
    return Checkpoint(folder, f"{run.resolve().name}, step {step}", encoder, _read_tokenizer(run), None, run)


def name_of(folder: Path) -> str:
    """What tables call a Hugging Face folder: its own name, with the run's where it is the export of one."""
    folder = folder.resolve()
    return f"{folder.parent.name}/hf" if folder.name == "hf" else folder.name


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: missing — restore it")
    try:
        return for_text(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises the bare class for any malformed file
        raise UserError(f"{path}: not a tokenizer ({error}) — restore the file") from error


def read_modernbert(folder: Path) -> tuple[Encoder, Tensor | None]:
    """(encoder, decoder bias or None) of a ModernBERT folder; the names and the mathematics are the same as ours.

    Raises:
        NotOurs: something that the encoder has not (listed in the message).
        UserError: no model.safetensors, or a damaged one.
    """
    written = read_json(folder / "config.json")
    path = folder / "model.safetensors"
    try:
        tensors = {name.removeprefix("model."): tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: unreadable ({error}) — fetch it again; pickled weights are never opened") from None
    bias, decoder = tensors.pop("decoder.bias", None), tensors.pop("decoder.weight", None)
    if decoder is not None and not torch.equal(decoder, tensors.get("embeddings.tok_embeddings.weight", decoder[:0])):
        raise NotOurs(f"{path}: the decoder is not tied to the embeddings — cramfast's encoder ties them")
    config = modernbert_config(written, f"{folder}/config.json")
    if written.get("classifier_activation", "gelu") == "linear":
        _drop_neutral_head(tensors, path)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
        encoder = Encoder(config)
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise NotOurs(
            f"{path}: does not fit cramfast's encoder ({reason}) — biases in matrices are not known"
        ) from None
    encoder.fills_masks = written.get("architectures") != ["ModernBertModel"]
    return encoder.eval(), bias


def modernbert_config(written: dict, where: str) -> ModelConfig:
    """The config that exports as `written`; the inverse of export.hf_config.

    Raises:
        NotOurs: a choice that our encoder has not.
        UserError: a missing key.
    """

    def one_of(key: str, value, *allowed):
        if value not in allowed:
            raise NotOurs(f"{where}: {key}={value!r} — cramfast's encoder knows {', '.join(map(repr, allowed))}")
        return value

    rope = written.get("rope_parameters") or {}

    def theta(old_key: str, new_key: str, default: float) -> float:
        return float(written.get(old_key) or rope.get(new_key, {}).get("rope_theta") or default)

    one_of("attention_bias", written.get("attention_bias", False), False)
    one_of("mlp_bias", written.get("mlp_bias", False), False)
    one_of("classifier_bias", written.get("classifier_bias", False), False)
    if written.get("architectures") != ["ModernBertModel"]:  # that has no decoder to tie
        one_of("tie_word_embeddings", written.get("tie_word_embeddings", True), True)
    try:
        return ModelConfig(
            vocab_size=written["vocab_size"],
            layers=written["num_hidden_layers"],
            width=written["hidden_size"],
            heads=written["num_attention_heads"],
            feedforward=written["intermediate_size"],
            max_len=written["max_position_embeddings"],
            activation=one_of("hidden_activation", written.get("hidden_activation", "gelu"), "gelu", "silu"),
            norm_bias=written.get("norm_bias", False),
            norm_eps=written.get("norm_eps", 1e-5),
            rope_theta_global=theta("global_rope_theta", "full_attention", 160000.0),
            rope_theta_local=theta("local_rope_theta", "sliding_attention", 10000.0),
            window=written.get("local_attention", 128),
            global_every=_global_every(written, where),
            head=one_of("classifier_activation", written.get("classifier_activation", "gelu"), "gelu", "linear")
            == "gelu",
            pad_id=written.get("pad_token_id", 0),
        )
    except KeyError as error:
        raise UserError(f"{where}: no key {error.args[0]!r} — restore the file") from None


def _global_every(written: dict, where: str) -> int:
    """The period of the global layers; the newer list of layer types wins, as in transformers 5.x."""
    kinds = written.get("layer_types")
    if kinds is None:
        return written.get("global_attn_every_n_layers", 3)
    later = [index for index, kind in enumerate(kinds) if index > 0 and kind == "full_attention"]
    every = later[0] if later else len(kinds)
    if any((kind == "full_attention") != (index % every == 0) for index, kind in enumerate(kinds)):
        raise NotOurs(f"{where}: layer_types has no period — cramfast's global layers are every n-th")
    return every


def _drop_neutral_head(tensors: dict[str, Tensor], path: Path) -> None:
    """Undo what export.hf_tensors does to a model without a head: its final norm stands in the head's place."""
    dense = tensors.pop("head.dense.weight")
    for part in ("weight", "bias"):
        if f"head.norm.{part}" in tensors:
            neutral = tensors[f"final_norm.{part}"]
            same = torch.equal(neutral, torch.full_like(neutral, float(part == "weight")))
            if not same or not torch.equal(dense, torch.eye(len(dense))):
                raise NotOurs(f"{path}: a linear head that is not the identity — cramfast's encoder has no such head")
            tensors[f"final_norm.{part}"] = tensors.pop(f"head.norm.{part}")
