"""The dispatcher of this process. The first use makes it from the environment; `using` replaces it for a block."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from moecache.backends.contract import Backend
from moecache.dispatch import log
from moecache.dispatch.serving import Dispatcher
from moecache.forks import Lock
from moecache.schemas.errors import InvalidInput
from moecache.settings import Settings, settings_from
from moecache.team import ALONE, Team
from moecache.tuning.timing import Clock

__all__ = ["Dispatcher", "dispatcher", "using"]

_default: Dispatcher | None = None
_blocks: list[Dispatcher | None] = []  # what `_default` was, outside of each block that has not ended
_default_lock = Lock()


def dispatcher() -> Dispatcher:
    """The dispatcher of this process. The first use makes it from the environment."""
    return _default or _make_default()


def _make_default() -> Dispatcher:
    global _default
    with _default_lock:
        if _default is None:
            _default = Dispatcher(settings_from(os.environ))
            log.to_stderr(_default.settings.log)
            atexit.register(_default.close)
        return _default


@contextmanager
def using(
    settings: Settings | None = None,
    *,
    backend: Backend | None = None,
    clock: Clock | None = None,
    team: Team | None = None,
    **changes: Any,
) -> Iterator[Dispatcher]:
    """Use other settings for the whole process within a block: `with using(mode="replay", db=path): …`.

    Args:
        settings: the settings that `changes` are applied to; None means the present ones.
        backend: replaces detection, for tests.
        clock: replaces the device's clock, for tests.
        team: the ranks that measure together those ops whose candidates are collectives; None means the present team.
        changes: settings by name, see `moecache.settings.Settings`.

    Yields:
        The dispatcher of the block.

    Raises:
        InvalidInput: a setting that does not exist, or a value that is not allowed.
    """
    global _default
    if unknown := changes.keys() - Settings.__dataclass_fields__.keys():
        allowed = ", ".join(Settings.__dataclass_fields__)
        raise InvalidInput(f"using() has no setting {', '.join(sorted(unknown))}; allowed are {allowed}")
    if not isinstance(settings, Settings | None):
        raise InvalidInput(f"settings={settings!r} are no Settings; settings are given by name, as in mode='replay'")
    if not (backend is None or hasattr(backend, "capturing")):
        raise InvalidInput(f"backend={backend!r} is no Backend; what runs calls follows from their tensors")
    if not isinstance(team, Team | None):
        raise InvalidInput(f"team={team!r} is no Team; moecache.team.Team.of(group) makes one")
    wanted = replace(settings or dispatcher().settings, **changes)
    ours = Dispatcher(wanted, backend, clock, team or (_default.team if _default else ALONE))
    log.to_stderr(wanted.log)
    with _default_lock:
        _blocks.append(_default)
        _default = ours
    try:
        yield ours
    finally:
        with _default_lock:  # blocks of several threads may end in any order
            if _default is ours:
                _default = _blocks.pop()
            else:
                _blocks.remove(ours)
        ours.close()
