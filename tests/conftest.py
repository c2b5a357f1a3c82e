"""What every test has: no cache file inside the package but where that is the subject, and no limit of time.
What many ask for: a toy op, the path of a cache file, the environment of this CPU."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
# Two workers share the cores already: more threads would wait for each other. Torch reads this when loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from toy import Toy

from moecache.devices import Places
from moecache.schemas.timing import Environment
from moecache.store.locks import LONG_S

# No test depends on how fast the machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

ABOUT_THEM = {"test_prebuilt", "test_settings", "test_install"}


@pytest.fixture(autouse=True)
def nothing_prebuilt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Files that ship would answer what a test wants unanswered."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] not in ABOUT_THEM:
            patch.setattr("moecache.settings.PREBUILT", tmp_path_factory.getbasetemp() / "nothing-prebuilt")
        patch.setattr("moecache.store.locks.most", LONG_S)  # an engine's plugin shortens it for good
        yield


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "cache.sqlite"


@pytest.fixture
def here() -> Environment:
    return Places().here("cpu", 0).environment
