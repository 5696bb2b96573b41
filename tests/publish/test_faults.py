"""Every request of a push and of a load fails in every way; nothing is ever half-written, and the next run finishes.

`pytest tests/publish/test_faults.py -s -m "slow or not slow"` prints the table whose counts docs/figures.md gives.
"""

import os
import signal
import time

import pytest

import surgery
from surgery.artifact import verify_artifact
from surgery.artifact.fetch import model_folder
from surgery.errors import PublishError, SurgeryError

from ..loopback_hub import KINDS, WRITE_TOKEN, Fault
from ..quick import quick
from .conftest import BASE
from .test_push import WEIGHTS, publications

FOR_EVER = 10**6
PARTS = 6  # `make test` lets every sixth request of a kind fail, beginning with another one for each, and test-all all
# Faults that take the same way through the code as one of the others.
ALIKE = ("503", "lost500", "reset")


def kinds(*left_out, slow=ALIKE):
    """(kind of fault but those left out, the first request that fails); of a kind that is not `slow` one is quick."""
    chosen = [kind for kind in KINDS if kind not in left_out]
    every = [(kind, first) for kind in chosen for first in range(1, PARTS + 1)]
    return pytest.mark.parametrize(
        ("kind", "first"),
        quick(every, *((kind, at % PARTS + 1) for at, kind in enumerate(chosen) if kind not in slow)),
    )


@pytest.fixture(scope="module")
def tallied():
    """{(what, kind): [outcomes]}, printed as a table at the end."""
    found = {}
    yield found
    print("\n| | fault | requests hit | finished by itself | error, then finished by the next run |")
    print("|---|---|---|---|---|")
    for (what, kind), outcomes in found.items():
        print(f"| {what} | {kind} | {len(outcomes)} | {outcomes.count('finished')} | {outcomes.count('next run')} |")


@pytest.fixture
def tally(tallied, record_property):
    """What a test adds to that table, counted for benchmarks/reliability.py as well."""
    own = {}
    yield own
    for key, more in own.items():
        tallied.setdefault(key, []).extend(more)
    outcomes = [outcome for outcomes in own.values() for outcome in outcomes]
    record_property("cases", len(outcomes))
    record_property("refused", outcomes.count("next run"))


def state(hub, repo):
    """ "absent", "empty" or "whole": what somebody who looks at the repository finds; anything else fails."""
    if repo not in hub.repositories:
        return "absent"
    tree = hub.tree(repo)
    if set(tree) == {".gitattributes"}:
        return "empty"
    assert {"surgery.json", "README.md", *WEIGHTS} <= set(tree), "half-written"
    for path in WEIGHTS:
        assert tree[path].sha256 == hub.tree(BASE)[path].sha256
    return "whole"


def uploaded(hub):
    """The objects that arrived by PUT, each as often as it arrived whole."""
    return [entry.path for entry in hub.log if entry.method == "PUT" and entry.status == 200]


def push_under(hub, folder, repo, fault):
    """Push while the fault is there, look at what is left, push again without it; returns the outcome."""
    hub.reset_log()
    hub.fault = fault
    try:
        surgery.push(folder, repo, tag="v1")
        outcome = "finished"
    except SurgeryError as error:
        assert WRITE_TOKEN not in str(error)
        outcome = "next run"
    hits, hub.fault_hits, hub.fault = hub.fault_hits, 0, None
    if not hits:
        return None
    state(hub, repo)
    if outcome == "finished":
        assert state(hub, repo) == "whole"
    surgery.push(folder, repo, tag="v1")
    assert state(hub, repo) == "whole" and len(publications(hub, repo)) == 1
    assert hub.repositories[repo].tags == {"v1": hub.commits(repo)[0].oid}
    assert len(uploaded(hub)) == len(set(uploaded(hub))), "something was sent twice"
    return outcome


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@kinds("flip")
def test_a_push_through_every_fault(hub, artifact, no_waiting, tally, kind, first, lasting):
    outcomes = []
    for at in range(first, 100, PARTS):
        fault = Fault(at, kind, FOR_EVER if lasting else 1)
        outcome = push_under(hub, artifact, f"me/push-{kind}-{at}", fault)
        if outcome is None:
            break
        outcomes.append(outcome)
    tally["push", f"{kind}{', from then on' if lasting else ''}"] = outcomes
    assert len(outcomes) >= 15 // PARTS
    if lasting:
        assert "finished" not in outcomes[:-1]  # the tag comes last; its answer may be lost for ever
    else:
        assert outcomes.count("finished") == len(outcomes)


