"""The repositories that an artifact's weights come from, as the Hub lists them now."""

from dataclasses import dataclass, replace

from surgery.base import HubBase
from surgery.base.opening import is_local
from surgery.errors import BaseError, BaseNotFoundError, PublishError


@dataclass(frozen=True)
class Source:
    """A repository or folder that weights come from: its listing at the pinned commit, or why there is none."""

    name: str
    revision: str | None
    base: HubBase | None
    reason: str = ""  # why it is not listed
    rewritten: bool = False  # whether some of its weights are in the artifact in an altered form

    @property
    def license(self):
        """What its card states, or None."""
        return self.base.license if self.base else None


def find_sources(files, known=None):
    """{(name, revision): Source} of the weights among files that have an `origin`, as manifest and plan list them.

    known: Sources that were listed a moment ago.
    """
    found = {}
    for file in files:
        origins = [(file.origin.source, file.origin.revision)] if file.weights and file.origin.source else []
        origins += [(lora["source"], lora["revision"]) for lora in file.origin.loras]
        for key in origins:
            rewritten = file.origin.kind in ("converted", "fused")
            if key not in found and known and key in known and known[key].rewritten == rewritten:
                found[key] = known[key]
            elif key not in found:
                found[key] = _find(*key, rewritten)
            elif rewritten and not found[key].rewritten:
                found[key] = replace(found[key], rewritten=True)
    return found


def _find(name, revision, rewritten):
    if revision is None or is_local(name):
        return Source(name, None, None, "it lies on this machine, not on the Hub", rewritten)
    try:
        base = HubBase(name, revision)
    except BaseNotFoundError:
        return Source(name, revision, None, f"{name}@{revision[:12]} is not on the Hub, or not for you", rewritten)
    except BaseError as error:
        raise PublishError(f"the Hub was asked for {name}, where weights come from: {error}") from error
    if not base.listed:
        raise PublishError(f"the Hub cannot be reached for {name}, where weights come from; run the same command again")
    return Source(name, revision, base, "", rewritten)
