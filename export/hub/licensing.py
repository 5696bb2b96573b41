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
    notes: tuple = ()  # what whoever publishes should know


def check_licenses(sources, stated, base, weights):
    """The Licensing of a publication.

    sources: those of its weights. stated: the recipe's `publish.license`. base: pipeline, license and license_link of
    the base as the artifact has them. weights: "copy" or "thin"; a thin publication copies none.
    Raises PublishError where a licence is unknown and not stated, forbids copies, or the sources' licences differ and
    the recipe does not say which holds.
    """
    sources = list(sources)
    is_stated = stated != "inherit"
    found = {source.name: source.license for source in sources}
    on_disk = all(source.base is None for source in sources if source.name == base["pipeline"])
    if not is_stated and on_disk and base.get("license"):
        found[base["pipeline"]] = base["license"]  # a base in a folder has its licence from its own card
    for source in sources:
        _check_source(source, found[source.name], is_stated, copied=weights == "copy" or source.rewritten)
    chosen = _stated(stated, weights) if is_stated else _inherited(found)
    known = find_license(chosen)
    link = base.get("license_link") if not is_stated else None
    differing = [f"{name} {license}" for name, license in found.items() if license and license != chosen]
    note = f"the recipe states the licence {chosen}; the cards of the weights' sources say: {', '.join(differing)}"
    return Licensing(
        id=known.id if known else chosen,
        name=known.name if known else chosen,
        link=link or (known.link if known else None),
        note=known.note if known else "",
        sources=tuple(found.items()),
        notes=(note,) if is_stated and differing else (),
    )


def _stated(stated, weights):
    if stated.strip().lower() in ("", "unknown", "other"):
        raise PublishError(f"the recipe states the licence as {stated!r}, which is none; {_STATE}")
    known = find_license(stated)
    if known and not known.copies and weights == "copy":
        raise PublishError(
            f"the licence that the recipe states, {stated}, forbids a copy of the weights in another repository "
            f"({known.note}); publish none with --weights thin"
        )
    return stated.strip()


def _inherited(found):
    differing = {name: license for name, license in found.items() if license}
    if len(set(differing.values())) > 1:
        listed = ", ".join(f"{name} {license}" for name, license in differing.items())
        raise PublishError(f"the weights are under different licences ({listed}); {_STATE}")
    if not differing:
        raise PublishError(f"the base's licence is unknown; {_STATE}")
    return next(iter(differing.values()))


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
