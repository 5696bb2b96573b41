"""Scores of a patched pipeline beside its untouched base: paired images, metrics, statistics, report, blind study."""
