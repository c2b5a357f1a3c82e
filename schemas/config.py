"""One named, explicit parameter set of one kernel variant."""

from functools import cached_property
from typing import Any

from pydantic import Field

from moecache.schemas.frozen import Frozen
from moecache.schemas.problem import NamedValues, Value, Word, as_word


class Config(Frozen):
    """A config is named in full, never by a number: `oneshot(block=256,num_warps=4)`.

    `params` are the kernel's own parameters and launch options; `extra` are vendor knobs (waves_per_eu, kpack, …).
    """

    variant: Word = Field(min_length=1)
    params: NamedValues = ()
    extra: NamedValues = ()

    @cached_property
    def name(self) -> str:
        """Canonical text, unique per config; the store's second key."""
        inner = ",".join(f"{k}={as_word(v)}" for k, v in self.params + self.extra)
        return f"{self.variant}({inner})"

    def __getitem__(self, param: str) -> Any:
        return dict(self.params + self.extra)[param]

    def __str__(self) -> str:
        return self.name


class Alternatives(Frozen):
    """Two configs of one captured call: the routing of each replay decides which of them works.

    Attributes:
        served: routing buckets of the second one; all others are the first one's.
    """

    first: Config
    second: Config
    served: tuple[str, ...]

    @property
    def name(self) -> str:
        """The names of both."""
        return f"{self.first.name} | {self.second.name}"

    def __str__(self) -> str:
        return f"{self.first.name}, except in {', '.join(self.served) or 'no bucket'}, where {self.second.name}"


def config(variant: str, extra: dict[str, Value] | None = None, **params: Value) -> Config:
    """Shorthand: `config("oneshot", programs=8, num_warps=4)`."""
    return Config(variant=variant, params=tuple(params.items()), extra=tuple((extra or {}).items()))
