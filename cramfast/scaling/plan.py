"""What to train: model sizes x shapes x token budgets x seeds, as a Python function here or as TOML.

Every (shape, budget, seed) is a run of its own, so that its learning rate has come down to zero by its last token: the
loss in the middle of a longer run is not what that budget buys (Hoffmann et al., arXiv:2203.15556).
"""

import json
import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cramfast.config import ModelConfig, TrainConfig, flatten, require
from cramfast.errors import UserError
from cramfast.recipes import plain, resolve, starting_config

REFERENCE_WIDTH = 256  # the preset mini


@dataclass(frozen=True)
class Size:
    """Shapes with nearly the same number of parameters, and what each of them trains for.

    Attributes:
        shapes: "LAYERSxWIDTH" or "LAYERSxWIDTHxFEEDFORWARD". The first has a feed-forward width of twice its width
            unless it says another; that of the others is solved for the same number of parameters.
        tokens: budgets; one run each.
        seeds: of weights, order and masks; one run each.
        lr: peak learning rate; 0 follows learning_rate().
    """

    shapes: tuple[str, ...]
    tokens: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    lr: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Attributes:
    preset: what all runs start from.
    lr: peak learning rate at width 256; learning_rate() says how it falls with the width.
    minutes: the calibrated estimate must not exceed this; else every budget is divided by the same factor. 0: no limit.
    settings: keys of TrainConfig, as "batch_tokens", that differ from the preset.
    evaluations: held-out evaluations of a run, the one before its first step left out.
    """

    name: str
    sizes: tuple[Size, ...]
    preset: str = "mini"
    lr: float = 2e-3
    minutes: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    evaluations: int = 4


@dataclass(frozen=True)
class Run:
    """One training run of a plan; `reference` marks the first shape of its size, which the law is fitted to."""

    name: str
    size: int
    shape: str
    reference: bool
    tokens: int
    seed: int
    config: TrainConfig


def smoke(device: str) -> Plan:
    """Ten runs of seconds each on a CPU: does everything work; its fit means nothing."""
    return Plan(
        "smoke",
        (
            Size(("2x64", "3x64"), (16384,), (0, 1)),
            Size(("2x64",), (4096, 8192)),
            Size(("2x96",), (4096, 8192)),
            Size(("2x128",), (4096, 16384)),
        ),
        preset="tiny",
        settings={"microbatch_tokens": 1024, "batch_tokens": 1024, "ramp_fraction": 0.0, "heldout_tokens": 8192},
        evaluations=2,
    )


def cpu(device: str) -> Plan:
    """Five sizes of 1 to 9 million parameters, up to 8 million tokens each: an hour on two cores.

    The batch stays at 1,024 tokens without a ramp: the shortest run still makes a thousand updates, and runs of
    different length differ in nothing but the number of updates. With 4,096, half a million tokens end at the unigram
    entropy and a million just below it, whatever the size, and no law of size fits that (docs/log, 2026-11-27).
    Vocabulary and sequences are those of mini.
    """
    tokens = (1e6, 2e6, 4e6, 8e6)
    return Plan(
        "cpu",
        (
            Size(("2x96",), tokens),
            Size(("2x128",), tokens),
            Size(("4x192",), tokens),
            Size(("4x256", "2x320", "8x192", "12x160"), (1e6,), (0, 1, 2)),
            Size(("4x256",), (2e6, 4e6, 8e6)),
            Size(("6x320",), (1e6, 2e6)),
        ),
        lr=1e-3,
        minutes=60,
        settings={"microbatch_tokens": 1024, "batch_tokens": 1024, "ramp_fraction": 0.0, "heldout_tokens": 65536},
    )


def gpu(device: str) -> Plan:
    """Six sizes of 6.9 to 107.6 million parameters, up to 128 million tokens each: 20 minutes on a large GPU.

    The batch is 32,768 tokens, so that the shortest run makes 244 updates. Never run on a GPU.
    """
    tokens = (8e6, 16e6, 32e6, 64e6)
    return Plan(
        "gpu",
        (
            Size(("4x256",), (*tokens, 128e6)),
            Size(("6x384",), (*tokens, 128e6)),
            Size(("8x512", "4x640", "12x448", "24x320"), (32e6,), (0, 1, 2)),
            Size(("8x512",), (8e6, 16e6, 64e6, 128e6)),
            Size(("12x640",), tokens),
            Size(("16x768",), tokens),
        ),
        preset="small",
        minutes=20,
        settings={"microbatch_tokens": 32768, "batch_tokens": 32768, "ramp_fraction": 0.0, "heldout_tokens": 262144},
    )


def rehearsal(device: str) -> Plan:
    """The runs of `gpu` with a thousandth of their tokens: 20 minutes on one core; its fit means nothing."""
    plan = gpu(device)
    sizes = tuple(replace(size, tokens=tuple(tokens / 1000 for tokens in size.tokens)) for size in plan.sizes)
    small = {"microbatch_tokens": 1024, "batch_tokens": 1024, "heldout_tokens": 8192}
    return replace(plan, name="rehearsal", sizes=sizes, minutes=0, settings=plan.settings | small, evaluations=2)


PLANS: dict[str, Callable[[str], Plan]] = {make.__name__: make for make in (smoke, cpu, gpu, rehearsal)}


def learning_rate(width: int, reference: float) -> float:
    """Peak learning rate: `reference` at width 256, falling with the root of the width.

    The presets tiny to base follow the same line, from 2e-3, to within a sixth. It is a rule, not a search: a size
    whose best rate lies elsewhere looks worse than it is.
    """
    return reference * math.sqrt(REFERENCE_WIDTH / width)


def parse_shape(text: str) -> tuple[int, int, int | None]:
    """(layers, width, feed-forward width or None) of "4x256" or "4x256x512".

    Raises:
        UserError: another form, or a width that no head width divides.
    """
    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)(?:[x×]([1-9]\d*))?", text.strip())
    if not match:
        raise UserError(f"shape {text!r} is not understood — write LAYERSxWIDTH, as 4x256")
    layers, width = int(match[1]), int(match[2])
    require(width % 32 == 0, f"shape {text!r}", "use a width that is a multiple of 32")
    return layers, width, int(match[3]) if match[3] else None


def parameters(model: ModelConfig) -> tuple[int, int]:
    """(all parameters, those outside the embedding table), without building the model; norms have no bias."""
    width, norms = model.width, 2 * model.layers + 1 + bool(model.head) + bool(model.first_norm)
    body = model.layers * (4 * width**2 + 3 * width * model.feedforward) + norms * width
    body += width**2 if model.head else 0
    return body + model.vocab_size * width, body


def shaped(base: ModelConfig, shape: str, total: int | None = None) -> ModelConfig:
    """The base model in another shape; with `total`, of so many parameters, by its feed-forward width.

    Raises:
        UserError: no feed-forward width comes within 3 % of that.
    """
    layers, width, feedforward = parse_shape(shape)
    heads = width // 64 if width % 64 == 0 else width // 32
    model = replace(base, layers=layers, width=width, heads=heads, feedforward=feedforward or 2 * width)
    if total is None or feedforward:
        return model
    missing = total - parameters(replace(model, feedforward=16))[0]
    steps = 1 + round(missing / (layers * 3 * width * 16))
    if steps >= 1 and abs(parameters(model := replace(model, feedforward=16 * steps))[0] / total - 1) <= 0.03:
        return model
    raise UserError(f"shape {shape!r} cannot have {total:,} parameters — make it narrower, or give it fewer layers")


def expand(plan: Plan, data: Path, device: str, threads: int = 0, dtype: str = "auto") -> list[Run]:
    """Every run of a plan, those of the smallest budgets first; `data` is a prepared folder.

    Raises:
        UserError: a shape, key or value that cannot be, or the same run twice.
    """
    base = resolve(replace(base_config(plan, device), data=(str(data),), threads=threads, dtype=dtype))
    runs: dict[str, Run] = {}
    for number, size in enumerate(plan.sizes):
        require(bool(size.shapes and size.tokens and size.seeds), f"plan {plan.name}: an empty size", "name its shapes")
        total = parameters(shaped(base.model, size.shapes[0]))[0]
        for shape in size.shapes:
            model = shaped(base.model, shape, None if shape == size.shapes[0] else total)
            lr = size.lr or learning_rate(model.width, plan.lr)
            for tokens in size.tokens:
                for seed in size.seeds:
                    config = replace(base, model=model, lr=lr, seed=seed, budget=f"{round(tokens)}tokens")
                    name = f"{model.layers}x{model.width}-{round(tokens)}-s{seed}"
                    if name in runs:
                        raise UserError(f"plan {plan.name}: the run {name} stands in it twice — remove one")
                    shape_name = f"{model.layers}x{model.width}"
                    first = shape == size.shapes[0]
                    runs[name] = Run(name, number, shape_name, first, round(tokens), seed, config)
    return sorted(runs.values(), key=lambda run: run.tokens * parameters(run.config.model)[1])


def base_config(plan: Plan, device: str) -> TrainConfig:
    """What all runs of a plan have in common: its preset, by no recipe, with other values for some keys.

    AdamW under warm-up, stable, decay: the shift test needs the plateau, and a claim is about AdamW's kernel.

    Raises:
        UserError: a key that it does not have, or that the plan sets itself.
    """
    config = replace(plain(plan.preset, device), device=device)
    own = {"model", "data", "budget", "seed", "lr", "preset", "device", "dtype", "threads", "curation", "recipe"}
    known = {f.name for f in fields(config)} - own
    for key in plan.settings:
        require(key in known, f"plan {plan.name}: settings.{key}", f"use one of {', '.join(sorted(known))}")
    return replace(config, **plan.settings)


def flags(config: TrainConfig) -> list[str]:
    """The command line of cramfast.train that gives this config."""
    default, words = flatten(starting_config(config.preset, None, config.device)), ["--preset", config.preset]
    for key, value in flatten(config).items():
        if key == "preset" or value == default[key]:
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return words


def shortened(plan: Plan, factor: float) -> Plan:
    """The plan with every budget divided by `factor`, to two significant digits."""
    sizes = (replace(s, tokens=tuple(float(f"{tokens / factor:.2g}") for tokens in s.tokens)) for s in plan.sizes)
    return replace(plan, sizes=tuple(sizes))


def read_plan(name: str, device: str) -> Plan:
    """A plan by its name, or from a TOML file.

    Raises:
        UserError: no such plan or file, or something in it that is not understood.
    """
    if name in PLANS:
        return PLANS[name](device)
    path = Path(name)
    if path.suffix != ".toml":
        raise UserError(f"plan {name!r} does not exist — choose {', '.join(PLANS)}, or name a .toml file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}) — name a plan's .toml file") from None
    except ValueError as error:
        raise UserError(f"{path}: no TOML ({error}) — mend it, as docs/scaling/README.md shows") from None
    return from_dict({"name": path.stem} | values | {"sizes": values.pop("sizes", [])}, str(path))


def from_dict(values: dict[str, Any], where: str) -> Plan:
    """A plan from its JSON or TOML form.

    Raises:
        UserError: an unknown key, a missing one, or a value of the wrong kind.
    """
    try:
        sizes = []
        for number, size in enumerate(values["sizes"]):
            unknown = set(size) - {f.name for f in fields(Size)}
            require(
                not unknown, f"{where}: sizes[{number}].{min(unknown, default='')}", "use shapes, tokens, seeds, lr"
            )
            sizes.append(Size(**{key: tuple(v) if isinstance(v, list | tuple) else v for key, v in size.items()}))
        unknown = set(values) - {f.name for f in fields(Plan)}
        require(not unknown, f"{where}: key {min(unknown, default='')!r}", "see docs/scaling/README.md for the keys")
        require(bool(sizes), f"{where}: a plan without [[sizes]]", "name at least one, with shapes and tokens")
        for size in sizes:
            require(all(tokens > 0 for tokens in size.tokens), f"{where}: tokens={size.tokens}", "use positive numbers")
        return Plan(**(values | {"sizes": tuple(sizes)}))
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where}: not a plan ({error}) — docs/scaling/README.md shows one") from None


def to_json(plan: Plan) -> dict[str, Any]:
    """Plain dict of a plan; tuples become lists."""
    return json.loads(json.dumps(asdict(plan)))
