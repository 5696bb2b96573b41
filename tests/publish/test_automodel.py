"""diffusers' AutoModel finds a patched component by `auto_map` in a folder; on the Hub see test_load.py."""

import json

import pytest
from diffusers import AutoModel

import surgery
from surgery.errors import ArtifactError


@pytest.mark.parametrize("saved_again", [False, True])
def test_auto_model_loads_the_patched_class_when_trusted_and_refuses_else(
    artifact, saved_again, tmp_path, monkeypatch, caplog
):
    ours = surgery.load(artifact, quiet=True).unet
    folder = tmp_path / "again" if saved_again else artifact
    if saved_again:
        ours.save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModel.from_pretrained(str(folder), subfolder="unet")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    caplog.clear()
    found = AutoModel.from_pretrained(str(folder), subfolder="unet", trust_remote_code=True)
    assert type(found).__name__ == "PladisUNet2DConditionModel" and type(found) is not type(ours)
    assert found.pladis_operations() == ours.pladis_operations()
    assert "auto_map" not in found.config and "auto_map" not in caplog.text


def test_loading_says_nothing_of_the_indexs_auto_map(artifact, caplog):
    surgery.load(artifact, quiet=True)
    assert "auto_map" not in caplog.text


def test_an_index_that_has_auto_model_run_other_code_is_not_loaded_and_not_verified(artifact):
    path = artifact / "model_index.json"
    index = json.loads(path.read_text())
    index["auto_map"]["AutoModel"] = "evil.Model"
    path.write_text(json.dumps(index))
    assert any("other code" in check.detail for check in surgery.verify(artifact).checks if check.status == "failed")
    (artifact / "surgery.json").unlink()
    with pytest.raises(ArtifactError, match="other code"):
        surgery.load(artifact, quiet=True)
