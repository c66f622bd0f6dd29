"""The same examples in every run: a property test that fails should fail for everyone."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
