"""The tiers in their order: stored, fitted model, neighbour, other predictions, default. Writes nothing."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from moecache import routing
from moecache.devices import Place
from moecache.dispatch import nearest
from moecache.dispatch.any_routing import ByRouting, LeastWorst, Turns, by_turns, least_worst
from moecache.dispatch.before_tuning import left_out, proven
from moecache.dispatch.lookup import Lookup
from moecache.kernels.contract import Op
from moecache.predict.ranking import NAMES, fitted_to, rank
from moecache.schemas.config import Config
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem
from moecache.schemas.rule import decide as ruled
from moecache.schemas.timing import By, Choice, Tier, Timing, Winner
from moecache.schemas.warm import OPS
from moecache.store import Answer
from moecache.team import ALONE, Team

# A device that everything fits: its search space names the configs that this one refuses.
ROOMY = {"shared_bytes": 1 << 40, "max_threads": 1 << 20, "waves_per_unit": 1 << 20}


@dataclass(frozen=True)
class Ask:
    """One question. `failed` holds the configs that raised in this process; `strict` counts only what was measured
    here; `team` are the ranks that must answer alike; `alternating` puts two configs into one call, see
    `kernels.registry.alternating`."""

    op: Op
    problem: Problem
    place: Place
    variant: str = ""
    topk_ids: torch.Tensor | None = None
    failed: Collection[str] = ()
    strict: bool = False
    team: Team = ALONE
    alternating: Any = None


def decide(ask: Ask, lookup: Lookup) -> Choice:
    """The best answer without tuning."""
    choice = stored(ask, lookup)
    if choice is None:
        choice, ask = stored(ask, lookup, elsewhere=True), _balanced(ask, lookup)
        if choice is not None and (ask.op.name == "moe_sort" or fitted_to(ask.problem)):
            choice = _foreseen(ask, lookup, choice) or choice
    if choice is None:
        choice = _learnt(ask, lookup) or _neighbour(ask, lookup) or _foretold(ask, lookup) or _predicted(ask, lookup)
    if choice is None:
        config = _usable(ask, lookup)[0]
        choice = Choice(config=config, tier="default", reason="the static default: the op predicts no times")
    return choice


def explained(choice: Choice, blocked: str) -> Choice:
    """An answer whose reason says why it is not measured here, if something blocked that."""
    if not blocked or choice.tier == "measured":
        return choice
    return choice.model_copy(update={"reason": f"{choice.reason}; not measured here: {blocked}"})


def blocked(ask: Ask, mode: str, capturing: bool, seconds: float, called: bool = True) -> str:
    """Why this problem may not be tuned now; '' when it may. Ranks that tune together never do where an op is `called`:
    what one of them has in its tables and another has not must not decide who comes."""
    if mode != "tune":
        return f"mode={mode}"
    if capturing:
        return "a graph is being captured"
    if ask.place.backend is None:
        return f"this machine has no {ask.problem.arch} with {ask.problem.units} units"
    if ask.variant:
        return f"variant={ask.variant} was asked for"
    if called and ask.team.size > 1:
        return "its ranks measure it together, in a warm-up"
    return "" if seconds > 0 else "the tuning budget is 0"


def static(ask: Ask, why: str) -> Choice:
    """The op's static default."""
    return Choice(config=_space(ask)[0], tier="default", reason=f"{why}: the static default")


def stored(ask: Ask, lookup: Lookup, elsewhere: bool = False) -> Choice | None:
    """The winner of this very problem, else its best timing that may be used here; of a problem that leaves its routing
    open, what serves any routing. What another product took counts only if `elsewhere`."""
    found = lookup.known(ask.op.name, ask.place).get(ask.problem.key)
    if found is None:
        return None if ask.problem.routing else robust(ask, lookup, elsewhere)
    winner, tier, file = found
    if ask.place.foreign(winner.environment) and not elsewhere:
        return None
    if ask.variant or refused(ask, winner.config):
        return _runner_up(ask, lookup, elsewhere)
    return served(winner, tier, file, ask.place)


