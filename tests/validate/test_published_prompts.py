"""Published sets of prompts: fetched at their commit, checked, kept."""

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from surgery.errors import SurgeryError
from surgery.validate.metrics.questions import DpgBench, SoftTifaGm
from surgery.validate.prompts import Prompt, hub_sets, open_prompts
from surgery.validate.prompts import hub_sets as fetching
from surgery.validate.prompts.hub_sets import SETS, SetFile

from ..loopback_hub import WRITE_TOKEN, hub_server
from ..publish.conftest import no_waiting, use_hub  # noqa: F401


def texts(prompts):
    return [prompt.text for prompt in prompts.prompts]


def test_every_published_set_is_pinned_and_can_be_checked():
    assert {name: published.size for name, published in SETS.items()} == {
        "drawbench": 200,
        "hpd": 400,
        "hpd-full": 3200,
        "pick-a-pic": 500,
        "coco": 30_000,
        "geneval": 553,
        "geneval2": 800,
        "dpg-bench": 1065,
    }
    for name, published in SETS.items():
        assert published.name == name and published.files and published.source
        assert len(published.revision) == 40 and set(published.revision) <= set("0123456789abcdef")
        assert published.prompts_sha256 or all(file.sha256 for file in published.files)
        assert published.host == "hub" or all(file.sha256 for file in published.files)


@pytest.fixture
def hub(use_hub):  # noqa: F811
    """A server that this process takes for the Hub, and for GitHub too."""
    with hub_server() as server:
        use_hub(server, token=None)
        yield server


@pytest.fixture
def publish(hub, monkeypatch):
    """publish(name, {path: bytes}, checked=True, **changes): a published set whose files are these at its commit.

    Its main branch holds other files by the same names. checked: what the table says of the content is made true.
    """
    monkeypatch.setattr(fetching, "_GITHUB", hub.url + "/{repo}/resolve/{revision}/{path}")

    def publish(name, files, checked=True, **changes):
        published = replace(SETS[name], **changes)
        if checked:
            digests = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
            known = tuple(replace(file, sha256=file.sha256 and digests[file.path]) for file in published.files)
            published = replace(published, files=known)
        monkeypatch.setitem(hub_sets.SETS, name, published)
        repo = published.repo if published.host == "github" else f"datasets/{published.repo}"
        repository = hub.create(repo)
        oid = hub.commit_as_other(repo, files)
        repository.commits[published.revision] = replace(repository.commits[oid], oid=published.revision)
        hub.commit_as_other(repo, dict.fromkeys(files, b"newer, and something else"))
        return published

    return publish


def lines_sha256(*prompts):
    return hashlib.sha256("".join(f"{prompt}\n" for prompt in prompts).encode()).hexdigest()


DRAWBENCH = {
    "DrawBench Prompts - Sheet1.csv": b"Prompts,Category\r\nA red car.,Colors\r\nA dog.,Gary Marcus et al. \r\n"
}
DRAWBENCH_CHECKS = {"count": 2, "prompts_sha256": lines_sha256("A red car.", "A dog.")}


def test_a_published_set_is_fetched_at_its_commit_whatever_is_newer(hub, publish):
    published = publish("drawbench", DRAWBENCH, **DRAWBENCH_CHECKS)
    prompts = open_prompts("drawbench")
    assert prompts.prompts == (Prompt("A red car.", "Colors"), Prompt("A dog.", "Gary Marcus et al."))
    assert (prompts.name, prompts.source) == ("drawbench", "sayakpaul/drawbench")
    assert prompts.revision == published.revision == "ad794cba698c253ffdb6d18eff3fc87b004c1135"
    assert hub.fetched() == ["DrawBench Prompts - Sheet1.csv"]
    assert open_prompts("drawbench") == prompts and len(hub.fetched()) == 1  # the second time out of the cache


def test_hpd_takes_as_many_of_each_style_evenly_spaced(publish):
    styles = ("anime", "concept-art", "paintings", "photo")
    files = {f"benchmark/{style}.json": json.dumps([f"{style} {i}" for i in range(4)]).encode() for style in styles}
    publish("hpd", files, count=16, per_file=2)
    assert open_prompts("hpd").prompts == tuple(Prompt(f"{style} {i}", style) for style in styles for i in (0, 2))


def test_hpd_full_is_every_prompt_of_every_style(publish):
    styles = ("anime", "concept-art", "paintings", "photo")
    files = {f"benchmark/{style}.json": json.dumps([f"{style} {i}" for i in range(3)]).encode() for style in styles}
    publish("hpd-full", files, count=12)
    assert len(open_prompts("hpd-full").prompts) == 12


def test_pick_a_pic_keeps_the_text_of_its_rows_alone(publish):
    rows = b'{"id": 0, "prompt": "a cat\\nin a hat "}\n{"id": 1, "prompt": "zentai"}\n'
    publish("pick-a-pic", {"test.jsonl": rows}, count=2, prompts_sha256=lines_sha256("a cat in a hat ", "zentai"))
    assert open_prompts("pick-a-pic").prompts == (Prompt("a cat\nin a hat"), Prompt("zentai"))