def test_a_commit_that_always_fails_is_told_in_words(hub, artifact, no_waiting):
    hub.fault = Fault(1, "500", FOR_EVER, path="/commit/")
    with pytest.raises(PublishError, match="publishing me/failing failed.*run the same command again"):
        surgery.push(artifact, "me/failing")


def test_a_copy_that_fails_once_is_tried_again_and_no_weights_are_sent(hub, artifact, no_waiting):
    hub.fault = Fault(1, "500", path="lfs-files/duplicate")
    surgery.push(artifact, "me/copied")
    assert hub.fault.seen >= 2 and len(uploaded(hub)) == 1  # the buffers
    assert state(hub, "me/copied") == "whole"


@kinds(slow=(*ALIKE, "429", "lost"))
def test_a_load_through_every_fault(hub, artifact, use_hub, no_waiting, tally, kind, first):
    surgery.push(artifact, "me/whole")
    surgery.push(artifact, "me/thin", weights="thin")
    outcomes = []
    for repo in ("me/whole", "me/thin") if kind in ("500", "cut", "flip") else ("me/whole",):
        for at in range(first, 200, PARTS):
            use_hub(hub, home=f"{repo}-{kind}-{at}")
            hub.fault = Fault(at, kind)
            try:
                folder, outcome = model_folder(repo), "finished"
            except SurgeryError as error:
                assert str(error)
                outcome = "next run"
            hits, hub.fault_hits, hub.fault = hub.fault_hits, 0, None
            if not hits:
                break
            outcomes.append(outcome)
            folder = folder if outcome == "finished" else model_folder(repo)
            verify_artifact(folder, weights=True)
    tally["load", kind] = outcomes
    assert len(outcomes) >= 25 // PARTS
    if kind in ("500", "503", "drop", "reset", "lost500"):
        assert outcomes.count("finished") >= 0.9 * len(outcomes)


def killed_while_pushing(hub, folder, repo, at):
    """Push in a process that is killed when its `at`-th request arrives; False if it was done before."""
    child, seen = [], []

    def kill(method, path):
        seen.append(path)
        if len(seen) == at:
            while not child:
                time.sleep(0.001)
            os.kill(child[0], signal.SIGKILL)

    hub.before = kill
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            surgery.push(folder, repo, tag="v1")
        finally:
            os._exit(0)
    child.append(pid)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    hub.before = None
    time.sleep(0.05)  # the server may still be acting on the last request
    return status == -signal.SIGKILL


@pytest.mark.parametrize("first", quick(range(1, PARTS + 1), 1))
def test_a_push_that_is_killed_at_any_request_is_finished_by_the_next(hub, artifact, tally, first):
    outcomes = tally["push", "killed"] = []
    for at in range(first, 100, PARTS):
        repo = f"me/killed-{at}"
        hub.reset_log()
        if not killed_while_pushing(hub, artifact, repo, at):
            break
        state(hub, repo)
        surgery.push(artifact, repo, tag="v1")
        assert state(hub, repo) == "whole" and len(publications(hub, repo)) == 1
        assert len(uploaded(hub)) == len(set(uploaded(hub))), "something was sent twice"
        outcomes.append("next run")
    assert len(outcomes) >= 15 // PARTS
