"""Fixtures of the engines' tests."""

from tests.vmm.engines import flat, native_core, other_engine, real, variant
from tests.vmm.soft import hasty

__all__ = ["flat", "hasty", "native_core", "other_engine", "real", "variant"]
