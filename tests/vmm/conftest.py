"""Fixtures of the engines' tests."""

from tests.vmm.engines import flat, least_budget, real, variant

__all__ = ["flat", "least_budget", "real", "variant"]
