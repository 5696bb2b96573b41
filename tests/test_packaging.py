"""The wheel: it carries the recipes and the tiny pipeline, and works from any folder."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_carries_recipes_and_pipeline_and_applies_them_from_anywhere(tmp_path, run):
    # A copy of what git tracks: setuptools writes build folders beside what it builds.
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        else:
            target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, tmp_path / "source"], check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"surgery"}
    assert {"surgery/recipes/shapes.yaml", "surgery/recipes/sdxl_dmd2.yaml", "surgery/export/publish/commit.py"} <= set(
        names
    )
    assert "surgery/recipes/shapes/unet/diffusion_pytorch_model.safetensors" in names
    parts = ("surgery/", "export/", "recipes/")
    wanted = {name for name in tracked if name.startswith(parts) and not (ROOT / name).is_dir()}
    wanted = {name if name.startswith("surgery/") else f"surgery/{name}" for name in wanted}
    assert {name for name in wanted - set(names) if not name.endswith(".md")} == set()

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import surgery; print(surgery.__file__)\nfrom surgery.cli import main\nraise SystemExit(main())"
    )
    done = run("apply", "shapes", python=code, cwd=elsewhere, check=0)
    assert str(tmp_path / "site") in done.stdout and "artifact: out/shapes-pladis" in done.stdout
    assert (elsewhere / "out/shapes-pladis/surgery.json").is_file()


def test_workflows_call_what_the_makefile_has():
    import yaml

    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflows = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    steps = [step for workflow in workflows for job in workflow["jobs"].values() for step in job["steps"]]
    called = {word for step in steps for word in re.findall(r"^make (\S+)", step.get("run", ""), re.MULTILINE)}
    assert {"demo", "test"} <= called <= targets
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
