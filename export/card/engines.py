"""The card's section on compiled engines: which there are, what each is for, how far it is from eager."""

from .sections import cell


def engine_lines(engines, repo):
    """A table of the engines, as `engine.json` has them, and how they are used; empty without any."""
    if not engines:
        return []
    rows = [
        [
            engine.component,
            engine.backend,
            f"{engine.built_on.device} {engine.built_on.architecture}, torch {engine.built_on.torch}",
            engine.dtype,
            engine.profile,
            f"{engine.difference.relative:.1e}",
        ]
        for engine in sorted(engines, key=lambda engine: engine.key)
    ]
    return [
        "## Compiled engines",
        "",
        "| component | compiled by | runs on | dtype | images x height x width | difference from eager |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(cell(str(value)) for value in row)} |" for row in rows),
        "",
        "The difference is the largest of an output's element over the root mean square of eager's, on the pipeline's "
        "own inputs. An engine runs only where it fits, and is native code: it runs only for those who trust it.",
        "",
        "```python",
        f'pipe = surgery.load("{repo or "./FOLDER"}", engine="auto", trust_engines=True)',
        "```",
        "",
    ]
