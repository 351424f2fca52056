"""Where a run starts from, before the command line overrides it: a preset, which is a size, trained by a recipe.

A preset is a function from the kind of device to a config; a recipe is a function from such a config to another.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from cramfast.config import Curation, ModelConfig, TrainConfig
from cramfast.errors import UserError
from cramfast.runtime.arguments import program

T = TypeVar("T")
Preset = Callable[[str], TrainConfig]
PAPER_BATCH = 8192 * 128  # tokens


def tiny(device: str) -> TrainConfig:
    """2 layers of 128, 1.4 M parameters: a trial of the whole path in minutes."""
    return TrainConfig(
        preset="tiny",
        model=ModelConfig(vocab_size=8192, layers=2, width=128, heads=2, feedforward=256),
        budget="4m",
        microbatch_tokens=4096 if device == "cpu" else 65536,
        batch_tokens=4096 if device == "cpu" else 65536,
        lr=3e-3,
        eval_interval=60.0,
        checkpoint_interval=60.0,
    )


def mini(device: str) -> TrainConfig:
    """4 layers of 256, 4.8 M parameters: what a laptop trains over a coffee."""
    return TrainConfig(
        preset="mini",
        model=ModelConfig(vocab_size=8192, layers=4, width=256, heads=4, feedforward=512),
        budget="4m",
        microbatch_tokens=4096 if device == "cpu" else 65536,
        batch_tokens=4096 if device == "cpu" else 131072,
        lr=2e-3,
        eval_interval=60.0,
        checkpoint_interval=60.0,
    )


def small(device: str) -> TrainConfig:
    """8 layers of 512, 29 M parameters: a night on a CPU, an hour on a GPU."""
    return TrainConfig(
        preset="small",
        model=ModelConfig(vocab_size=16384, layers=8, width=512, heads=8, feedforward=1024),
        budget="8h" if device == "cpu" else "1h",
        microbatch_tokens=8192 if device == "cpu" else 65536,
        batch_tokens=65536 if device == "cpu" else 262144,
        lr=1.5e-3,
    )


def base(device: str) -> TrainConfig:
    """16 layers of 768, 120 M parameters: a day on one GPU."""
    return TrainConfig(
        preset="base",
        microbatch_tokens=8192 if device == "cpu" else 65536,
        batch_tokens=524288,
        heldout_tokens=65536 if device == "cpu" else 262144,
    )


def crammed_bert(device: str) -> TrainConfig:
    """The paper's own model, 119.6 M parameters: `base` by recipe `crammed`, under its name."""
    return replace(crammed(base(device)), preset="crammed_bert")


def cramfast(size: TrainConfig) -> TrainConfig:
    """The best that the ablations in docs/log support: so far no option beats the preset as it stands for long."""
    return replace(size, recipe="cramfast")


def crammed(size: TrainConfig) -> TrainConfig:
    """The paper's model and training, faithfully: Geiping and Goldstein, arXiv:2212.14034.

    Its batch is that of its one size; other sizes keep their own batch, and all of them their learning rate and budget.
    Its filter is meant for 32,768 words: with fewer, the same text takes more tokens, so the limit is higher.
    """
    curation = Curation(max_tokens_per_char=0.25 if size.model.vocab_size >= 32768 else 0.3)
    model = replace(
        size.model, max_len=128, norm_bias=True, norm_eps=1e-12, positions="sinusoidal", global_every=1,
        first_norm=True, head=False, init="normal",
    )  # fmt: skip
    return replace(
        size, recipe="crammed", model=model, tokenizer="wordpiece", curation=curation,
        order="sentences", objective="mlm",
        sequence_len=128, short_sequence_len=0, masking="bert", mask_fraction=0.25, mask_fraction_end=0.25,
        batch_tokens=PAPER_BATCH if size.preset == "base" else size.batch_tokens,
        ramp_fraction=0.6, schedule="triangle", optimizer="adamw", beta1=0.9, beta2=0.98, adam_eps=1e-12,
        weight_decay=0.01, max_norm=0.5, ema_decay=0.0, z_loss=0.0,
    )  # fmt: skip


PRESETS: dict[str, Preset] = {preset.__name__: preset for preset in (tiny, mini, small, base, crammed_bert)}
RECIPES = {recipe.__name__: recipe for recipe in (cramfast, crammed)}


def starting_config(preset: str | None, recipe: str | None, device: str) -> TrainConfig:
    """The config of a preset by a recipe on "cpu" or "cuda".

    No preset chooses base on a GPU and mini on a CPU; no recipe is cramfast, and crammed for crammed_bert.

    Raises:
        UserError: no such preset or recipe, or crammed_bert by another recipe than its own.
    """
    size = plain(preset or ("base" if device == "cuda" else "mini"), device)
    train_by = named("recipe", recipe or size.recipe, RECIPES)
    if size.preset == "crammed_bert" and train_by is not crammed:
        raise UserError(f"preset=crammed_bert with recipe={recipe} is not possible — use --preset base")
    return size if size.preset == "crammed_bert" else train_by(size)


def plain(preset: str, device: str) -> TrainConfig:
    """The config of a preset by no recipe: AdamW under warm-up, stable, decay.

    Raises:
        UserError: no such preset.
    """
    return named("preset", preset, PRESETS)(device)


def named(key: str, name: str, known: Mapping[str, T]) -> T:
    """known[name]; `key` says in the error what was asked for.

    Raises:
        UserError: no such name.
    """
    if name not in known:
        raise UserError(f"{key}={name!r} does not exist — choose one of {', '.join(known)}")
    return known[name]


def choose_device(asked: str) -> str:
    """ "cuda" when asked for or, under "auto", when a GPU is there.

    Raises:
        UserError: a GPU was asked for and this torch sees none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device='cuda' but torch sees no GPU — {program('doctor')} says why; or use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def choose_dtype(device: str) -> str:
    """The fastest storage type this device multiplies natively."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    return "bfloat16" if cpu_multiplies_bfloat16() else "float32"


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has bfloat16 dot products: 4.6 times the float32 rate on an AMD Zen 5; emulated, a loss."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
    words = set(text.split())
    return bool(words & {"avx512_bf16", "amx_bf16"})


def resolve(config: TrainConfig) -> TrainConfig:
    """Replace every "auto" by what this machine gives."""
    device = choose_device(config.device)
    dtype = choose_dtype(device) if config.dtype == "auto" else config.dtype
    if dtype == "float16" and device == "cpu":
        raise UserError("dtype='float16' on a CPU has no kernels — use --dtype bfloat16 or float32")
    if config.nvtx != "off" and torch.version.cuda is None:
        raise UserError(f"nvtx={config.nvtx!r}: this torch is built without CUDA — use --profile-steps alone")
    return replace(config, device=device, dtype=dtype)
