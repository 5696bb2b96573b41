"""`push --space`: a Space with the page on what was published, its own package in it, nobody else's Space touched."""

import io
import json
import sys
import zipfile

import pytest
import yaml

import surgery
from surgery.errors import InputError, PublishError
from surgery.export.publish.space import SDK_VERSION

from ..loopback_hub import WRITE_TOKEN
from .conftest import BASE
from .test_push import REPO

SPACE = "spaces/me/patched"


def front_matter(hub):
    return yaml.safe_load(hub.read(SPACE, "README.md").decode().split("---")[1])


def test_the_space_is_the_page_of_the_commit_that_was_published(hub, artifact):
    done = surgery.push(artifact, REPO, space="")
    assert done.space.made and done.space.url.endswith("/spaces/me/patched")
    assert set(hub.tree(SPACE)) == {
        *("README.md", "app.py", "requirements.txt", "pladis_surgery.zip", "surgery-space.json", ".gitattributes"),
    }
    app = hub.read(SPACE, "app.py").decode()
    assert f'run_space("{REPO}", "{done.commit}", GPU)' in app
    compile(app, "app.py", "exec")
    front = front_matter(hub)
    assert (front["sdk"], front["app_file"], front["models"]) == ("gradio", "app.py", [REPO])
    lines = hub.read(SPACE, "requirements.txt").decode().split("\n")
    assert any(line.startswith("torch<") for line in lines) and any(line.startswith("matplotlib") for line in lines)
    assert not any(line.startswith(("gradio", "ray", "pytest")) for line in lines)
    assert WRITE_TOKEN.encode() not in b"".join(hub.read(SPACE, path) for path in hub.tree(SPACE))


def test_it_carries_the_package_that_made_it(hub, artifact, tmp_path, run):
    surgery.push(artifact, REPO, space="")
    with zipfile.ZipFile(io.BytesIO(hub.read(SPACE, "pladis_surgery.zip"))) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "package")
    assert "surgery/export/serve/front.py" in names and "surgery/recipes/shapes.yaml" in names
    assert not [name for name in names if name.endswith((".safetensors", ".pyc"))]
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'package')!r})\n"
        "import surgery, surgery.studio.serving, surgery.export.publish\n"
        "from surgery.recipe.reading import shipped_recipes\n"
        "assert shipped_recipes()['shapes'].is_file()\n"
        "print(surgery.__file__, surgery.__version__)"
    )
    assert str(tmp_path / "package") in run(python=code, fresh=True, check=0).stdout


def test_the_same_again_does_nothing_and_a_new_commit_moves_it(hub, artifact):
    first = surgery.push(artifact, REPO, space="")
    again = surgery.push(artifact, REPO, space="")
    assert not again.made and not again.space.made and again.space.commit == first.space.commit
    hub.commit_as_other(REPO, {"notes.txt": b"more"})
    later = surgery.push(artifact, REPO, space="")
    assert later.space.made and later.commit.encode() in hub.read(SPACE, "app.py") and len(hub.commits(SPACE)) == 3


def test_the_page_opens_the_repository_and_its_recipe_names_the_base_at_its_commit(hub, artifact, tmp_path):
    from surgery.studio.opening import open_for_page
    from surgery.studio.screen import recipe_text, screen_of

    done = surgery.push(artifact, REPO)
    opened = open_for_page(REPO, done.commit)
    assert opened.hash == json.loads(hub.read(REPO, "surgery.json"))["hash"]
    assert opened.base["pipeline"] == BASE and opened.base["revision"] == hub.commits(BASE)[0].oid
    path = tmp_path / "page.yaml"
    path.write_text(recipe_text(screen_of({"prompt": "a star"}, opened), opened))
    assert surgery.plan(path).plan.base["revision"] == opened.base["revision"]
    plain = open_for_page(BASE)
    assert plain.base == opened.base and plain.operations[0]["with"] == {"operator": "pladis"}


def test_a_dry_run_lists_it_and_sends_nothing(hub, artifact):
    plan = surgery.push(artifact, REPO, space="me/page", dry_run=True)
    assert plan.space.repo == "me/page" and {step.action for step in plan.space.steps} == {"send"}
    assert plan.space.head is None and json.loads(json.dumps(plan.to_json()))["space"]["model"] == REPO
    assert "spaces/me/page" not in hub.repositories and REPO not in hub.repositories


