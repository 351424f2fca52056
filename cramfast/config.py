"""What a run is: two frozen dataclasses, their JSON form and their hash."""

import hashlib
import json
import math
import re
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from cramfast.errors import UserError

# Keys that may change when a run is resumed: how many steps there are, who looks, and where the text and its tokenizer
# lie, whose contents runfolder.create compares. With another number of threads torch may split a sum differently, and
# the last bits of what follows differ.
HARMLESS_KEYS = (
    "budget", "eval_interval", "checkpoint_interval", "threads", "graph", "profile_steps", "nvtx", "data", "tokenizer",
    "probe_data", "probe_pairs",
)  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The encoder; every choice but `positions="sinusoidal"` and `first_norm` exists in stock ModernBERT."""

    vocab_size: int = 32768
    """Entries of the vocabulary, a multiple of 64; fewer where the text does not yield as many. --vocab-size, its name
    in cramfast.prepare, is taken too."""
    layers: int = 16
    """Number of Transformer layers."""
    width: int = 768
    """Width of the hidden states."""
    heads: int = 12
    """width / heads must be 32, 64 or 128."""
    feedforward: int = 1536
    """Width of the gated hidden layer; its input matrix has twice as many rows."""
    max_len: int = 512
    """Longest sequence the position tables hold, in tokens."""
    activation: Literal["gelu", "silu"] = "gelu"
    """Activation inside the gated hidden layer."""
    norm_bias: bool = False
    """Biases in the LayerNorms."""
    norm_eps: float = 1e-5
    """Added to the variance in the LayerNorms."""
    positions: Literal["rotary", "sinusoidal"] = "rotary"
    """Rotary embeddings of queries and keys, or sinusoids added to the input."""
    rope_theta_global: float = 160000.0
    """Base of the rotary angles in global layers; stock ModernBERT's own, so that every transformers reads it."""
    rope_theta_local: float = 10000.0
    """Base of the rotary angles in local layers."""
    window: int = 128
    """Local layers attend where |p - q| <= window // 2."""
    global_every: int = 1
    """Layer i attends globally when i is a multiple of this; 1 makes every layer global."""
    first_norm: bool = False
    """Normalise before the attention of layer 0 too, as the paper does; stock ModernBERT does not."""
    head: bool = True
    """Dense, activation and norm before the decoder, as stock ModernBERT has."""
    init: Literal["scaled", "normal"] = "scaled"
    """scaled: truncated normal, output matrices smaller by sqrt(2 * layers); normal: one normal for all."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    pad_id: int = 0
    """Id of [PAD], 0 in every tokenizer of ours; it pads the comparison with transformers."""

    def __post_init__(self):
        for key in ("vocab_size", "layers", "width", "heads", "feedforward", "max_len", "global_every"):
            require(getattr(self, key) >= 1, f"model.{key}={getattr(self, key)}", "use 1 or more")
        require(self.vocab_size % 64 == 0, f"model.vocab_size={self.vocab_size}", "use a multiple of 64")
        require(
            self.width % self.heads == 0 and self.width // self.heads in (32, 64, 128),
            f"model.width={self.width} with model.heads={self.heads}",
            "choose heads so that width / heads is 32, 64 or 128",
        )
        require(self.feedforward % 16 == 0, f"model.feedforward={self.feedforward}", "use a multiple of 16")
        require(self.window >= 0, f"model.window={self.window}", "use 0 or more")
        require(0 <= self.pad_id < self.vocab_size, f"model.pad_id={self.pad_id}", "use the id of [PAD], 0")


@dataclass(frozen=True)
class Curation:
    """Which documents are left out; each step is off by default, and counted in manifest.json and curation.json."""

    min_letters: float = 0.0
    """Least share of letters among a document's characters, white space aside, such as 0.7; 0 keeps all."""
    max_repeated_lines: float = 1.0
    """Largest share of a document in lines that it held before, such as 0.3; 1 keeps all."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """exact: of equal documents the first stays; near: of similar ones too."""
    similarity: float = 0.8
    """Of a near-duplicate: least estimated Jaccard similarity, over windows of 24 bytes, to a document that stays."""
    max_tokens_per_char: float = 0.0
    """Drop a document of so many tokens a character or more: 0.25 in Cramming, 0.3 for its C4; 0 keeps all."""

    def __post_init__(self):
        for key in ("min_letters", "max_repeated_lines"):
            require(0 <= getattr(self, key) <= 1, f"curation.{key}={getattr(self, key)}", "use a share from 0 to 1")
        require(
            0.5 <= self.similarity <= 1,
            f"curation.similarity={self.similarity}",
            "use 0.5 to 1; less is no duplicate",
        )
        require(
            0 <= self.max_tokens_per_char <= 4,
            f"curation.max_tokens_per_char={self.max_tokens_per_char}",
            "use a value such as 0.25, or 0 to keep all; a character makes at most 4 tokens",
        )


@dataclass(frozen=True)
class TrainConfig:
    """One run, resolved; saved as config.json and hashed."""

    preset: str = "base"
    """Size that the other values start from: tiny, mini, small or base; crammed_bert is base with recipe crammed."""
    recipe: Literal["cramfast", "crammed"] = "cramfast"
    """cramfast: the best that our ablations support; crammed: the paper's model and training."""
    model: ModelConfig = field(default_factory=ModelConfig)

    data: tuple[str, ...] = ()
    """Text files, folders, globs, hf:NAME, or one prepared folder; nothing: docstrings found on this machine."""
    tokenizer: str = "auto"
    """wordpiece (lower-cased ASCII), bpe (case and Unicode kept), auto (wordpiece where ASCII can spell the text, else
    bpe), kmer[:K][:overlapping] (sequences of DNA or proteins), or a tokenizer.json."""
    heldout_fraction: float = 0.01
    """Share of the tokens kept out of training; more of a small text, which is said."""
    documents: Literal["blocks", "lines", "files"] = "blocks"
    """What a document is in a .txt file: a block between blank lines, a line, or the whole file."""
    text_key: str = "text"
    """Field of .jsonl, column of tables that holds the text; OUTER.INNER for one in another."""
    format: Literal["auto", "text", "jsonl", "csv", "tsv", "parquet", "arrow", "wikiextractor", "fasta"] = "auto"
    """What all files are, whatever their names; auto goes by these."""
    encoding: str = "utf-8"
    """Of text files and rows in them, such as latin-1 or utf-16."""
    skip_malformed: int = 0
    """Rows that may be left out where they cannot be read; one more is an error."""
    curation: Curation = field(default_factory=Curation)
    order: Literal["shuffled", "sentences", "likelihood"] = "shuffled"
    """Sequences of an epoch: in random order, those with most "." tokens first, or those of the commonest tokens. In a
    sorted order, a budget below one epoch never sees what comes last."""
    sequence_len: int = 128
    """Longest sequence, in tokens, [CLS] and [SEP] included."""
    short_sequence_len: int = 0
    """Longest sequence at the start, such as 64; 0: sequence_len from the first update on."""
    short_fraction: float = 0.25
    """Share of the budget with short_sequence_len; then a new epoch begins."""
    objective: Literal["mlm", "rtd"] = "mlm"
    """mlm: predict masked words; rtd: replaced-token detection beside a small generator, which fills them (ELECTRA)."""
    masking: Literal["bert", "all_mask"] = "bert"
    """bert: 80 % [MASK], 10 % a random token, 10 % kept; all_mask: always [MASK]."""
    mask_fraction: float = 0.3
    """Share of the tokens predicted at the start of training."""
    mask_fraction_end: float = 0.3
    """Share at the end; moved linearly with the spent budget, in steps of 0.01."""

    budget: str = "24h"
    """24h, 90m, 300s, 2e9tokens, 1e15flops or 500steps; may be raised on resume."""
    microbatch_tokens: int = 16384
    """Tokens of one forward and backward pass at most; fewer where a GPU's memory does not hold them."""
    batch_tokens: int = 524288
    """Tokens of one update after the ramp."""
    ramp_fraction: float = 0.6
    """Share of the budget over which the batch grows linearly from one microbatch to batch_tokens."""
    lr: float = 1e-3
    """Largest learning rate."""
    schedule: Literal["triangle", "one_cycle", "wsd", "linear", "cosine", "trapezoid"] = "wsd"
    """wsd: warm-up, stable, decay by 1 - sqrt; trapezoid is its former name."""
    optimizer: Literal["adamw", "stable_adamw", "muon"] = "adamw"
    """stable_adamw: AdamW with update clipping; muon: Muon for the hidden matrices, AdamW for the rest."""
    muon_rate: float = 1.0
    """Muon's learning rate over lr; at 1 its updates are as large as AdamW's, and runs of minutes do better at 3."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.98
    """AdamW's decay of the mean squared gradient."""
    adam_eps: float = 1e-12
    """Added to AdamW's denominator."""
    weight_decay: float = 0.01
    """Not applied to norms and biases."""
    max_norm: float = 0.5
    """Largest global norm of the gradient; 0 switches clipping off."""
    ema_decay: float = 0.0
    """Decay of the weights' moving average, which evaluation and export take; 0 switches it off."""
    z_loss: float = 0.0
    """Weight of (log Z)^2 in the training loss, Z the normaliser of the softmax; 1e-4 is usual, 0 switches it off."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto: the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Storage of matrices and activations; norms, master weights and the optimizer stay float32."""
    half_accumulation: bool = False
    """float16 only: matmuls of forward pass and input gradients add up in half precision, for GeForce cards."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Replay each microbatch from a CUDA graph; auto: on a GPU, where the kernels allow it."""
    seed: int = 0
    """Of the initial weights, the order of the text and the masks."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch, or gives each process of torchrun its share of the cores."""
    kernels: tuple[str, ...] = ()
    """OPERATOR=IMPLEMENTATION in place of what is chosen, as attention=flash_attn; cramfast.doctor lists them. On a GPU
    auto=stock leaves the others to stock PyTorch; else what this card has shown to be right and faster replaces it."""
    eval_interval: float = 300.0
    """Seconds of training between held-out evaluations; they cost no budget."""
    heldout_tokens: int = 131072
    """Size of the fixed held-out set, in tokens."""
    probe_data: str = ""
    """BLiMP, as one .jsonl or a folder of them: some of its pairs are judged at every held-out evaluation, at no cost
    to the budget; nothing: no probe."""
    probe_pairs: int = 20
    """Pairs of each of BLiMP's paradigms that the probe takes; 0 takes all."""
    checkpoint_interval: float = 600.0
    """Seconds of training between checkpoints; saving costs no budget."""
    profile_steps: str = ""
    """A:B profiles steps A to B - 1, by torch.profiler or for nsys and ncu (docs/profiling.md)."""
    nvtx: Literal["off", "phases", "layers"] = "off"
    """Ranges for nsys and ncu around data, forward, backward and optimizer; layers: around every layer too."""

    def __post_init__(self):
        for key in ("mask_fraction", "mask_fraction_end"):
            require(0 < getattr(self, key) < 1, f"{key}={getattr(self, key)}", "use a value between 0 and 1")
        require(0 < self.heldout_fraction < 1, f"heldout_fraction={self.heldout_fraction}", "use a value such as 0.01")
        require(
            8 <= self.sequence_len <= self.model.max_len,
            f"sequence_len={self.sequence_len}",
            f"use 8 to model.max_len={self.model.max_len}, or raise model.max_len",
        )
        require(
            self.short_sequence_len == 0 or 8 <= self.short_sequence_len < self.sequence_len,
            f"short_sequence_len={self.short_sequence_len}",
            f"use 8 or more, less than sequence_len={self.sequence_len}, or 0 for none",
        )
        require(0 < self.short_fraction < 1, f"short_fraction={self.short_fraction}", "use a value between 0 and 1")
        require(
            self.microbatch_tokens >= self.sequence_len,
            f"microbatch_tokens={self.microbatch_tokens}",
            f"use at least sequence_len={self.sequence_len}",
        )
        require(
            self.batch_tokens >= self.microbatch_tokens,
            f"batch_tokens={self.batch_tokens}",
            f"use at least microbatch_tokens={self.microbatch_tokens}",
        )
        for key in ("lr", "muon_rate"):
            require(0 < getattr(self, key) < math.inf, f"{key}={getattr(self, key)}", "use a finite value above 0")
        require(0 <= self.seed < 2**63, f"seed={self.seed}", "use 0 or more")
        require(0 <= self.ramp_fraction <= 1, f"ramp_fraction={self.ramp_fraction}", "use 0 to 1")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"{key}={getattr(self, key)}", "use 0 up to, not including, 1")
        require(0 <= self.ema_decay < 1, f"ema_decay={self.ema_decay}", "use 0 up to, not including, 1")
        for key in ("skip_malformed", "threads", "weight_decay", "max_norm", "adam_eps", "z_loss", "probe_pairs"):
            require(getattr(self, key) >= 0, f"{key}={getattr(self, key)}", "use 0 or more")
        require(
            not self.half_accumulation or self.dtype in ("auto", "float16"),
            f"half_accumulation with dtype={self.dtype}",
            "use --dtype float16, or leave it out",
        )
        require(
            self.profile_steps == "" or profiled_steps(self.profile_steps) is not None,
            f"profile_steps={self.profile_steps!r}",
            "use A:B with 1 <= A < B, such as 10:13",
        )
        for key in ("eval_interval", "checkpoint_interval", "heldout_tokens"):
            require(getattr(self, key) > 0, f"{key}={getattr(self, key)}", "use a value above 0")


