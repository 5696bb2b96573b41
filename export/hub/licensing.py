"""Under which licence a publication stands, and whether the licences of what it is made from let it be."""

from dataclasses import dataclass

from surgery.export.licenses import find_license

from surgery.errors import PublishError

_STATE = "state it in the recipe (`publish: {license: ...}`) and apply that again"


@dataclass(frozen=True)
class Licensing:
    """The licence that the card names, and those of the weights' sources."""

    id: str
    name: str
    link: str | None
    note: str
    sources: tuple  # (source, licence or None) each


def check_licenses(sources, stated, of_base, weights, link=None):
    """The Licensing of a publication.

    sources: those of its weights. stated: the recipe's `publish.license`. of_base: the base's as it was when the
    artifact was made, or None. weights: "copy" or "thin"; a thin publication copies none. link: the base card's own.
    Raises PublishError where a licence is unknown and not stated, forbids copies, or the sources' licences differ and
    the recipe does not say which holds.
    """
    is_stated = stated != "inherit"
    found = {source.name: source.license for source in sources}
    if not is_stated and of_base and sources and sources[0].base is None:
        found[sources[0].name] = of_base  # a local base has its licence from its own card
    for source in sources:
        _check_source(source, found[source.name], is_stated, copied=weights == "copy" or source.rewritten)
    if is_stated:
        chosen = stated
    else:
        differing = {name: license for name, license in found.items() if license}
        if len(set(differing.values())) > 1:
            listed = ", ".join(f"{name} {license}" for name, license in differing.items())
            raise PublishError(f"the weights are under different licences ({listed}); {_STATE}")
        chosen = next(iter(differing.values()), of_base)
        if not chosen:
            raise PublishError(f"the base's licence is unknown; {_STATE}")
    known = find_license(chosen)
    links = [link] if link and not is_stated else []
    links += [known.link] if known and known.link else []
    return Licensing(
        id=known.id if known else chosen,
        name=known.name if known else chosen,
        link=links[0] if links else None,
        note=known.note if known else "",
        sources=tuple(found.items()),
    )


def _check_source(source, license, is_stated, copied):
    known = find_license(license)
    if known is not None:
        if copied and not known.copies:
            instead = "" if source.rewritten else "; --weights thin publishes none, and loading fetches them from there"
            raise PublishError(
                f"the licence of {source.name}, {license}, forbids a copy of its weights in another repository "
                f"({known.note}){instead}"
            )
    elif is_stated:
        return
    elif license in (None, "", "unknown", "other"):
        raise PublishError(f"the licence of {source.name} is unknown: its card names none; {_STATE}")
    elif copied:
        raise PublishError(
            f"whether the licence of {source.name}, {license}, allows a copy of its weights in another repository is "
            f"not known to this tool: read it, and if it does, {_STATE}; or publish no weights with --weights thin"
        )
