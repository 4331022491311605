"""What every test may rely on: a bounded, repeatable hypothesis, and a clear word when the set-up was skipped."""

import os

from hypothesis import HealthCheck, settings

# The same examples on every run, so that a failure in CI is a failure here; no deadline, since CI's machines are slow and
# shared. `HYPOTHESIS_PROFILE=search` looks for new ones.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", parent=settings.get_profile("steady"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))
