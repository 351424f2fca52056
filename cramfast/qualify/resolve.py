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
    config: TrainConfig, run_dir: Path, prepared: Path, followed: Path | None = None, team: Team = ALONE,
    seconds: float = SECONDS,
) -> None:  # fmt: skip
    """Settle in every process what the run's operators take; process 0 finds out, and writes it into the run.

    Args:
        followed: a run that this one repeats.
        seconds: what a trial may take.

    Raises:
        UserError: the processes have different cards or software, or the run's record is damaged.
    """
    dtype = getattr(torch, config.dtype)
    settle([], config.device, dtype)
    if not needed(config):
        return
    outcome = team.first(lambda: of_run(config, run_dir, prepared, followed, seconds))
    check(outcome, config, team)
    settle(list(outcome.verdicts), config.device, dtype)


def of_run(
    config: TrainConfig, run_dir: Path, prepared: Path, followed: Path | None, seconds: float = SECONDS
) -> Outcome:
    """The outcome that this run goes by, which is written to its folder."""
    wanted, place = tasks(config), cache.place_of(regime_of(config))
    recorded = cache.read(run_dir / RECORD) or (followed and cache.read(followed / RECORD))
    if recorded and recorded.place == place and {t.name for t in wanted} <= {v.name for v in recorded.verdicts}:
        outcome = recorded
    else:
        outcome = of_card(config, prepared, seconds, run_dir=run_dir)
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


def of_card(
    config: TrainConfig,
    prepared: Path | None,
    seconds: float = SECONDS,
    anew: bool = False,
    run_dir: Path | None = None,
) -> Outcome:
    """What the cache knows of this card, or a trial, of which all that was judged is kept there.

    Args:
        prepared: the run's text, for a whole microbatch; without it one of random words is compared, and the first run
            compares again.
        seconds: what a trial may take.
        anew: forget what the cache knows.
        run_dir: the run, for messages.
    """
    place = cache.place_of(regime_of(config))
    path = cache.path_of(place, tasks(config))
    if not anew and (outcome := settled(from_cache(path), config, prepared)):
        return outcome
    with cache.locked(path, seconds):
        known = None if anew else from_cache(path)
        # Another process may have found out meanwhile.
        return settled(known, config, prepared) or tried(
            config, prepared, seconds, known or Outcome(place, ()), run_dir
        )


def settled(known: Outcome | None, config: TrainConfig, prepared: Path | None) -> Outcome | None:
    """The outcome for a run, if all that can be tried has been, and its microbatch was compared."""
    if known is None or any(verdict.open for verdict in known.verdicts):
        return None
    failed = known.whole.get(cache.microbatch(config, prepared is not None, known.verdicts))
    if failed is None and any(verdict.replaces_floor for verdict in known.verdicts):
        return None
    verdicts = (v.failed(failed[v.name]) if failed and v.name in failed else v for v in known.verdicts)
    return replace(known, verdicts=tuple(verdicts))


def tried(config: TrainConfig, prepared: Path | None, seconds: float, known: Outcome, run_dir: Path | None) -> Outcome:
    """A trial of all that is not known yet."""
    wanted, regime, before = tasks(config), regime_of(config), known.verdicts
    path = cache.path_of(known.place, wanted)
    what = "kernels are tried" if not before else "what is left is tried"
    if before and not any(verdict.open for verdict in before):
        what = "a whole microbatch is compared"
    kept = f"kept in {path}" if path else "not kept, as there is no home folder: set XDG_CACHE_HOME to a folder"
    print(f"{what} on this card, once, in {seconds:g} s at most; {kept}", flush=True)
    with Stages() as show, Trial(config, wanted, regime, seconds, show, before) as trial:
        found = trial.operators()
        verdicts, compared = trial.microbatch(found, prepared)
    whole = dict(known.whole)
    if compared:
        pairs = zip(found, verdicts, strict=True)
        failed = {v.name: v.problems[f.implementation] for f, v in pairs if v.implementation != f.implementation}
        whole[cache.microbatch(config, prepared is not None, found)] = failed
    keep(path, Outcome(known.place, tuple(found), whole))
    if path and (not compared or any(verdict.open for verdict in found)):
        run = f" --run-dir {run_dir}" if run_dir else ""
        print(
            f"note: not all could be tried; what is known is in {path}, and the next new run goes on from there — "
            f"python -m cramfast.doctor --qualify{run} may take longer"
        )
    return Outcome(known.place, tuple(verdicts), whole)


def keep(path: Path | None, outcome: Outcome) -> None:
    """Write the cache, if there is a place for it; a refusal is told of and stops nothing."""
    try:
        if path:
            cache.write(path, outcome)
    except OSError as error:
        print(f"note: {path} cannot be written ({error.strerror or error}): the next run tries them again")


def from_cache(path: Path | None) -> Outcome | None:
    """What is kept there; a damaged file, or one that may not be read, is told of and counts as none."""
    try:
        return cache.read(path) if path else None
    except UserError as error:
        print(f"note: {error}")
        return None


def remember(config: TrainConfig, run_dir: Path, departed: list[tuple[Verdict, str]]) -> None:
    """Write into the run's record and the cache in what these departed while they ran: neither this run when it is
    resumed nor the next new one takes them again."""
    for path in (run_dir / RECORD, cache.path_of(cache.place_of(regime_of(config)), tasks(config))):
        if known := from_cache(path):
            verdicts = known.verdicts
            for verdict, why in departed:
                verdicts = tuple(marked(v, verdict, why) for v in verdicts)
            keep(path, replace(known, verdicts=verdicts))


def marked(kept: Verdict, departed: Verdict, why: str) -> Verdict:
    """What is kept of an operator, without the implementation that departed."""
    if kept.name != departed.name:
        return kept
    if kept.implementation == departed.implementation:
        return kept.failed(why)
    return replace(kept, problems={**kept.problems, departed.implementation: why})


def check(outcome: Outcome, config: TrainConfig, team: Team) -> None:
    """Process 0 has decided; the others see whether that holds on their card too.

    Raises:
        UserError: in all processes, where it does not in one.
    """
    mine, other = cache.place_of(regime_of(config)), []
    if any(verdict.replaces_floor for verdict in outcome.verdicts):  # stock PyTorch was not tried, and runs everywhere
        other = [key for key, value in mine.items() if key != cache.OWN and outcome.place.get(key) != value]
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
