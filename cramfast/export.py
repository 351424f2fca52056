"""A run as a Hugging Face folder that stock transformers (4.57 and 5.x) loads: python -m cramfast.export RUN OUT.

The weights keep their names, so the mapping is close to the identity; `max_difference` below proves it each time.
A model that ModernBERT cannot express is written in our own form, which `load` reads.
"""

import json
import math
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from cramfast.config import ModelConfig, from_json, to_json
from cramfast.errors import UserError, command
from cramfast.hf.check import TOLERANCE, max_difference, read_sentences
from cramfast.hf.modelcard import card
from cramfast.hf.tokens import words_alone_are_those_of_a_text
from cramfast.model.encoder import Encoder
from cramfast.runtime import atomic
from cramfast.runtime.arguments import program
from cramfast.runtime.jsonfile import read_json
from cramfast.session.checkpoint import load_model
from cramfast.session.record import read_record
from cramfast.text.giventokenizer import mended

FILES = frozenset(
    (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "README.md",
    )
)
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
OWN_TYPE = "cramfast"  # model_type of a folder that only `load` reads


@dataclass(frozen=True)
class ExportResult:
    """Where the folder is; the largest difference to transformers' logits (NaN if not compared); why stock
    transformers cannot load it ("" if it can)."""

    path: Path
    max_difference: float
    own_loader_reason: str


