"""Families of verifiable tasks, on the standard library alone."""

from .base import REGISTRY, Family, Instance, Question, draw, families, family, fingerprint

__all__ = ["REGISTRY", "Family", "Instance", "Question", "draw", "families", "family", "fingerprint"]