def test_geneval_keeps_the_facts_that_its_metric_judges_by(publish):
    entry = {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
    }
    data = json.dumps({**entry, "prompt": "a photo of two clocks"}).encode() + b"\n"
    publish("geneval", {"prompts/evaluation_metadata.jsonl": data}, count=1)
    prompts = open_prompts("geneval")
    assert prompts.prompts == (Prompt("a photo of two clocks", "counting", entry),)
    assert prompts.source == "https://github.com/djghosh13/geneval" and len(prompts.revision) == 40


def test_geneval2_has_its_questions_and_is_grouped_by_its_atoms(publish):
    entry = {"vqa_list": [["How many cats are in the image?", "two"]], "skills": ["count"]}
    data = json.dumps({"prompt": "two cats", "atom_count": 3, **entry}).encode()
    publish("geneval2", {"geneval2_data.jsonl": data}, count=1)
    (prompt,) = open_prompts("geneval2").prompts
    assert prompt == Prompt("two cats", "3 atoms", {**entry, "atom_count": "3 atoms"})
    SoftTifaGm.check_prompts([prompt])


DPG = b"""item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,\
question_natural_language
1,"a red cat, and a mat",,1,0,entity,whole,entity - whole (cat),Is there a cat?
1,"a red cat, and a mat",,2,1,attribute,color,"attribute - color (cat, red)",Is the cat red?
7,a dog by a tree,,1,0,entity,whole,entity - whole (dog),Is there a dog?
7,a dog by a tree,,2,"1, 3",relation,spatial,"relation - spatial (dog, tree)",Is the dog by the tree?
7,a dog by a tree,,3,0,entity,whole,entity - whole (tree),Is there a tree?
"""


def test_dpg_bench_gathers_the_questions_of_each_prompt_and_is_known_by_gits_hash(publish, monkeypatch):
    oid = hashlib.sha1(b"blob %d\0" % len(DPG) + DPG).hexdigest()
    known = replace(SETS["dpg-bench"], files=(SetFile("dpg_bench/dpg_bench.csv", oid),))
    monkeypatch.setitem(hub_sets.SETS, "dpg-bench", known)
    publish("dpg-bench", {"dpg_bench/dpg_bench.csv": DPG}, checked=False, count=2)
    prompts = open_prompts("dpg-bench").prompts
    assert [prompt.text for prompt in prompts] == ["a red cat, and a mat", "a dog by a tree"]
    assert prompts[1].facts["questions"] == [
        {"id": 1, "question": "Is there a dog?", "after": []},
        {"id": 2, "question": "Is the dog by the tree?", "after": [1, 3]},
        {"id": 3, "question": "Is there a tree?", "after": []},
    ]
    DpgBench.check_prompts(prompts)


def test_a_file_of_another_git_hash_is_refused(publish):
    publish("dpg-bench", {"dpg_bench/dpg_bench.csv": DPG}, checked=False)
    with pytest.raises(SurgeryError, match="arrived damaged: its git hash is not 98457fc99019"):
        open_prompts("dpg-bench")


def test_a_table_that_is_no_dpg_bench_says_so(publish):
    publish("dpg-bench", {"dpg_bench/dpg_bench.csv": DPG.replace(b",1,0,", b",one,0,", 1)}, count=2)
    with pytest.raises(SurgeryError, match=r"dpg_bench.csv:2 is no question of DPG-Bench"):
        open_prompts("dpg-bench")


def test_coco_is_fetched_once_without_a_token_and_kept(hub, publish, use_hub):  # noqa: F811
    use_hub(hub, token=WRITE_TOKEN)
    data = b'image_id,source,prompt,evaluation_seed\n01,coco-30k,"A bicycle, red.\n",4\n02,coco-30k,A cat.,5\n'
    publish("coco", {"data/coco_30k.csv": data}, count=2)
    assert texts(open_prompts("coco")) == texts(open_prompts("coco")) == ["A bicycle, red.", "A cat."]
    assert hub.fetched() == ["data/coco_30k.csv"] and not hub.authorizations


@pytest.mark.parametrize(
    ("name", "files", "changes", "message"),
    [
        ("drawbench", DRAWBENCH, {**DRAWBENCH_CHECKS, "count": 3}, "holds 2 prompts instead of 3"),
        ("drawbench", DRAWBENCH, {"count": 2}, "holds other prompts than those that were published"),
        ("hpd", {f.path: b"[]" for f in SETS["hpd"].files}, {}, r"arrived damaged \(benchmark/anime.json\)"),
    ],
)
def test_what_is_not_what_was_published_is_refused_and_not_kept(hub, publish, tmp_path, name, files, changes, message):
    publish(name, files, checked=False, **changes)
    with pytest.raises(SurgeryError, match=f"{message}.*, and was taken out of the cache; run the same command again"):
        open_prompts(name)
    assert not [path for path in (tmp_path / "home/hub").rglob("*") if path.suffix in (".csv", ".json")]


