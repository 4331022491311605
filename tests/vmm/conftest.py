"""Fixtures of the engines' tests."""

from tests.vmm.engines import flat, real, variant

__all__ = ["flat", "real", "variant"]
