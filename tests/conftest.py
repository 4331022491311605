"""What every test may rely on: the engines in turn; hypothesis tries the same bounded set of examples on every run."""

import os

from hypothesis import HealthCheck, settings

from tests.engine import each_engine

__all__ = ["each_engine"]

# Derandomized, so that a failure in CI is a failure here; no deadline, since CI's machines are slow and shared.
# HYPOTHESIS_PROFILE=search looks for new examples instead.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", parent=settings.get_profile("steady"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))
