"""Tests of merges as a user makes them."""

from workshop import workshop  # noqa: F401
