"""Engines are built: real inputs are taken from the pipeline, a program is exported, compiled, held against eager."""