def export(run_dir: Path, out_dir: Path, check: bool = True, overwrite: bool = False) -> ExportResult:
    """Write the newest checkpoint of a run as a Hugging Face folder and compare it with transformers.

    The folder appears by one rename after the check, so a failure leaves nothing that looks complete.

    Args:
        run_dir: a run folder of cramfast.train.
        out_dir: the folder to make; a missing parent is made too.
        check: load the folder with the installed transformers and compare logits on held-out text.
        overwrite: replace an earlier export there; a folder that holds anything else is never replaced.

    Raises:
        UserError: no run or checkpoint, a damaged file, `out_dir` taken, the disk refused, logits that differ.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    _check_free(run_dir, out_dir, overwrite)
    model, config = load_model(run_dir)
    record = read_record(run_dir)
    tokenizer = _read_tokenizer(run_dir / "tokenizer.json", config)
    reason = own_loader_reason(config)
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    difference, words_alone = math.nan, None
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(partial, model, config, tokenizer, run_dir)
        if check:
            difference = _own_difference(partial, model) if reason else max_difference(partial, model, run_dir)
            words_alone = None if reason else words_alone_are_those_of_a_text(partial, read_sentences(run_dir))
        atomic.write_text(partial / "README.md", card(record, config, difference, reason, words_alone))
        _replace(partial, out_dir)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out_dir}: cannot be written ({error}) — free disk space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ExportResult(out_dir, difference, reason)


def rehearse(config: ModelConfig, fills_masks: bool, prepared: Path) -> None:
    """Export a model of this shape with weights that are not trained, check it, and throw it away: what would keep the
    export of a run back is known before its budget is spent.

    Args:
        fills_masks: whether its decoder will be trained.
        prepared: the text, whose tokenizer it gets.

    Raises:
        UserError: as export(), of the check.
    """
    if own_loader_reason(config):
        return  # nothing that stock transformers could read otherwise
    # One layer of each kind, and one more: the others are alike.
    config = replace(config, layers=min(config.layers, max(2, config.global_every + 1)))
    tokenizer = _read_tokenizer(prepared / "tokenizer.json", config)
    with torch.random.fork_rng(devices=[]):
        model = Encoder(config).eval()
    model.fills_masks = fills_masks
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), model, config, tokenizer, prepared)
        max_difference(Path(folder), model, prepared)


def _write(folder: Path, model: Encoder, config: ModelConfig, tokenizer: Tokenizer, source: Path) -> None:
    """Config, weights and tokenizer (from the folder `source`)."""
    ids = {name: tokenizer.token_to_id(token) for name, token in SPECIAL.items()}
    own = own_loader_reason(config)
    written = own_config(config, model.fills_masks) if own else hf_config(config, ids, model.fills_masks)
    _write_json(folder / "config.json", written)
    save_file(own_tensors(model) if own else hf_tensors(model), folder / "model.safetensors", {"format": "pt"})
    # safetensors lets only the owner read what it writes; the other files follow the umask.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    _write_tokenizer(source / "tokenizer.json", folder, config)


def load(folder: str | Path) -> tuple[Encoder, Tokenizer]:
    """Rebuild the encoder and tokenizer of a folder in our own form; float32, on the CPU.

    Raises:
        UserError: the folder is for stock transformers, or a file is missing or damaged.
    """
    folder = Path(folder)
    written = read_json(folder / "config.json")
    if written.get("model_type") != OWN_TYPE:
        what = "is for stock transformers — use AutoModelForMaskedLM.from_pretrained" if written else "no config.json"
        raise UserError(f"{folder}: {what if written else what + ' there — give an exported folder'}")
    config = from_json(ModelConfig, written.get("model"), str(folder / "config.json"))
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: unreadable ({error}) — export the run again") from error
    with torch.random.fork_rng(devices=[]):
        model = Encoder(config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit config.json ({error}) — export the run again") from error
    model.fills_masks = written.get("fills_masks", True)
    return model.eval(), _read_tokenizer(folder / "tokenizer.json", config)


def own_loader_reason(config: ModelConfig) -> str:
    """Why stock ModernBERT cannot express a config; "" when it can."""
    if config.positions == "sinusoidal":
        return "ModernBERT has rotary positions only, this model has sinusoidal ones"
    if config.first_norm:
        return "ModernBERT has no norm before the attention of its first layer, this model has"
    return ""


def hf_config(config: ModelConfig, ids: dict[str, int], fills_masks: bool = True) -> dict:
    """config.json for transformers, with the keys of 4.57 and of 5.x: each reads its own, and a 4.57 that meets only
    the new ones loads without a word and computes something else.

    Args:
        config: the model's shape.
        ids: token ids of pad, cls and sep.
        fills_masks: whether the decoder was trained; else the folder is named an encoder.
    """
    kinds = ("full_attention", "sliding_attention")
    thetas = (config.rope_theta_global, config.rope_theta_local)
    return {
        "architectures": ["ModernBertForMaskedLM" if fills_masks else "ModernBertModel"],
        "model_type": "modernbert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.feedforward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_activation": config.activation,
        "max_position_embeddings": config.max_len,
        "initializer_range": config.init_std,
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "attention_bias": False,
        "mlp_bias": False,
        "decoder_bias": False,
        "classifier_bias": False,
        "classifier_activation": "gelu" if config.head else "linear",
        "classifier_pooling": "mean",
        "sparse_prediction": False,
        # Untied, so that transformers says of a decoder that was never trained that its weights are new.
        "tie_word_embeddings": fills_masks,
        "torch_dtype": "float32",
        "pad_token_id": ids["pad"],
        "bos_token_id": ids["cls"],
        "cls_token_id": ids["cls"],
        "eos_token_id": ids["sep"],
        "sep_token_id": ids["sep"],
        "local_attention": config.window,
        # transformers 4.57:
        "global_attn_every_n_layers": config.global_every,
        "global_rope_theta": config.rope_theta_global,
        "local_rope_theta": config.rope_theta_local,
        # transformers 5.x:
        "layer_types": [kinds[i % config.global_every != 0] for i in range(config.layers)],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in zip(kinds, thetas, strict=True)
        },
    }


def hf_tensors(model: Encoder) -> dict[str, Tensor]:
    """The weights under ModernBERT's names.

    A model without prediction head gets one that changes nothing: identity matrix, linear activation, and our final
    norm as the head's norm behind a final norm of ones. LayerNorm of a LayerNorm is the same but for eps.
    """
    tensors = {}
    for name, weight in model.named_parameters():
        outside = name.startswith("head.")
        tensors[name if outside else f"model.{name}"] = weight.detach().float().contiguous()
    if model.head is None:
        for part, neutral in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
            if f"model.final_norm.{part}" in tensors:
                ours = tensors[f"model.final_norm.{part}"]
                tensors[f"head.norm.{part}"] = ours
                tensors[f"model.final_norm.{part}"] = neutral(ours)
        tensors["head.dense.weight"] = torch.eye(model.config.width)
    return tensors


def own_config(config: ModelConfig, fills_masks: bool = True) -> dict:
    """config.json of a folder in our own form; its model_type keeps transformers from guessing."""
    note = "stock transformers cannot load this folder; use cramfast.export.load(folder)"
    return {"model_type": OWN_TYPE, "note": note, "fills_masks": fills_masks, "model": to_json(config)}


def own_tensors(model: Encoder) -> dict[str, Tensor]:
    """The weights under our own names."""
    return {name: weight.detach().float().contiguous() for name, weight in model.named_parameters()}


def _own_difference(folder: Path, model: Encoder) -> float:
    """0.0 when the folder gives back every weight bitwise."""
    loaded = load(folder)[0]
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        if not torch.equal(ours, theirs):
            raise UserError(f"{folder.name}: {name} did not come back as written — the disk or memory may be faulty")
    return 0.0


def _read_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    if not path.exists():
        raise UserError(f"{path}: not found — give the run folder that cramfast.train wrote")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises the bare class for any malformed file
        raise UserError(f"{path}: not a tokenizer ({error}) — restore the file") from error
    missing = [token for token in SPECIAL.values() if tokenizer.token_to_id(token) is None]
    if missing:
        raise UserError(f"{path}: no {missing[0]} token — use a tokenizer made by cramfast.prepare")
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise UserError(f"{path}: more tokens than model.vocab_size={config.vocab_size} — it is of another run")
    return tokenizer


def _write_tokenizer(source: Path, folder: Path, config: ModelConfig) -> None:
    tokenizer, changes = mended(Tokenizer.from_file(str(source)))  # an older run's may frame pairs otherwise
    if changes:
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        shutil.copyfile(source, folder / "tokenizer.json")
    special = {f"{name}_token": token for name, token in SPECIAL.items()}
    _write_json(folder / "special_tokens_map.json", special)
    # model_input_names: ModernBERT takes no token_type_ids, and 4.57 raises TypeError when it gets some.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.max_len,
        "clean_up_tokenization_spaces": False,
    }
    # 4.57 sets it to False in tokenizer.json where its own file does not say.
    cutter = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in cutter:
        settings["add_prefix_space"] = cutter["add_prefix_space"]
    _write_json(folder / "tokenizer_config.json", settings | special)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check_free(run_dir: Path, out_dir: Path, overwrite: bool) -> None:
    # The whole command, as cramfast.train exports too, where no folder can be named.
    remedy = f"export to another folder: {program('export')} {run_dir} FOLDER"
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise UserError(f"{out_dir}: is a file — {remedy}")
    if out_dir.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{out_dir}: you are in it, and the export would take its place — {remedy}")
    held = {path.name for path in out_dir.iterdir()}
    if held and not overwrite:
        raise UserError(f"{out_dir}: not empty — choose another folder, or replace an earlier export with --overwrite")
    if held - FILES:
        raise UserError(f"{out_dir}: holds {min(held - FILES)}, which no export wrote — {remedy}")


def _replace(partial: Path, out_dir: Path) -> None:
    if out_dir.exists():
        old = out_dir.with_name(f".{out_dir.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        out_dir.rename(old)
        partial.rename(out_dir)
        shutil.rmtree(old)
    else:
        partial.rename(out_dir)


@dataclass(frozen=True)
class Arguments:
    """Write a run as a Hugging Face folder and check it against the installed transformers."""

    run: Path
    """Run folder, e.g. runs/NAME."""
    out: Path
    """Folder to make."""
    check: bool = True
    """Compare the logits with transformers before the folder appears."""
    overwrite: bool = False
    """Replace an earlier export."""


def main() -> None:
    """The command line."""
    import tyro
    from rich.console import Console

    arguments = tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Arguments), prog=program("export"))
    result = export(arguments.run, arguments.out, arguments.check, arguments.overwrite)
    Console(soft_wrap=True, highlight=False, markup=False).print(describe(result))


def describe(result: ExportResult) -> str:
    """What the console says about an export: where it is, how it was checked, how to load it."""
    if result.own_loader_reason:
        return (
            f"exported: {result.path}\nStock transformers cannot load it: {result.own_loader_reason}.\n"
            f'Load it with: from cramfast.export import load; model, tokenizer = load("{result.path}")'
        )
    if math.isnan(result.max_difference):
        return f"exported, not compared with transformers: {result.path}"
    import transformers

    within = (
        f"allowed {TOLERANCE:.0e}" if result.max_difference <= TOLERANCE else "as its own rounding to float32 explains"
    )
    return (
        f"exported: {result.path} (transformers {transformers.__version__} gives the same logits: largest difference "
        f"{result.max_difference:.1e}, {within})"
    )


if __name__ == "__main__":
    command(main)