def test_a_damaged_file_from_github_is_refused_and_a_damaged_copy_fetched_again(hub, publish, tmp_path):
    publish("coco", {"data/coco_30k.csv": b"prompt\nA cat.\n"}, checked=False, count=1)
    with pytest.raises(SurgeryError, match="arrived damaged: its sha256 is not 42c57b188c8f"):
        open_prompts("coco")
    assert not [path for path in (tmp_path / "home").rglob("*coco_30k*") if path.is_file()]

    files = {"prompts/evaluation_metadata.jsonl": b'{"tag": "t", "include": [], "prompt": "a"}\n'}
    publish("geneval", files, count=1)
    open_prompts("geneval")
    (kept,) = (path for path in (tmp_path / "home").rglob("evaluation_metadata.jsonl"))
    kept.write_bytes(b"{}\n")
    assert texts(open_prompts("geneval")) == ["a"]


def test_without_a_connection_the_cache_is_used_else_it_says_so(hub, publish, use_hub, no_waiting):  # noqa: F811
    publish("drawbench", DRAWBENCH, **DRAWBENCH_CHECKS)
    publish("coco", {"data/coco_30k.csv": b"prompt\nA cat.\n"}, count=1)
    fetched = open_prompts("drawbench"), open_prompts("coco")
    use_hub(hub, offline=True)
    assert (open_prompts("drawbench"), open_prompts("coco")) == fetched
    use_hub(hub, home="empty", offline=True)
    for name in ("drawbench", "coco"):
        with pytest.raises(SurgeryError, match=r"cannot reach .*offline mode.* not in the local cache\. Check the"):
            open_prompts(name)
    use_hub(SimpleNamespace(url="http://127.0.0.1:9"), home="empty")
    with pytest.raises(SurgeryError, match=r"cannot reach sayakpaul/drawbench: .* not in the local cache"):
        open_prompts("drawbench")


def test_a_github_that_cannot_be_reached_or_fails_says_so(hub, publish, monkeypatch, no_waiting):  # noqa: F811
    publish("coco", {"data/coco_30k.csv": b"prompt\nA cat.\n"}, count=1)
    hub.faults["data/coco_30k.csv"] = 1  # which passes
    assert len(open_prompts("coco").prompts) == 1
    monkeypatch.setattr(fetching, "_GITHUB", hub.url + "/{repo}/resolve/{revision}/nothing/{path}")
    monkeypatch.setitem(hub_sets.SETS, "coco", replace(SETS["coco"], revision="0" * 40))
    with pytest.raises(SurgeryError, match="fetching the prompts of .* failed: .*run the same command again"):
        open_prompts("coco")
    monkeypatch.setattr(fetching, "_GITHUB", "http://127.0.0.1:9/{repo}/{revision}/{path}")
    with pytest.raises(SurgeryError, match="cannot reach http://127.0.0.1:9/.*Check the connection"):
        open_prompts("coco")


def test_a_data_set_that_is_gone_gated_or_lacks_its_file_says_what_to_do(hub, publish):
    with pytest.raises(SurgeryError, match="no such data set on the Hub any more.*give a file of prompts instead"):
        open_prompts("drawbench")
    publish("drawbench", DRAWBENCH, **DRAWBENCH_CHECKS)
    SETS["drawbench"] = replace(SETS["drawbench"], files=(SetFile("other.csv"),))
    with pytest.raises(SurgeryError, match="it has no file other.csv at its commit ad794cba698c"):
        open_prompts("drawbench")
    SETS["drawbench"] = replace(SETS["drawbench"], revision="0" * 40)
    with pytest.raises(SurgeryError, match="its commit 000000000000 is not there any more"):
        open_prompts("drawbench")
    hub.gated.add("datasets/sayakpaul/drawbench")
    with pytest.raises(SurgeryError, match="is gated: accept its terms on its Hub page, then `hf auth login`"):
        open_prompts("drawbench")


def test_a_server_that_fails_once_is_asked_again_and_one_that_fails_on_is_told(hub, publish, no_waiting):  # noqa: F811
    publish("drawbench", DRAWBENCH, **DRAWBENCH_CHECKS)
    (path,) = DRAWBENCH
    hub.faults[path] = 1
    assert len(open_prompts("drawbench").prompts) == 2
    publish("pick-a-pic", {"test.jsonl": b'{"prompt": "a"}\n'}, count=1, prompts_sha256=lines_sha256("a"))
    hub.faults["test.jsonl"] = 99
    with pytest.raises(SurgeryError, match="fetching the prompts of Jialuo21/pickapic-test failed"):
        open_prompts("pick-a-pic")