def served(winner: Winner, tier: Tier, file: str, place: Place) -> Choice:
    """A stored winner as a choice."""
    told, there, here = f"{winner.median_us:.2f} µs", winner.environment, place.environment.model_dump()
    if winner.default_us is not None:
        told += f" against {winner.default_us:.2f} µs of the default"
    told += f", best of {winner.candidates}"
    if winner.tied > 1:
        told += f", tied with {winner.tied - 1}"
    where = "in this environment"
    if tier != "measured":
        differ = [f"{k} {v or '?'} (here {here[k] or '?'})" for k, v in there.model_dump().items() if here[k] != v]
        where = f"elsewhere, with {', '.join(differ)}"
    known: dict[str, Any] = {"source": file, "expected_us": winner.median_us, "product": place.foreign(there)}
    return Choice(config=winner.config, tier=tier, reason=f"measured {where}: {told}", **known)


def robust(ask: Ask, lookup: Lookup, elsewhere: bool = False) -> Choice | None:
    """The config that loses least in its worst routing bucket, of those measured at this token count; beside it two
    that lose less by turns, where one is not enough.

    For a captured graph, whose replays may have any routing, and for calls whose routing nobody knows. What failed
    under one routing serves none.
    """
    by_routing = lookup.by_routing(ask.problem, ask.place)
    foreign = {name: ask.place.foreign(winner.environment) for name, (winner, *_) in by_routing.winners.items()}
    winners = {
        name: answer
        for name, answer in by_routing.winners.items()
        if name and (answer[1] == "measured" or not ask.strict) and (elsewhere or not foreign[name])
    }
    if len(winners) == 1:
        (bucket,) = winners
        only = ask.problem.model_copy(update={"routing": bucket})
        choice = stored(replace(ask, problem=only, failed={*ask.failed, *by_routing.bad}), lookup, elsewhere)
        reason = f"any routing, of which {bucket} alone is measured"
        return choice and choice.model_copy(update={"reason": f"{reason}: {choice.reason}"})
    usable = {
        name
        for name, config in by_routing.configs.items()
        if name not in by_routing.bad and ask.variant in ("", config.variant) and not refused(ask, config)
    }
    times = {b: {n: us for n, us in by_routing.times[b].items() if n in usable} for b in winners}
    if (best := least_worst(times)) is None:
        return None
    turns = by_turns(ask.alternating, ask.problem, times, by_routing.configs, best, ask.failed)
    choice = _for_any(best, turns, by_routing, winners)
    return choice.model_copy(update={"product": ", ".join(sorted({foreign[name] for name in winners} - {""}))})


def _for_any(best: LeastWorst, turns: Turns | None, by_routing: ByRouting, winners: Mapping[str, Answer]) -> Choice:
    timed, elsewhere = len(best.losses), sum(winners[bucket][1] != "measured" for bucket in best.losses)
    of = f"each of {timed}" if timed == len(winners) else f"those {timed} in which it was timed, of {len(winners)}"
    reason = f"any routing: at most {100 * best.worst:.1f} % behind the best in {of} measured routing buckets"
    reason += f"; {elsewhere} of them measured elsewhere" if elsewhere else ""
    reason += f"; captured: {turns.both}, at most {100 * turns.worst:.1f} % behind" if turns else ""
    files = ", ".join(sorted({winners[bucket][2] for bucket in best.losses}))
    tier: Tier = "unverified" if elsewhere else "measured"
    both = turns and turns.both
    return Choice(config=by_routing.configs[best.name], tier=tier, reason=reason, source=files, alternatives=both)


def digest(names: Iterable[str], place: Place, lookup: Lookup, alternating: Callable[[str], Any]) -> str:
    """sha256 over problem, config and tier of every winner and stored prediction that could be served here, and over
    what would serve any routing."""
    digest = hashlib.sha256()
    for name in sorted(names):
        groups = Counter[Problem]()
        for winner, tier, _ in lookup.known(name, place).values():
            digest.update(f"{winner.problem.key}\t{winner.config.name}\t{tier}\n".encode())
            groups[winner.problem.any_routing] += 1
        for problem in (each for each, buckets in groups.items() if buckets > 1):
            by_routing = lookup.by_routing(problem, place)
            best = least_worst(by_routing.times)
            turns = best and by_turns(alternating(name), problem, by_routing.times, by_routing.configs, best)
            told = f"{best and best.name}" + (f"\t{turns.both}" if turns else "")
            digest.update(f"{problem.key}\t{told}\n".encode())
        for row, _ in lookup.predictions(None, op=name, vendor=place.device.vendor, arch=place.device.arch):
            digest.update(f"{row.problem.key}\t{row.config.name}\t{row.device}\n".encode())
    return digest.hexdigest()


