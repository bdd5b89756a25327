"""The one error that the collector raises for what it was given."""

from __future__ import annotations


class CollectError(ValueError):
    """Bad input: says where, what was found, what was expected and what to try."""
