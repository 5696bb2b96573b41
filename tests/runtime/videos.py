"""An artifact of the tiny LTX-Video, which draws four frames a second of nine in two steps."""

import json

import pytest

import surgery

from ..nn.backbones.video import ltx

SAMPLING = {
    "steps": 2,
    "guidance_scale": 3.0,
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "fps": 4,
    "max_sequence_length": 16,
    "negative_prompt": "bad",
}


@pytest.fixture(scope="session")
def video_artifact(tmp_path_factory):
    """The folder of the artifact; the base beside it is base/."""
    folder = tmp_path_factory.mktemp("videos")
    ltx()[0].save_pretrained(folder / "base")
    recipe = {
        "schema": 1,
        "name": "tiny-video",
        "base": {"pipeline": "./base"},
        "operations": [{"replace": "cross-attention", "with": {"operator": "pladis"}}],
        "sampling": SAMPLING,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return surgery.apply(folder / "recipe.yaml", folder / "artifact").folder
