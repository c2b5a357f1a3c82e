"""One named, explicit parameter set of one kernel variant."""

from functools import cached_property
from typing import Any

from pydantic import Field

from moecache.schemas.frozen import Frozen, NamedValues, Value, Word, as_word


class Config(Frozen):
    """A config is named in full, never by a number: `oneshot(block=256,num_warps=4)`.

    `params` are the kernel's own parameters and launch options. `extra` are options of one vendor: waves_per_eu, …
    """

    variant: Word = Field(min_length=1)
    params: NamedValues = ()
    extra: NamedValues = ()

    @cached_property
    def name(self) -> str:
        """The config as text, unique for each config; the second key of the store."""
        inner = ",".join(f"{k}={as_word(v)}" for k, v in self.params + self.extra)
        return f"{self.variant}({inner})"

    def __getitem__(self, param: str) -> Any:
        return dict(self.params + self.extra)[param]

    def __str__(self) -> str:
        return self.name


class Alternatives(Frozen):
    """Two configs of one captured call. The routing of each replay decides which of them works.

    Attributes:
        first: works in all routing buckets but `served`.
        second: works in `served`.
        served: routing buckets, like `a1e2`.
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
    """A config in short: `config("oneshot", programs=8, num_warps=4)`."""
    return Config(variant=variant, params=tuple(params.items()), extra=tuple((extra or {}).items()))
