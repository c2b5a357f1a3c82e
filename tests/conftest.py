"""What every test has: no cache file inside the package but where that is the subject, and no limit of time."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

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
        yield
