"""Which engines there are: what engine.json may not be, what an engine's name is made of, what fits."""

from dataclasses import replace

import pytest

from surgery.engines.fitting import choose
from surgery.engines.record import Profile, read_engine, target_key
from surgery.errors import ArtifactError, InputError
from surgery.machine import Machine

HERE = Machine("cpu", "x86_64 AVX512", "Linux", "2.13.0", None, "Some CPU")


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "cannot be read"), ("{}", "schema_version None"), ('{"schema_version": 1}', "cannot be read at key: field")],
)
def test_a_damaged_record_is_an_error_in_words(tmp_path, text, match):
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(ArtifactError, match=match):
        read_engine(tmp_path)


def test_a_key_is_of_what_the_machine_can_do_and_not_of_its_name():
    def key(machine, **further):
        return target_key("unet", "onnx", machine, "float32", Profile.of(1, 64, 64), "ab" * 32, **further)

    assert key(HERE) == key(replace(HERE, name="Another CPU"))
    assert key(HERE).startswith("unet-onnx-cpu-avx512-float32-")
    others = [replace(HERE, architecture="x86_64 AVX2"), replace(HERE, torch="2.12.0"), replace(HERE, system="Darwin")]
    assert len({key(HERE), key(HERE, regional=True), *map(key, others)}) == 5


def test_an_artifact_without_engines_says_what_builds_one():
    for wanted in ("auto", "unet-x"):
        with pytest.raises(InputError, match="it has none; `surgery export` builds one"):
            choose([], wanted)
