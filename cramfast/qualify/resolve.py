"""What a run's operators take on a GPU: from its own record, from what this card has shown before, or from a trial now.

What was asked for by name is not tried and never replaced; `--kernels auto=stock` leaves everything else to stock
PyTorch without a trial.
"""

from dataclasses import replace
from pathlib import Path

import torch

from cramfast.config import TrainConfig
from cramfast.errors import UserError
from cramfast.kernels import dispatch
from cramfast.qualify import cache
from cramfast.qualify.cache import Outcome
from cramfast.qualify.candidates import of, tasks
from cramfast.qualify.regime import regime_of
from cramfast.qualify.trial import Trial
from cramfast.qualify.verdict import Verdict, settle
from cramfast.runtime.distributed import ALONE, Team
from cramfast.runtime.progress import Stages
from cramfast.session import kernelchoice
from cramfast.session.runfolder import refusals_named

SECONDS = 60.0  # that a first run on a card pays at most
RECORD = "kernels.json"  # in a run's folder: what it runs on, whatever the cache says later


def needed(config: TrainConfig) -> bool:
    """Whether anything is to be settled: on a GPU, unless stock PyTorch was asked for."""
    return config.device == "cuda" and not kernelchoice.stock_alone(config.kernels)


def resolve(
    config: TrainConfig, run_dir: Path, prepared: Path, followed: Path | None = None, team: Team = ALONE
) -> None:
    """Settle in every process what the run's operators take; process 0 finds out, and writes it into the run.

    Args:
        followed: a run that this one repeats.

    Raises:
        UserError: the processes have different cards or software, or the run's record is damaged.
    """
    dtype = getattr(torch, config.dtype)
    settle([], config.device, dtype)
    if not needed(config):
        return
    outcome = team.first(lambda: of_run(config, run_dir, prepared, followed))
    check(outcome, config, team)
    settle(list(outcome.verdicts), config.device, dtype)


def of_run(config: TrainConfig, run_dir: Path, prepared: Path, followed: Path | None) -> Outcome:
    """The outcome that this run goes by, which is written to its folder."""
    wanted, place = tasks(config), cache.place_of(regime_of(config))
    recorded = cache.read(run_dir / RECORD) or (followed and cache.read(followed / RECORD))
    if recorded and recorded.place == place and {t.name for t in wanted} <= {v.name for v in recorded.verdicts}:
        outcome = recorded
    else:
        outcome = of_card(config, prepared)
        if recorded:
            outcome = replace(outcome, verdicts=tuple(as_begun(v, recorded) for v in outcome.verdicts))
    if not (run_dir / RECORD).exists() or outcome != recorded:
        with refusals_named(run_dir):
            cache.write(run_dir / RECORD, outcome)
    names = {task.name for task in wanted}
    return replace(outcome, verdicts=tuple(v for v in outcome.verdicts if v.name in names))


def as_begun(verdict: Verdict, recorded: Outcome) -> Verdict:
    """The verdict of this card, with what the run has used so far wherever that qualified here too."""
    before = next((v.implementation for v in recorded.verdicts if v.name == verdict.name), verdict.implementation)
    if before == verdict.implementation:
        return verdict
    if before == verdict.floor or verdict.problems.get(before) == "":
        return replace(verdict, implementation=before, reason=f"as this run began; here, {verdict.reason}")
    return replace(verdict, reason=f"{verdict.reason}; this run began on {before}")


def of_card(config: TrainConfig, prepared: Path | None, seconds: float = SECONDS, anew: bool = False) -> Outcome:
    """What the cache knows of this card, or a trial, which is then kept there.

    Args:
        prepared: the run's text, for a whole microbatch; without it one of random words is compared, and the first run
            compares again.
        seconds: what a trial may take.
        anew: forget what the cache knows.
    """
    wanted, regime = tasks(config), regime_of(config)
    place = cache.place_of(regime)
    path = cache.path_of(place, wanted)
    known = None if anew else from_cache(path)
    if known and (known.whole or not prepared):
        return known
    what = "a whole microbatch is compared" if known else "kernels are tried"
    print(f"{what} on this card, once, in {seconds:g} s at most; kept in {path}", flush=True)
    with Stages() as show, Trial(config, wanted, regime, seconds, show) as trial:
        verdicts = list(known.verdicts) if known else trial.operators()
        verdicts, compared = trial.microbatch(verdicts, prepared)
    outcome = Outcome(place, tuple(verdicts), whole=compared and prepared is not None)
    try:
        cache.write(path, replace(outcome, whole=prepared is not None))  # a second run does not pay again either way
    except OSError as error:
        print(f"note: {path} cannot be written ({error.strerror or error}): the next run tries them again")
    return outcome


def from_cache(path: Path) -> Outcome | None:
    """What is kept there; a damaged file is told of and counts as none."""
    try:
        return cache.read(path)
    except UserError as error:
        print(f"note: {error}")
        return None


def check(outcome: Outcome, config: TrainConfig, team: Team) -> None:
    """Process 0 has decided; the others see whether that holds on their card too.

    Raises:
        UserError: in all processes, where it does not in one.
    """
    mine = cache.place_of(regime_of(config))
    other = [key for key, value in mine.items() if outcome.place.get(key) != value]
    blocked = [v.line for v in outcome.verdicts if obstacle(v, config)]
    (wrong,) = team.added(bool(other or blocked))
    if wrong:
        here = ", ".join(f"{key} {mine[key]}, not {outcome.place.get(key)}" for key in other) or "; ".join(blocked)
        raise UserError(
            f"process {team.rank}: {here or 'another process differs'}: what process 0 has tried says nothing of all "
            "cards of this run — use equal cards and software, or --kernels auto=stock"
        )


def obstacle(verdict: Verdict, config: TrainConfig) -> str:
    """Why an implementation cannot run on this process's card; "" when it can."""
    dtype = of(verdict.op, getattr(torch, config.dtype))
    return dispatch.obstacle(verdict.op, verdict.implementation, config.device, dtype, verdict.windowed)


def lines(outcome: Outcome) -> list[str]:
    """One for each operator, in the order of the trial."""
    return [verdict.line for verdict in outcome.verdicts]