def test_it_is_private_where_the_model_is(hub, artifact):
    done = surgery.push(artifact, REPO, private=True, space="")
    assert hub.repositories[SPACE].private and done.plan.space.private
    assert any("secret HF_TOKEN" in note for note in done.plan.space.notes)


def test_a_public_space_does_not_show_a_private_model(hub, artifact):
    hub.create(SPACE)
    with pytest.raises(PublishError, match="the Space me/patched is public, and me/patched is private"):
        surgery.push(artifact, REPO, private=True, space="")
    assert REPO not in hub.repositories


def test_a_space_that_somebody_else_made_or_changed_is_left_alone(hub, artifact):
    hub.create(SPACE)
    hub.commit_as_other(SPACE, {"app.py": b"import gradio", "data.csv": b"1"})
    with pytest.raises(PublishError, match="holds (README.md, )?app.py.* that this tool did not put there"):
        surgery.push(artifact, REPO, space="")
    assert hub.read(SPACE, "app.py") == b"import gradio"
    surgery.push(artifact, REPO, space="", overwrite=True)
    assert hub.read(SPACE, "data.csv") == b"1" and b"run_space" in hub.read(SPACE, "app.py")
    hub.commit_as_other(SPACE, {"app.py": b"changed", "data.csv": None})
    with pytest.raises(PublishError, match="app.py that this tool did not put there, or that was changed since"):
        surgery.push(artifact, REPO, space="")


def test_names_and_pull_requests_are_checked_first(hub, artifact):
    for wrong, words in (("nobody", "names no owner"), ("me/a b", "cannot be a repository")):
        with pytest.raises(InputError, match=words):
            surgery.push(artifact, REPO, space=wrong)
    with pytest.raises(InputError, match="--space shows what is published"):
        surgery.push(artifact, REPO, space="", create_pr=True)
    with pytest.raises(PublishError, match="may not write to them's repositories"):
        surgery.push(artifact, REPO, space="them/page")
    assert REPO not in hub.repositories


def test_the_command_says_what_it_does(hub, artifact, run, tmp_path):
    from ..loopback_hub import environment

    env = environment(hub, tmp_path / "home", WRITE_TOKEN)
    dry = run("push", artifact, "--repo", REPO, "--space", "--dry-run", env=env, check=0).stdout
    assert "Space me/patched, public: one commit" in dry and "pladis_surgery.zip" in dry
    done = json.loads(run("push", artifact, "--repo", REPO, "--space", "me/page", "--json", env=env, check=0).stdout)
    assert done["space"]["repo"] == "me/page" and done["space"]["made"]
    refused = run("apply", "shapes", "--space")
    assert refused.returncode == 2 and "--space goes with --push" in refused.stderr


def test_gradio_is_the_version_that_this_was_tested_with():
    from pathlib import Path

    pins = (Path(__file__).parents[2] / "constraints.txt").read_text()
    assert f"\ngradio=={SDK_VERSION}\n" in pins


@pytest.mark.slow
def test_the_app_runs_and_draws(hub, artifact, tmp_path):
    """As the Hub would run it: its own files alone, the model from the Hub, in a process of its own."""
    import os
    import subprocess
    import time

    pytest.importorskip("gradio", reason="a Space is Gradio's: pip install '.[ui]'")
    from gradio_client import Client

    from ..loopback_hub import environment

    surgery.push(artifact, REPO, space="")
    folder = tmp_path / "space"
    folder.mkdir()
    for path in hub.tree(SPACE):
        (folder / path).write_bytes(hub.read(SPACE, path))
    own = {"GRADIO_SERVER_PORT": "7987", "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    env = {**os.environ, **environment(hub, tmp_path / "space-home"), **own}
    with subprocess.Popen(
        [sys.executable, "app.py"], cwd=folder, env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for _ in range(120):
                try:
                    client = Client("http://127.0.0.1:7987", verbose=False, analytics_enabled=False)
                    break
                except Exception:
                    assert process.poll() is None, process.stderr.read()
                    time.sleep(1)
            parameters = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/draw"][
                "parameters"
            ]
            labels = [one["label"] for one in parameters]
            values = [one.get("parameter_default") for one in parameters]
            given = {"prompt": "a star", "steps": 1, "images": 1, "height": 16, "width": 16}
            values = [given.get(label, value) for label, value in zip(labels, values, strict=True)]
            status, base, patched, recipe = client.predict(*values, api_name="/draw")
            assert "done" in status and base and patched and "operations" in str(recipe)
        finally:
            process.terminate()
