"""Rows of videos: a folder of mp4 files for each, as VBench names them, from prompts that are given."""

import pytest
import yaml

from surgery.errors import InputError
from surgery.papers.entries import Entry
from surgery.papers.filmed import draw_videos
from surgery.papers.manifest import PromptsOf, read_table
from surgery.papers.task import Given, Task
from surgery.validate.jobs import Drawing

from ..runtime.videos import video_artifact  # noqa: F401  a fixture


@pytest.fixture
def task(video_artifact, tmp_path):  # noqa: F811
    """The slides' Table 3 with two rows of a tiny model: untouched, and guided by STG."""
    recipe = yaml.safe_load((video_artifact / "recipe.yaml").read_text())
    recipe["base"] = {"pipeline": str(video_artifact.parent / "base")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "prompts.txt").write_text("a cat\na dog on it\n")

    def made(**given):
        path = str(tmp_path / "tiny.yaml")
        entries = (
            Entry("Tiny", "tiny", path, (), False, None, {}),
            Entry("Tiny, patched", "tiny", path, (), True, "pladis", {}),
        )
        given = Given(drawing=Drawing(device="cpu"), **given)
        return Task(read_table("oseg-table-3"), entries, {"vbench": PromptsOf()}, given, tmp_path / "t", tmp_path)

    return made


def test_each_row_has_a_folder_of_its_videos(task, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    (tmp_path / "t").mkdir()
    drawn = draw_videos(task(prompts=tmp_path / "prompts.txt"))
    assert list(drawn.files) == ["videos of Tiny", "videos of Tiny, patched"] and drawn.facts["videos of a row"] == 2
    for folder in drawn.files.values():
        assert {path.name for path in (tmp_path / "t" / folder).iterdir()} == {"a cat-0.mp4", "a dog on it-0.mp4"}


def test_prompts_that_do_not_ship_have_to_be_given(task):
    with pytest.raises(InputError, match=r"drawn from the prompts of vbench, .* --prompts FILE"):
        draw_videos(task())
