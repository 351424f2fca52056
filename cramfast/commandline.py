"""The command line of cramfast.train: a preset by a recipe, flags that override it, and which run to go on with."""

import argparse
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from cramfast.config import TrainConfig, config_hash, differing_key, flatten, profiled_steps, read_config
from cramfast.errors import UserError
from cramfast.recipes import choose_device, resolve, starting_config
from cramfast.runtime import distributed
from cramfast.runtime.arguments import VOCABULARY, program, under_one_name
from cramfast.session.budget import parse_budget
from cramfast.session.runfolder import find_resumed, new_name
from cramfast.text import hub
from cramfast.text.tokenizer import KINDS, is_trained

# Key -> whether it changes nothing, and what would make it count.
IDLE: dict[str, tuple[Callable[[TrainConfig], bool], str]] = {
    "muon_rate": (lambda config: config.optimizer != "muon", "use --optimizer muon"),
    "short_fraction": (lambda config: config.short_sequence_len == 0, "use --short-sequence-len"),
    "probe_pairs": (lambda config: not config.probe_data, "use --probe-data"),
    "curation.similarity": (
        lambda config: config.curation.duplicates != "near",
        "use --curation.duplicates near",
    ),
    "model.window": (lambda config: config.model.global_every == 1, "use --model.global-every 3"),
    "model.rope_theta_local": (lambda config: config.model.global_every == 1, "use --model.global-every 3"),
    "model.rope_theta_global": (lambda config: config.model.positions != "rotary", "use --model.positions rotary"),
    "model.vocab_size": (lambda config: config.tokenizer not in KINDS, "use --tokenizer wordpiece or bpe"),
}


@dataclass(frozen=True)
class Arguments:
    """Pretrain a BERT-class encoder from raw text and leave a checkpoint, a report and a Hugging Face folder.

    Without arguments: docstrings found on this machine, and a device, precision and preset chosen for it.
    On several GPUs, or processes: torchrun --nproc-per-node K -m cramfast.train.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    run_dir: Path | None = None
    """Folder of the run; by default runs/<time>-<preset>."""
    resume: str | None = None
    """Run folder to go on with, or auto: the newest run (or --run-dir) if there is one, else a new run."""
    schedule_from_here: bool = False
    """With --resume: the learning rate rises and falls once more over what is left of the budget."""
    replay: Path | None = None
    """Run folder whose recorded budget is followed step by step, so that its weights come out again."""
    qualify_seconds: float = 60.0
    """On a GPU: what the trial of the kernels may take before the first run on a card."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for, with every "auto" resolved.

    Attributes:
        curation_flags: keys of the curation that flags name; the others are a recipe's, or a run's.
        budget_before: of the run that is resumed; "" of a new one.
    """

    config: TrainConfig
    run_dir: Path
    resuming: bool
    replay: Path | None
    curation_flags: tuple[str, ...]
    budget_before: str = ""
    schedule_from_here: bool = False
    qualify_seconds: float = 60.0


def parse(args: list[str] | None = None) -> Request:
    """Read the command line; unknown flags end the program with a suggestion.

    Raises:
        UserError: a value that cannot work, or a folder that does not fit.
    """
    args = under_one_name(args, dict([VOCABULARY]))
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--recipe", "--device", "--resume", "--replay", "--run-dir"):
        early.add_argument(flag, *({"--run_dir"} if flag == "--run-dir" else ()), nargs="?")
    first, others = early.parse_known_args(args)
    if first.resume and first.replay:
        raise UserError("--resume with --replay: a replay is a new run — use one of them")
    resume = first.resume or ("auto" if distributed.restarted() else None)
    if distributed.may_restart() and first.run_dir is None and resume in (None, "auto"):
        raise UserError("torchrun --max-restarts without --run-dir: a restart would not know the run — name its folder")
    resumed = find_resumed(resume, first.run_dir and Path(first.run_dir)) if resume else None
    source = resumed or (first.replay and Path(first.replay))
    if source:
        default = read_config(source / "config.json")
    else:
        asked = first.device if first.device in ("cpu", "cuda") else "auto"
        default = starting_config(first.preset, first.recipe, choose_device(asked))
    arguments = tyro.cli(
        tyro.conf.configure(tyro.conf.FlagConversionOff)(Arguments),
        args=args,
        default=Arguments(config=default),
        prog=program("train"),
    )
    config = located(resolve(arguments.config))
    if first.replay and (key := differing_key(read_config(source / "config.json"), config)):
        raise UserError(f"--replay {source} with another {key}: a replay keeps every value — leave that flag out")
    run_dir = resumed or arguments.run_dir or new_name(config.preset)
    if not resumed and (run_dir / "config.json").exists():
        raise UserError(f"{run_dir}: holds a run already — go on with --resume {run_dir}, or choose another --run-dir")
    if arguments.schedule_from_here and not resumed:
        raise UserError("--schedule-from-here without --resume: a new run's schedule begins here — leave it out")
    flags = [word.partition("=")[0][2:].replace("-", "_") for word in others if word.startswith("--")]
    refuse_idle(config, flags)
    curation_flags = tuple(name.removeprefix("curation.") for name in flags if name.startswith("curation."))
    before = default.budget if resumed else ""
    return Request(
        config, run_dir, resumed is not None, arguments.replay, curation_flags, before, arguments.schedule_from_here,
        arguments.qualify_seconds,
    )  # fmt: skip


def refuse_idle(config: TrainConfig, flags: list[str]) -> None:
    """Raise UserError for a flag that changes nothing with the others, for whoever gave it expects that it does.

    Args:
        flags: keys that the command line names, with "_" for "-".
    """
    for key, (idle, remedy) in IDLE.items():
        if key in flags and idle(config):
            raise UserError(f"--{key.replace('_', '-')} has no effect here — leave it out, or {remedy}")
    budget, profiled = parse_budget(config.budget), config.profile_steps and profiled_steps(config.profile_steps)
    if profiled and budget.unit == "steps" and profiled[0] > budget.amount:
        raise UserError(f"--profile-steps {config.profile_steps}: the run ends at step {budget.amount:.0f} — use less")


def located(config: TrainConfig) -> TrainConfig:
    """The config with absolute paths to text, tokenizer and probe, which mean the same wherever the run is resumed."""
    data = (hub.located(source) if hub.is_hub(source) else os.path.abspath(source) for source in config.data)
    tokenizer = config.tokenizer if is_trained(config.tokenizer) else os.path.abspath(config.tokenizer)
    probe_data = config.probe_data and os.path.abspath(config.probe_data)
    return replace(config, data=tuple(data), tokenizer=tokenizer, probe_data=probe_data)


def print_config(config: TrainConfig) -> None:
    """Every key of the resolved config on a few lines, the model's keys together."""
    flat = flatten(config)
    flat["data"] = flat["data"] or "(docstrings)"
    print(f"config {config_hash(config)}:")
    for model in (True, False):
        words = (f"{key}={value}" for key, value in flat.items() if key.startswith("model.") == model)
        print(textwrap.fill(" ".join(words), 116, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
