"""What earlier versions published loads with this one, from disk and from the Hub, and draws what it drew then."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.artifact.verify import RELEASES, release_of
from surgery.hub import sha256_of

from ..frozen.make import draw

FROZEN = Path(__file__).parent.parent / "frozen"
VERSIONS = sorted(path.name for path in FROZEN.glob("0.*"))


def test_every_release_has_its_frozen_artifact():
    assert sorted(RELEASES) == VERSIONS and len(VERSIONS) >= 2
    for version, digest in RELEASES.items():
        code = next((FROZEN / version / "artifact/unet").glob("modeling_*.py"))
        assert sha256_of(code) == digest and release_of(digest) == version
    assert release_of("0" * 64) is None


@pytest.mark.parametrize("version", VERSIONS)
def test_a_frozen_artifact_loads_and_draws_what_it_drew(version):
    folder = FROZEN / version / "artifact"
    pipeline = surgery.load(folder, dtype=torch.float32, verify=True, quiet=True)
    expected = load_file(FROZEN / version / "expected.safetensors")["image"]
    difference = (draw(pipeline) - expected).abs().max().item()
    print(f"{version}: largest difference {difference:.1e}")
    assert difference < 1e-3
    surgery.unpatch(pipeline)
    assert (draw(pipeline) - expected).abs().max() > 1e-4  # so the patch is what was compared


@pytest.mark.parametrize("version", VERSIONS)
def test_a_frozen_artifact_is_verified_published_and_loaded_from_the_hub(hub, use_hub, version):
    folder = FROZEN / version / "artifact"
    assert surgery.verify(folder).verified
    code = next(check for check in surgery.verify(folder).checks if check.what == "code")
    assert code.detail == f"that of pladis-surgery {version}"
    hub.create("owner/frozen", folder)  # as that version's users put it there
    use_hub(hub, home="fresh")
    pipeline = surgery.load("owner/frozen", dtype=torch.float32, quiet=True)
    expected = load_file(FROZEN / version / "expected.safetensors")["image"]
    assert (draw(pipeline) - expected).abs().max() < 1e-3
    assert surgery.push(folder, "me/again").made
    report = surgery.verify("me/again")  # whose base is a folder, with which nobody can compare it
    assert {check.status for check in report.checks if check.what == "weights"} == {"unknown"}
    assert all(check.status in ("ok", "note") for check in report.checks if check.what != "weights")


def test_the_frozen_code_draws_what_it_drew_by_the_diffusers_of_today_alone(run, tmp_path):
    code = (
        "import runpy, sys; sys.modules['surgery'] = None\n"
        f"runpy.run_path({str(FROZEN / 'compare.py')!r}, run_name='__main__')\n"
    )
    done = run(python=code, env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}, check=0)
    told = [line.split() for line in done.stdout.splitlines()]
    assert [words[0] for words in told] == [f"{version}:" for version in VERSIONS]
    assert all(int(words[1]) >= 3 and float(words[-3]) < 1e-3 for words in told)
