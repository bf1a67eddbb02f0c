"""How hard hypothesis tries: ``HYPOTHESIS_PROFILE=slow`` looks for much longer."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# A machine that is busy with other tests is slow now and then; that is no finding.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("slow", settings.get_profile("default"), max_examples=5_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
