"""Fixtures of the engines' tests."""

from tests.vmm.engines import flat, native_core, other_engine, real, variant

__all__ = ["flat", "native_core", "other_engine", "real", "variant"]
