"""Ranks that must agree: these processes exchange a few bytes, and all go on with the same answer."""

import json
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from moecache.schemas.errors import InvalidInput, RanksDiffer, TeamLost, typed

T = TypeVar("T")
TIMEOUT = 60.0  # seconds
GRACE = 1.0  # seconds that a store may need beyond a timeout to say that it is over
LONGEST = 4 << 20  # bytes that a rank says at a time; torch's store takes 8 MiB
ADVICE = "look at the logs of the others and restart all ranks; if they are only slow, give the team a longer timeout"


class Team:
    """Processes that decide together. `ALONE` is a team of one: it exchanges nothing and needs no torch.distributed.

    All ranks call the same methods in the same order. If one does not, all of them get an error. A team belongs to one
    thread at a time. The ranks exchange JSON: None, numbers, texts, and lists and dicts of those.

    If a rank is lost, the team is lost: every later call raises TeamLost at once.

    Attributes:
        rank: number of this process, from 0.
        size: number of ranks.
        timeout: seconds that a call waits for the other ranks.
    """

    # Through a store rather than through collectives: a store works beside any backend, waits no longer than it is
    # told to, and knows afterwards who has not come. A collective of gloo ends at once when a peer dies but names
    # nobody, waits half an hour for one that hangs, and cannot be used again; one of NCCL needs the GPU that may hang.

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, timeout: float = TIMEOUT) -> None:
        """`store` is a torch.distributed.Store that all ranks share and nothing else waits on: see `of`.

        Raises:
            InvalidInput: a rank outside the size, a timeout that is not above 0, or several ranks and no store.
            TeamLost: the store does not answer.
        """
        typed("rank", rank, int), typed("size", size, int), typed("timeout", timeout, int, float)
        if not 0 <= rank < size or (size > 1 and not hasattr(store, "wait")):
            raise InvalidInput(f"rank={rank}, size={size}, store={store}; allowed are 0 <= rank < size, and a store")
        if not (math.isfinite(timeout) and timeout > 0):
            raise InvalidInput(f"timeout={timeout!r}; allowed are seconds above 0")
        self.rank, self.size, self.timeout = rank, size, timeout
        self._store, self._round, self._lost = store, 0, ""
        self._name = "" if size == 1 else self._bounded("joining", lambda: f"{store.add(f'moecache/{rank}', 1)}")

    def __repr__(self) -> str:
        return f"Team(rank={self.rank}, size={self.size}, timeout={self.timeout:g})"

    @classmethod
    def of(cls, group: Any = None, timeout: float = TIMEOUT) -> "Team":
        """The team of a torch.distributed process group, of any backend; None means the default group.

        Every rank of the group makes as many teams as the others: the n-th team of one rank meets the n-th of another.

        Raises:
            InvalidInput: there is no process group, or this process is not in it; a timeout that is not above 0.
            TeamLost: the store of the group does not answer.
        """
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_process_group_store

        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidInput("there is no process group: call torch.distributed.init_process_group first")
        if (rank := dist.get_rank(group)) < 0:
            raise InvalidInput("this process is not in that process group")
        if (size := dist.get_world_size(group)) == 1:
            return cls(timeout=timeout)
        found: Any = _get_process_group_store(group or dist.group.WORLD)  # type: ignore[arg-type]
        return cls(rank, size, found.clone(), timeout)  # a wait blocks its whole connection; torch needs that one too

    def gather(self, what: str, value: T) -> list[T]:
        """The values of all ranks, in the order of ranks.

        Args:
            what: the purpose in words, the same on all ranks; errors name it.
            value: this rank's value, as JSON can hold it.

        Raises:
            InvalidInput: the value is no JSON, or longer than LONGEST. The other ranks still wait: see `staying`.
            TeamLost: a rank did not come in time, has left, or is at another step; the message names it.
        """
        if self.size == 1:
            return [value]
        if self._lost:
            raise TeamLost(self._lost)
        text = _text(what, value)
        told = [json.loads(each) for each in self._bounded(what, lambda: self._exchange(what, text))]
        for rank, (where, said) in enumerate(told):
            if where is None:
                raise self._over(f"{what}: rank {rank} of {self.size} has left: {said}")
        if len({where for where, _ in told}) > 1:
            places = ", ".join(f"rank {rank} at {where!r}" for rank, (where, _) in enumerate(told))
            raise self._over(f"the ranks are not at the same place: {places}; all must make the same calls in order")
        return [said for _, said in told]

    def barrier(self, what: str) -> None:
        """Wait until all ranks are here. Raises what `gather` raises."""
        self.gather(what, None)

    def agree(self, what: str, value: T, pick: Callable[[Sequence[T]], T]) -> T:
        """`pick` of the values of all ranks, for example their min or max. Raises what `gather` raises."""
        return pick(self.gather(what, value))

    def broadcast(self, what: str, value: T) -> T:
        """The value of rank 0, on all ranks. Raises what `gather` raises."""
        return self.gather(what, value)[0]

    def same(self, digest: str, what: str = "digest") -> str:
        """The digest, if all ranks have it.

        Raises:
            RanksDiffer: they differ. All ranks raise it, and the message says which rank has which digest.
            TeamLost: see `gather`.
        """
        holders = defaultdict(list)
        for rank, each in enumerate(self.gather(what, digest)):
            holders[each].append(str(rank))
        if len(holders) > 1:
            told = "; ".join(f"rank {', '.join(ranks)}: {each}" for each, ranks in holders.items())
            raise RanksDiffer(f"the ranks differ in {what}: {told}. Let all read the same files, then reload()")
        return digest

    @contextmanager
    def staying(self) -> Iterator[None]:
        """A rank that leaves this block with an error tells the others, so none waits for it. RanksDiffer is not told,
        as all ranks raise it."""
        try:
            yield
        except RanksDiffer:
            raise
        except BaseException as error:
            if self.size > 1 and not self._lost:
                self._over(f"{type(error).__name__}: {error}"[:500])
            raise

    def _over(self, why: str, tell: bool = True) -> TeamLost:
        """The error of a team that is lost from here on; who comes to the next exchange is told instead of waiting."""
        self._lost = why
        if tell:
            left = self._key(self._round, self.rank)
            with suppress(RuntimeError):
                _in_time(lambda: self._store.set(left, json.dumps([None, why])), 0.0)
        return TeamLost(why)

    def _key(self, turn: int, rank: int) -> str:
        return f"moecache/{self._name}/{turn}/{rank}"

    def _exchange(self, what: str, text: str) -> list[bytes]:
        """The texts of all ranks.

        Raises:
            TeamLost: some did not come in time.
        """
        turn, self._round = self._round, self._round + 1
        keys = [self._key(turn, rank) for rank in range(self.size)]
        self._store.set(keys[self.rank], text)
        try:
            self._store.wait(keys, timedelta(seconds=self.timeout))
        except RuntimeError:
            if away := [str(rank) for rank, key in enumerate(keys) if not self._store.check([key])]:
                late = f"rank {', '.join(away)} of {self.size} did not come within {self.timeout:g} s"
                raise TeamLost(f"{what}: {late}; {ADVICE}") from None
        found = [self._store.get(key) for key in keys]
        if turn:  # all are here, so all have read what was said before
            with suppress(RuntimeError):  # whoever keeps the store may be done, and gone
                self._store.delete_key(self._key(turn - 1, self.rank))
        return found

    def _bounded(self, what: str, work: Callable[[], T]) -> T:
        """The result of work with the store, or the end of this team."""
        try:
            return _in_time(work, self.timeout)
        except TeamLost as lost:
            raise self._over(str(lost)) from None
        except RuntimeError as error:
            gone = f"the store that the ranks share is gone ({' '.join(str(error).split()):.200})"
            keeper = "who keeps it, mostly rank 0 or the launcher, has ended or hangs"
            raise self._over(f"{what}: {gone}; {keeper}; {ADVICE}", tell=False) from None


def _text(what: str, value: object) -> str:
    """What a rank says, as JSON."""
    typed("what", what, str)
    try:
        text = json.dumps([what, value])
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{what}: {error}; allowed are None, numbers, texts, and lists and dicts of those") from None
    if len(text) > LONGEST:
        raise InvalidInput(f"{what}: a value of {len(text)} bytes; allowed are {LONGEST}: exchange a hash of it")
    return text


def _in_time(work: Callable[[], T], seconds: float) -> T:
    """The result of work with a store, in a thread that can be left behind: where the machine that keeps the store is
    gone without a word, no timeout of the store itself helps.

    Raises:
        RuntimeError: there was none in time; likewise whatever the work raised.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name="moecache team").start()
    if not wait([answer], seconds + GRACE).done:
        raise RuntimeError("it does not answer")
    return answer.result()


ALONE = Team()
