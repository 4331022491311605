"""Fixtures of the tests of guest mode."""

from tests.vmm.trap.guestmode import way

__all__ = ["way"]
