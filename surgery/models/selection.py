"""Which attention modules an operation's `layers` selects, and what becomes of every other one.

A selector is "all", a block group (down, mid, up of a UNet; double, single of joint attention: blocks of two streams or
one), transformer_2 (all of a second denoiser), or a glob pattern over module paths, in which * crosses dots.
"""

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgery.errors import Problem, nearest

from .denoisers import further_of

if TYPE_CHECKING:
    from .anatomy import AttentionSite

STREAMS = ("double", "single")  # blocks of joint attention, and what an operation's `blocks` may name besides "all"
GROUPS = ("down", "mid", "up", *STREAMS)
REPLACED = ("cross", "joint")  # the kinds of attention in which image queries meet text keys
REPLACES = ("cross-attention", "joint-attention", "self-attention")  # what an operation may replace
DESTROYS = "it replaces self-attention, which destroys images (PLADIS, Fig. 3): an experiment, not for use"


def sites_in(
    sites: Sequence["AttentionSite"], blocks: str, replace: str = "cross-attention"
) -> tuple[list["AttentionSite"], str | None]:
    """(the sites among which `layers` selects, None), or with the reason why an operation can have none of them.

    blocks: "all" or one of STREAMS. replace: one of REPLACES; "joint-attention" is for joint attention alone,
    "self-attention" for an experiment, and its sites are `attention_sites(model, self_attention=True)`.
    """
    among = [site for site in sites if blocks in ("all", site.block)]
    if replace == "self-attention":
        return among, _self_attention_problem(among, blocks)
    if (blocks != "all" or replace == "joint-attention") and not any(site.kind == "joint" for site in among):
        return among, f"this model has no joint attention{'' if blocks == 'all' else f' in {blocks} blocks'}"
    return among, None


def _self_attention_problem(sites, blocks):
    if blocks != "all":
        return f"blocks {blocks!r} are of joint attention, which has no self-attention of its own"
    if any(site.kind == "self" for site in sites):
        return None
    if any(site.kind == "joint" for site in sites):
        return "this model has joint attention, in which image and text share one softmax; there is no self-attention"
    return "this model has no self-attention"


def select_sites(
    sites: Sequence["AttentionSite"], layers: Sequence[str], kinds: Sequence[str] = REPLACED
) -> tuple[list[str], list[tuple]]:
    """The paths of the sites of these kinds that a list of selectors names, in model order.

    Returns (paths, complaints): a complaint is (index of the selector, message, hint), for each that selects nothing.
    """
    chosen, complaints = set(), []
    for index, selector in enumerate(layers):
        matching = [site for site in sites if _matches(site, selector)]
        replaceable = [site.path for site in matching if site.kind in kinds and not site.refusal]
        chosen.update(replaceable)
        if not replaceable:
            complaints.append((index, *_complaint(sites, selector, matching, kinds)))
    return [site.path for site in sites if site.path in chosen], complaints


def kinds_of(replace: str) -> tuple[str, ...]:
    """The kinds of sites that an operation with this `replace` takes."""
    return ("self",) if replace == "self-attention" else REPLACED


def recipe_problems(
    sites: Sequence["AttentionSite"],
    operations: Sequence[tuple],
    document: Any,
    self_sites: Sequence["AttentionSite"] = (),
) -> tuple[list[list[str]], list[Problem]]:
    """Match the selectors of a recipe's operations against the sites of a model: (paths of each operation, [Problem]).

    operations: (list of selectors, blocks, replace, role) of each, as a recipe has them: blocks "double" or "single" of
    joint attention, else "all"; replace "joint-attention" is for that alone; role of an addition, None of an operator.
    self_sites: those for "self-attention". A Problem, at its line, is a selector that hits nothing or a module that two
    operations of one role claim.
    """
    chosen, claimed, problems = [], {}, []
    for number, (layers, blocks, replace, role) in enumerate(operations):
        chosen.append([])
        assigned = claimed.setdefault(role, {})
        location = ("operations", number, "layers")
        among, message = sites_in(self_sites if replace == "self-attention" else sites, blocks, replace)
        if message:
            problems.append(document.problem(location, message, ""))
            continue
        paths, missed = select_sites(among, layers, kinds_of(replace))
        is_list = isinstance(document.data["operations"][number].get("layers"), list)
        for index, message, hint in missed:
            problems.append(document.problem((*location, index) if is_list else location, message, hint))
        twice = [path for path in paths if path in assigned]
        if twice:
            more = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
            message = f"{twice[0]}{more} is already replaced by operations[{assigned[twice[0]]}]"
            problems.append(document.problem(location, message, "let each module be in one operation's layers"))
        chosen[-1] = [path for path in paths if path not in assigned]
        assigned |= dict.fromkeys(chosen[-1], number)
    return chosen, problems


def _matches(site, selector):
    named = selector in ("all", site.block, further_of(site.path))
    return named or fnmatch.fnmatchcase(site.path, selector)


def _complaint(sites, selector, matching, kinds):
    word = "cross-attention" if "cross" in kinds else "self-attention"
    among = [site for site in sites if site.kind in kinds]
    if matching and not any(site.kind in kinds for site in matching):
        found = "/".join(sorted({site.kind for site in matching}))
        return f"{selector!r} matches {len(matching)} {found}-attention modules and no {word}", ""
    if matching:
        reason = next(site.refusal for site in matching if site.kind in kinds)
        return f"{selector!r} matches {word} that cannot be replaced: {reason}", ""
    if selector in GROUPS:
        there = [group for group in GROUPS if any(site.block == group for site in among)]
        return f"{selector!r} matches nothing: this model has no {word} there", f"it has {', '.join(there)}"
    near = nearest(selector, ["all", *GROUPS, *(site.path for site in among)])
    hint = f'did you mean "{near}"?' if near else f'a path here is "{among[0].path}"' if among else ""
    return f"{selector!r} matches no module of this model", hint
