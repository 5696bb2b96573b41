"""Which attention modules an operation's `layers` selects, and what becomes of every other one.

A selector is "all", a block group (down, mid, up of a UNet; double, single of joint attention: blocks of two streams or
one), or a glob pattern over module paths, in which * crosses dots.
"""

import fnmatch

from surgery.errors import nearest

STREAMS = ("double", "single")  # blocks of joint attention, and what an operation's `blocks` may name besides "all"
GROUPS = ("down", "mid", "up", *STREAMS)
REPLACED = ("cross", "joint")  # the kinds of attention in which image queries meet text keys


def sites_in(sites, blocks, replace="cross-attention"):
    """(the sites among which `layers` selects, None), or with the reason why an operation can have none of them.

    blocks: "all" or one of STREAMS. replace: as a recipe's; "joint-attention" is for joint attention alone.
    """
    among = [site for site in sites if blocks in ("all", site.block)]
    if (blocks != "all" or replace == "joint-attention") and not any(site.kind == "joint" for site in among):
        return among, f"this model has no joint attention{'' if blocks == 'all' else f' in {blocks} blocks'}"
    return among, None


def select_sites(sites, layers):
    """The paths of the cross- and joint-attention sites that a list of selectors names, in model order.

    Returns (paths, complaints): a complaint is (index of the selector, message, hint), for each that selects nothing.
    """
    chosen, complaints = set(), []
    for index, selector in enumerate(layers):
        matching = [site for site in sites if _matches(site, selector)]
        replaceable = [site.path for site in matching if site.kind in REPLACED and not site.refusal]
        chosen.update(replaceable)
        if not replaceable:
            complaints.append((index, *_complaint(sites, selector, matching)))
    return [site.path for site in sites if site.path in chosen], complaints


def assign_operations(sites, operations):
    """Match every operation's selectors against the sites of a model.

    operations: (list of selectors, blocks, replace) of each, as a recipe has them: blocks "double" or "single" of joint
    attention, else "all"; replace "joint-attention" is for that alone.
    Returns ({path: operation index}, complaints): a complaint is (operation index, selector index or None, message,
    hint), for each selector that hits nothing and each module that two operations claim.
    """
    assigned, complaints = {}, []
    for number, (layers, blocks, replace) in enumerate(operations):
        among, message = sites_in(sites, blocks, replace)
        if message:
            complaints.append((number, None, message, ""))
            continue
        paths, missed = select_sites(among, layers)
        complaints += [(number, index, message, hint) for index, message, hint in missed]
        twice = [path for path in paths if path in assigned]
        if twice:
            more = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
            message = f"{twice[0]}{more} is already replaced by operations[{assigned[twice[0]]}]"
            complaints.append((number, None, message, "let each module be in one operation's layers"))
        for path in paths:
            assigned.setdefault(path, number)
    return assigned, complaints


def recipe_problems(sites, operations, document):
    """({path: operation index}, [Problem]) for a recipe's operations, each problem at its line."""
    assigned, complaints = assign_operations(sites, operations)
    problems = []
    for number, index, message, hint in complaints:
        location = ("operations", number, "layers")
        if index is not None and isinstance(document.data["operations"][number].get("layers"), list):
            location = (*location, index)
        problems.append(document.problem(location, message, hint))
    return assigned, problems


def _matches(site, selector):
    return selector == "all" or site.block == selector or fnmatch.fnmatchcase(site.path, selector)


def _complaint(sites, selector, matching):
    cross = [site for site in sites if site.kind in REPLACED]
    if matching and not any(site.kind in REPLACED for site in matching):
        kinds = "/".join(sorted({site.kind for site in matching}))
        return f"{selector!r} matches {len(matching)} {kinds}-attention modules and no cross-attention", ""
    if matching:
        reason = next(site.refusal for site in matching if site.kind in REPLACED)
        return f"{selector!r} matches cross-attention that cannot be replaced: {reason}", ""
    if selector in GROUPS:
        there = [group for group in GROUPS if any(site.block == group for site in cross)]
        return f"{selector!r} matches nothing: this model has no cross-attention there", f"it has {', '.join(there)}"
    near = nearest(selector, ["all", *GROUPS, *(site.path for site in cross)])
    hint = f'did you mean "{near}"?' if near else f'a path here is "{cross[0].path}"' if cross else ""
    return f"{selector!r} matches no module of this model", hint
