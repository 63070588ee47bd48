"""For all tests: hypothesis judges answers, not seconds."""

from hypothesis import settings

settings.register_profile("meftbench", deadline=None)
settings.load_profile("meftbench")
