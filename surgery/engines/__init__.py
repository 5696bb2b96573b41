"""Compiled engines of an artifact: what one is, whether it fits here, and how it takes a live model's place."""