def profiled_steps(text: str) -> range | None:
    """The steps that A:B means, or None when it means none."""
    match = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", text)
    steps = range(int(match[1]), int(match[2])) if match else range(0)
    return steps or None


def require(condition: bool, what: str, remedy: str) -> None:
    """Raise UserError("what — remedy") unless the condition holds."""
    if not condition:
        raise UserError(f"{what} is not possible — {remedy}")


def to_json(config: Any) -> dict[str, Any]:
    """Plain dict of a config; tuples become lists."""
    return json.loads(json.dumps(asdict(config)))


def from_json(cls: type, values: Any, where: str = "config.json") -> Any:
    """Rebuild a config, or another dataclass of plain values, from its JSON form.

    Raises:
        UserError: a key this version does not know, or a value of another type than the key's.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: no JSON object — restore the file")
    unknown = sorted(set(values) - {f.name for f in fields(cls)})
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r} — written by another version of cramfast?")
    hints = typing.get_type_hints(cls)
    converted = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            converted[name] = from_json(hints[name], value, f"{where}: {name}")
            continue
        converted[name] = tuple(value) if isinstance(value, list) else value
        if not has_type(converted[name], hints[name]):
            raise UserError(f"{where}: {name}={value!r} has the wrong type — restore the file")
    return cls(**converted)


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: plain, a union, Literal or tuple[TYPE, ...]; an int is a float too."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(has_type(item, inner[0]) for item in value)
    if inner:
        return any(has_type(value, kind) for kind in inner)
    return type(value) is hint or (hint is float and type(value) is int)


def read_config(path: Path) -> TrainConfig:
    """Read config.json of a run.

    Raises:
        UserError: the file is missing, unreadable or damaged.
    """
    remedy = "give a run folder made by python -m cramfast.train"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found — {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}) — {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged JSON ({error}) — restore it, or start a new run") from None
    if isinstance(values, dict) and (missing := [key for key in ("preset", "model", "data") if key not in values]):
        raise UserError(f"{path}: no key {missing[0]!r} — restore the file, or start a new run")
    return from_json(TrainConfig, values, str(path))


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.width": 768, "lr": 0.001, ...}: one level, dotted names."""
    flat = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flat.update(flatten(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value})
    return flat


def differing_key(old: TrainConfig, new: TrainConfig) -> str | None:
    """Name of the first key that would change the weights of a resumed run, or None."""
    before, after = flatten(old), flatten(new)
    return next((key for key in before if key not in HARMLESS_KEYS and before[key] != after[key]), None)


def config_hash(config: TrainConfig) -> str:
    """12 hex digits over every key that a resumed run must share."""
    kept = {key: value for key, value in flatten(config).items() if key not in HARMLESS_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