def _balanced(ask: Ask, lookup: Lookup) -> Ask:
    """The same question with balanced routing where it is left open. A user's op says what its key says."""
    problem = ask.problem
    if problem.routing or ask.op.name not in OPS:
        return ask
    bucket = _uniform(problem.tokens, problem.experts, problem.topk)
    failed = {*ask.failed, *_recorded_bad(ask, lookup)}
    return replace(ask, problem=problem.model_copy(update={"routing": bucket}), failed=failed)


@lru_cache(maxsize=1024)
def _uniform(tokens: int, experts: int, topk: int) -> str:
    """The routing bucket of a uniform draw."""
    return routing.bucket(routing.histogram(routing.draw("uniform", tokens, experts, min(topk, experts)), experts))


def known(ask: Ask, lookup: Lookup) -> dict[str, Any]:
    """What is known of the candidates of a question, as arguments of `tune`. Callers hold the dispatcher's lock."""
    place = ask.place
    won = stored(ask, lookup)
    seed = won or stored(ask, lookup, elsewhere=True)
    rows = [row for row, _ in lookup.timings(ask.problem) if row.environment == place.environment]
    space, failed = ask.op.space(ask.problem, place.device), lookup.failed(ask.problem)
    incumbent, good = seed.config if seed else _told(ask, lookup), proven(lookup.by_routing(ask.problem, place), place)
    return {"incumbent": incumbent, "proven": good, "without": left_out(rows, space, won is not None, failed)}


def _told(ask: Ask, lookup: Lookup) -> Config | None:
    """The config that a table of another project names for such calls, on this product if there is one."""
    if (told := getattr(ask.op, "told", None)) is None:
        return None
    rows = [row for row, _ in lookup.timings(told(ask.problem)) if row.told and not refused(ask, row.config)]
    return min(rows, key=lambda row: bool(ask.place.foreign(row.environment))).config if rows else None


def _runner_up(ask: Ask, lookup: Lookup, elsewhere: bool) -> Choice | None:
    """What wins among the stored timings that may be used: of one variant, or where the winner may not be."""
    here, groups = ask.place.environment, dict[tuple[str, str], list[Timing]]()
    for row, file in lookup.timings(ask.problem):
        usable = row.median_us is not None and ask.variant in ("", row.config.variant) and not refused(ask, row.config)
        if usable and row.environment.flags == here.flags and (elsewhere or not ask.place.foreign(row.environment)):
            groups.setdefault((row.environment.id, file), []).append(row)
    won = []
    for (place, file), rows in groups.items():
        us, name, *_ = ruled(row.entry for row in rows).won
        won.append((place != here.id, us, name, next(row for row in rows if row.config.name == name), file))
    if not won:
        return None
    other, us, _, row, file = min(won, key=lambda each: each[:3])
    what = f"best timing of variant {ask.variant}" if ask.variant else "next best, as the winner may not be used here"
    tier: Tier = "unverified" if other else "measured"
    product = ask.place.foreign(row.environment)
    reason = f"{what}: {us:.2f} µs" + (f" on {product}" if product else "")
    return Choice(config=row.config, tier=tier, reason=reason, source=file, expected_us=us, product=product)


def _neighbour(ask: Ask, lookup: Lookup) -> Choice | None:
    """The winner of the nearest stored problem whose config fits this one."""
    soft = tuple(getattr(ask.op, "soft_dims", ()))
    near = []
    for winner, tier, file in lookup.near(ask.problem, ask.place, soft):
        distance = nearest.distance(ask.problem, winner.problem, soft)
        if distance is not None and ask.variant in ("", winner.config.variant):
            foreign = bool(ask.place.foreign(winner.environment))
            near.append(((foreign, distance), tier != "measured", winner.problem.key, winner, file))
    for _, _, _, winner, file in sorted(near, key=lambda n: n[:3]):
        if not refused(ask, winner.config):
            differ = ", ".join(map(str, nearest.differences(ask.problem, winner.problem)))
            reason = f"winner of the nearest measured problem, which has {differ}"
            return Choice(config=winner.config, tier="neighbour", reason=reason, source=file)
    return None


