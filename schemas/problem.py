"""A problem: all that makes two calls the same tuning question. Only this file builds its key."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pydantic import Field, ValidationError

from moecache.schemas.errors import InvalidInput, in_words
from moecache.schemas.frozen import Frozen, NamedValues, Vendor, Word, as_word
from moecache.schemas.frozen import Value as Value


class Problem(Frozen):
    """One tuning question. It is frozen and hashable. Two are equal if their `key` is equal.

    `dims` holds what only this op knows (block_m, hidden, intermediate, layout flags, …), sorted by name. A field that
    has its default is not in the key. So a field that is added later does not change the keys of older files.
    """

    op: Word = Field(min_length=1)
    vendor: Vendor
    arch: Word = Field(min_length=1, description="sm_90, gfx942, x86_64, …")
    units: int = Field(ge=1, description="SMs, CUs or cores of the logical device")
    tokens: int = Field(ge=0, description="token bucket: a power of two, the upper end of the bucket")
    experts: int = Field(ge=1)
    topk: int = Field(ge=1)
    routing: Word = Field(default="", description="routing bucket, see moecache.routing")
    dtype: Word = ""
    dims: NamedValues = ()
    source: Word = Field(default="", description="version of a wrapped op's code; for built-in ops see Timing.code")
    policy: int = Field(default=1, ge=1, description="version of the measuring policy")

    @cached_property
    def key(self) -> str:
        """The identity as text: `op=moe_sort vendor=nvidia arch=sm_90 … dims.block_m=64 …`."""
        parts = [
            f"{name}={as_word(getattr(self, name))}"
            for name, field in type(self).model_fields.items()
            if name != "dims" and (field.is_required() or getattr(self, name) != field.default)
        ]
        parts += [f"dims.{name}={as_word(value)}" for name, value in self.dims]
        return " ".join(parts)

    @property
    def id(self) -> str:
        """Eight hex digits of a hash of the key, so that people can name a problem."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:8]

    @cached_property
    def any_routing(self) -> "Problem":
        """The same question with its routing left open."""
        return self.model_copy(update={"routing": ""}) if self.routing else self

    def dim(self, name: str, default: Value = 0) -> Any:
        """The value of one of `dims`."""
        return dict(self.dims).get(name, default)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Problem) and self.key == other.key


def problem_from_key(key: str) -> Problem:
    """The problem of a full key. The order of its fields does not matter.

    Raises:
        InvalidInput: the text is no key; the message names what is wrong with it.
    """
    pairs = [part.partition("=")[::2] for part in key.split()]
    known = {name for name in Problem.model_fields if name != "dims"}
    for at, (name, value) in enumerate(pairs):
        if name in (before for before, _ in pairs[:at]):
            raise InvalidInput(f"{name!r} comes twice in {key!r}")
        if name not in known and not name.startswith("dims."):
            raise InvalidInput(f"{name!r} is no field of a key; allowed are {', '.join(sorted(known))} and dims.…")
        if not value and not name.startswith("dims."):
            raise InvalidInput(f"{name!r} has no value; a key reads like op=moe_sort vendor=cpu … dims.block_m=64")
    fields: dict[str, Any] = {name: value for name, value in pairs if name in known}
    dims = [(n[5:], int(v) if str(v).isdecimal() and str(int(v)) == v else v) for n, v in pairs if n[:5] == "dims."]
    try:
        return Problem(**fields, dims=tuple(dims))
    except ValidationError as error:
        raise InvalidInput(f"{key!r} is no key: {in_words(error)}") from None


def pow2(n: int) -> int:
    """The power of two at or above n; 1 for anything below 1."""
    return 1 << max(0, n - 1).bit_length()


def token_bucket(tokens: int) -> int:
    """The power of two at or above `tokens`; 0 stays 0."""
    return pow2(tokens) if tokens > 0 else 0


ACTIVE_LEVELS, EFFECTIVE_LEVELS = 3, 4


def bucket_name(index: int) -> str:
    """The name of a routing bucket, `a0e0` …, from the index that the device posts."""
    return f"a{index // EFFECTIVE_LEVELS}e{index % EFFECTIVE_LEVELS}"


BUCKETS = tuple(bucket_name(i) for i in range(ACTIVE_LEVELS * EFFECTIVE_LEVELS))


def bucket_levels(name: str) -> tuple[int, int]:
    """(active level, effective level) of a routing bucket.

    Raises:
        ValueError: there is no such bucket.
    """
    return divmod(BUCKETS.index(name), EFFECTIVE_LEVELS)


def bucket_index(counts: Sequence[int]) -> int:
    """The routing bucket of the tokens of each expert, as a small integer: active level · 4 + effective level.

    `moecache.routing` says what the levels mean. The sorting kernels compute the same number on the device. Both use
    integers, so they agree exactly.
    """
    pairs = sum(counts)
    if pairs == 0:
        return 0
    reachable = min(len(counts), pairs)
    active = sum(1 for c in counts if c > 0)
    squares = sum(c * c for c in counts)
    a = sum(active * (3 << k) <= 2 * reachable for k in range(ACTIVE_LEVELS - 1))
    e = sum(pairs * pairs * (3 << k) <= 2 * reachable * squares for k in range(EFFECTIVE_LEVELS - 1))
    return a * EFFECTIVE_LEVELS + e
