"""One candidate measured on one problem, where it was measured, what is predicted, and the choice that follows."""

import hashlib
import math
from datetime import UTC, datetime
from typing import Literal

from pydantic import ConfigDict, Field

from moecache.schemas.config import Alternatives, Config
from moecache.schemas.frozen import Frozen, Word
from moecache.schemas.problem import Problem
from moecache.schemas.rule import Entry, Status

PASSING: tuple[Status, ...] = ("oom", "timeout", "crashed", "lost")  # may be the moment's fault: tried again
TRIES = 2  # processes in which that happens to a config before it is held to be its own fault
Tier = Literal["measured", "unverified", "neighbour", "predicted", "default"]
By = Literal["", "fitted", "shipped", "constants", "cost"]

FROM = "from="  # begins the flags of what a table of another project names; no environment here has such flags
POLICY = 1  # version of all else that decides a timing: inputs, cold caches, order, stop rule, what is launched around


def now() -> str:
    """This moment, as timings are dated."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Environment(Frozen):
    """Where a timing was taken. If that differs from here, the timing is `unverified`, but never deleted.

    This library's own version is not in it, as `Timing.code` says more.
    """

    device_name: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    flags: str = Field(default="", description="variables that change how code runs, see schemas.flags")

    @property
    def id(self) -> str:
        """Twelve hex digits of the content. Defaults are left out, so a field added later leaves older ids alone."""
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()[:12]


class Timing(Frozen):
    """One candidate on one problem. Times are microseconds; there is one only if `status == "ok"`."""

    # "strings": the error of wrong integers is inf, which JSON has no number for and pydantic would turn into null
    model_config = ConfigDict(ser_json_inf_nan="strings")

    problem: Problem
    config: Config
    environment: Environment
    status: Status = "ok"
    median_us: float | None = Field(default=None, gt=0)
    mad_us: float | None = Field(default=None, ge=0, description="median absolute deviation")
    n: int = Field(default=0, ge=0, description="samples behind the median; of a failure, processes that met it")
    error: float | None = Field(default=None, ge=0, description="relative error against the reference; 0 = exact")
    is_default: bool = Field(default=False, description="this is the op's static default for the problem")
    reason: str = Field(default="", description="why it is unusable, in words")
    measured_at: str = Field(default="", description="UTC, ISO 8601")
    code: Word = Field(default="", description="what was run, see kernels/code.py; '' where the op is not ours")

    @property
    def passing(self) -> bool:
        """Whether it failed for a reason that may be gone in a later process."""
        return self.status in PASSING and self.n < TRIES

    @property
    def entry(self) -> Entry:
        """A usable timing as the rule takes it."""
        return Entry(self.median_us or math.inf, self.config.name, self.mad_us, self.n, self.is_default)

    @property
    def told(self) -> bool:
        """Whether a table of another project names it, and nobody here measured it: it is raced first, and answers
        nothing."""
        return self.environment.flags.startswith(FROM)


class Winner(Frozen):
    """What `schemas.rule` makes of the timings of one problem in one environment. It never takes longer than the static
    default."""

    problem: Problem
    config: Config
    environment: Environment
    median_us: float
    mad_us: float
    n: int
    default_us: float | None = Field(default=None, description="time of the static default, if it was usable")
    tied: int = Field(default=1, description="candidates that it is not proved faster than, itself included")
    candidates: int = Field(default=1, description="usable candidates")
    runner_up_us: float | None = Field(default=None, description="best time of those that it is proved faster than")
    measured_at: str = Field(default="", description="UTC, ISO 8601")

    @property
    def margin(self) -> float | None:
        """Gain over the default: default / winner − 1."""
        return None if self.default_us is None else self.default_us / self.median_us - 1.0


class Prediction(Frozen):
    """The config with the lowest predicted time. It is no timing: it has no environment and no samples, and it never
    answers as measured."""

    problem: Problem
    device: str = Field(min_length=1, description="the product whose rates were put in, as in schemas.device.KNOWN")
    config: Config
    predicted_us: float = Field(gt=0, allow_inf_nan=False)
    model: str = Field(default="", description="what predicted it")


class Choice(Frozen):
    """What a call is served with: a config, the tier that it comes from, and a reason that a person can read.

    Attributes:
        config: serves the call.
        tier: how the answer is known.
        reason: why this config, in words.
        source: the cache file or model behind the answer; '' for none.
        expected_us: the time that it should take, in µs; None where unknown.
        by: the parameters that predicted it: fitted to timings here, shipped, or the device's constants; `cost` is what
            `wrap` was given; '' of anything that was not predicted.
        product: the product that it was measured on, if that is another one than this device; else ''.
        alternatives: two configs that a captured call gets instead, if no single config is near the best for every
            routing; else None.
    """

    config: Config
    tier: Tier
    reason: str
    source: str = ""
    expected_us: float | None = None
    by: By = ""
    product: str = ""
    alternatives: Alternatives | None = None

    @property
    def configs(self) -> tuple[Config, ...]:
        """All that may be launched for it."""
        both = self.alternatives
        return tuple(dict.fromkeys([self.config, *([both.first, both.second] if both else [])]))