def _foretold(ask: Ask, lookup: Lookup) -> Choice | None:
    """A stored prediction that was made with the rates of this device: nothing has to be ranked then."""
    bad = _recorded_bad(ask, lookup)
    for row, file in lookup.predictions(ask.problem):
        fits = ask.variant in ("", row.config.variant) and not refused(ask, row.config)
        if fits and row.config.name not in bad and _rates(row.device, ask.place.device):
            by: By = row.model if row.model in NAMES else ""
            told = NAMES.get(by, row.model or "?")
            reason = f"predicted with the rates of {row.device}, by {told}: {row.predicted_us:.2f} µs"
            return Choice(
                config=row.config, tier="predicted", reason=reason, source=file, expected_us=row.predicted_us, by=by
            )
    return None


def _rates(product: str, device: Device) -> bool:
    """Whether a device has the rates of a known product, whatever its driver calls it."""
    found = (known for known in KNOWN.values() if known.name == product)
    return any((k.bandwidth_gbs, k.peak_tflops) == (device.bandwidth_gbs, device.peak_tflops) for k in found)


def _foreseen(ask: Ask, lookup: Lookup, measured: Choice) -> Choice | None:
    """A prediction for this device in place of what another product was fastest with."""
    choice = _learnt(ask, lookup) or _foretold(ask, lookup) or _predicted(ask, lookup)
    if choice is None:
        return None
    reason = f"{choice.reason}; on {measured.product}, which is another product, {measured.config.name} was fastest"
    return choice.model_copy(update={"reason": reason})


def _learnt(ask: Ask, lookup: Lookup) -> Choice | None:
    """A prediction of the cost model where it was fitted to such calls: nearer to the best than what is the best of a
    neighbour (benchmarks/notes/unmeasured.md)."""
    choice = _predicted(ask, lookup) if fitted_to(ask.problem) else None
    return choice if choice is not None and choice.by in ("fitted", "shipped") else None


def _predicted(ask: Ask, lookup: Lookup) -> Choice | None:
    """The lowest predicted time; None where nothing is predicted."""
    usable, device = _usable(ask, lookup), ask.place.device
    ranking = rank(ask.op, ask.problem, usable, device, lookup.tiers.learned(ask.op.name, device))
    if ranking.best is None:
        return None
    us = ranking.us[ranking.best]
    reason = f"lowest predicted time of {len(usable)} candidates: {us:.2f} µs by {NAMES[ranking.by]}"
    return Choice(
        config=usable[ranking.best], tier="predicted", reason=reason, source="cost model", expected_us=us, by=ranking.by
    )


def _usable(ask: Ask, lookup: Lookup) -> list[Config]:
    """The search space without what is recorded as unusable here; never empty."""
    space, bad = _space(ask), _recorded_bad(ask, lookup)
    return [config for config in space if config.name not in bad] or space[:1]


def _recorded_bad(ask: Ask, lookup: Lookup) -> set[str]:
    here = ask.place.environment.id
    rows = [row for row, _ in lookup.timings(ask.problem) if row.environment.id == here]
    return {row.config.name for row in rows if row.status != "ok" and lookup.blamed(row)} | set(ask.failed)


def _space(ask: Ask) -> list[Config]:
    """The search space, of the variant that was asked for.

    Raises:
        InvalidInput: it is empty, with the reason why.
    """
    every = ask.op.space(ask.problem, ask.place.device)
    space = [config for config in every if ask.variant in ("", config.variant)]
    if space:
        return space
    device = ask.place.device
    what = f"variant {ask.variant!r} of {ask.op.name}" if ask.variant else ask.op.name
    roomy = ask.op.space(ask.problem, device.model_copy(update=ROOMY))
    for config in roomy:
        if ask.variant in ("", config.variant):
            reason = ask.op.fits(ask.problem, config, device)
            raise InvalidInput(f"{what} cannot serve {ask.problem.key} on {device.name}: {reason}")
    if not roomy:
        raise InvalidInput(f"op {ask.op.name} knows no problem {ask.problem.key}: no config of its fits")
    allowed = ", ".join(sorted({config.variant for config in every})) or "none"
    raise InvalidInput(f"{what} does not exist for {ask.problem.key} on {device.name}; allowed are {allowed}")


def refused(ask: Ask, config: Config) -> str:
    """Why a config may not serve; '' when it may. Stored configs come from files: none is believed."""
    if config.name in ask.failed:
        return "it failed in this process"
    try:
        return ask.op.fits(ask.problem, config, ask.place.device)
    except (KeyError, TypeError, ValueError) as error:
        return f"not a config of {ask.op.name}: {error!r}"
