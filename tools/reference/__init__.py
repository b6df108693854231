"""Composition methods written from their papers, small enough to read: what the goldens of
tests/data/golden_compose_* are made with."""
