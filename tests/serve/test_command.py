"""The command: what it refuses before Ray starts, what it prints when it is ready, what signals do to it."""

import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from surgery.cli import main
from surgery.cli import serve as command
from surgery.errors import InputError
from surgery.export.serve import serving as module
from surgery.export.serve.checking import Limits, ServerConfig, checked, checked_models

from ..conftest import SHAPES

pytest.importorskip("ray.serve")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-batch", "0"], "--max-batch must be at least 1, not 0"),
        (["--queue", "0"], "--queue must be at least 1"),
        (["--batch-wait", "-1"], "--batch-wait must be a number of seconds of 0 or more"),
        (["--timeout", "nan"], "--timeout must be a number of seconds above 0"),
        (["--drain", "-1"], "--drain must be"),
        (["--replicas", "0"], "--replicas must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--port", "70000"], "--port must lie in 1 to 65535"),
        (["--device", "cuda:1"], "--device must be cpu, cuda or mps, not cuda:1"),
        (["--dtype", "int8"], "'int8' is none of float32, float16, bfloat16"),
        (["--max-pixels", "1024"], "--max-pixels 1024 is below the model's own 64x64"),
        (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7:8000"),
        (["--trust-engines"], "--trust-engines goes with --engine"),
        (["--engine", "none", "--fallback"], "--fallback goes with --engine"),
        (["--revision", "main"], "has no revision"),
        (["--keep-bytes", "0"], "--keep-bytes must be at least 1"),
        (["--api-key-file", "/no/such/file"], "--api-key-file /no/such/file cannot be read: No such file"),
        (["--admin-key-file", "/no/such/file"], "--admin-key-file /no/such/file cannot be read: No such file"),
        (["--tls-cert", "cert.pem"], "--tls-cert and --tls-key go together"),
        (["--tls-cert", __file__, "--tls-key", __file__], "is no certificate with the key in --tls-key"),
        (["--cors-origin", "app.example"], "--cors-origin app.example: write it as"),
        (["--trust-proxy", "nginx"], "--trust-proxy nginx: write an address"),
        (["--log-prompts"], "--log-prompts goes with --access-log or --otel"),
        (["--engine", "auto"], "none of the artifact's engines fits here:\n  it has none; `surgery export` builds one"),
        (["--lora", "x.safetensors"], "--lora x.safetensors: write NAME=FILE"),
        (["--lora", "x=/no/x.safetensors"], "--lora x=/no/x.safetensors: there is no file /no/x.safetensors"),
        (["--lora", f"x={SHAPES}/vae/diffusion_pytorch_model.safetensors"], "--lora x: "),
        ([SHAPES, "--lora", "a=x"], "--lora goes with one model, not several"),
        ([SHAPES, "--served-model-name", "a"], "--served-model-name goes with one model"),
    ],
)
def test_a_wrong_option_is_refused_before_ray_starts(run, shapes_artifact, options, words):
    done = run("serve", shapes_artifact, *options, check=2)
    assert words in done.stderr and not done.stdout


def test_what_is_no_model_and_a_port_in_use_are_refused_before_ray_starts(run, shapes_artifact, tmp_path):
    assert "there is no folder" in run("serve", tmp_path / "none", check=2).stderr
    assert "holds no pipeline" in run("serve", tmp_path, check=2).stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", shapes_artifact, "--port", taken.getsockname()[1], check=2)
    assert "already in use; choose another --port" in done.stderr


def test_without_ray_the_extra_is_named(run):
    code = (
        "import importlib.util, surgery.cli\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'ray' else find(name, *rest)\n"
        f"raise SystemExit(surgery.cli.main(['serve', {str(SHAPES)!r}]))\n"
    )
    assert "serving needs ray: pip install 'pladis-surgery[ray]'" in run(python=code, check=2).stderr


def test_an_image_may_have_twice_the_pixels_of_the_models_own_and_warms_up_as_it_is_drawn(shapes_artifact):
    serving = checked(str(shapes_artifact), None, ServerConfig(port=_free_port()), Limits(), {"device": "cpu"})
    assert serving.limits.max_pixels == 2 * 64 * 64 and serving.worker.hash == serving.served.artifact_hash
    assert serving.warm.sampling() == {"steps": 2, "guidance_scale": 4.0, "width": 64, "height": 64}


def test_requests_may_call_it_by_its_host_and_by_the_names_that_are_allowed_in_any_case(shapes_artifact):
    config, limits = ServerConfig(host="localhost", port=_free_port()), Limits(hosts=("Images.Example",))
    serving = checked(str(shapes_artifact), None, config, limits, {"device": "cpu"})
    assert serving.limits.hosts == ("localhost", "images.example")


def test_the_address_for_a_client_is_one_that_can_be_called():
    hosts = {"127.0.0.1": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]", "gpu.local": "gpu.local"}
    assert {host: ServerConfig(host=host, port=80).url for host in hosts} == {
        host: f"http://{shown}:80" for host, shown in hosts.items()
    }


def test_several_models_are_checked_together_and_must_have_names_of_their_own(shapes_artifact):
    config = ServerConfig(port=_free_port())
    both = checked_models([str(shapes_artifact), str(SHAPES)], None, config, Limits(), {"device": "cpu"})
    assert [one.served.name for one in both.models()] == ["shapes-pladis", "shapes"]
    with pytest.raises(InputError, match="two of the models are called shapes-pladis"):
        checked_models([str(shapes_artifact)] * 2, None, config, Limits(), {"device": "cpu"})
    named = checked_models([str(SHAPES)], None, config, Limits(), {"device": "cpu"}, names=["gpt-image-1", "mine"])
    assert named.served.names() == ("gpt-image-1", "mine")
    assert {"DDIMScheduler", "EulerDiscreteScheduler"} <= set(named.served.schedulers)


class Up:
    """A Server whose draining lasts until it is hurried, or as long as it is told."""

    def __init__(self, serving, lasts):
        self.served, self.config = serving.served, serving.server
        self.lasts, self.hurried, self.drained, self.reloads = lasts, False, None, 0

    def replicas(self):
        return self.config.replicas

    def ask_to_reload(self):
        self.reloads += 1

    def drain(self, seconds):
        self.drained = seconds
        end = time.monotonic() + self.lasts
        while time.monotonic() < end and not self.hurried:
            time.sleep(0.01)
        return 0


@pytest.fixture
def signalled(monkeypatch, shapes_artifact, capsys):
    """Runs the command over an Up that lasts so long, and sends it signals when it is ready; (status, output, Up)."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    monkeypatch.setattr(command, "_LOOK", 0.01)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup would have the tests ignore

    def signalled(*signals, lasts=0.0, options=()):
        made = []

        @contextmanager
        def server(serving):
            made.append(Up(serving, lasts))
            yield made[0]

        monkeypatch.setattr(module, "server", server)

        def send():
            while signal.getsignal(signal.SIGTERM) in (kept[signal.SIGTERM], main.__globals__["_terminate"]):
                time.sleep(0.01)
            for number in signals:
                time.sleep(0.2)
                os.kill(os.getpid(), number)

        sender = threading.Thread(target=send)
        sender.start()
        status = main(["serve", str(shapes_artifact), "--port", str(_free_port()), *options])
        sender.join()
        return status, capsys.readouterr(), made[0]

    yield signalled
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains_and_ends_well(signalled, number):
    status, output, up = signalled(number, options=["--drain", "7"])
    assert status == 0 and up.drained == 7 and not up.hurried
    line = output.out.splitlines()
    assert len(line) == 1 and line[0].startswith("http://127.0.0.1:") and line[0].endswith(", 1 replica")
    assert up.served.artifact_hash[:12] in line[0]


def test_the_second_signal_does_not_wait_and_says_so(signalled):
    status, output, up = signalled(signal.SIGTERM, signal.SIGTERM, lasts=60)
    assert status == 1 and up.hurried and "what was accepted is lost" in output.err


def test_sighup_has_the_models_loaded_anew_and_ends_nothing(signalled):
    status, _, up = signalled(signal.SIGHUP, signal.SIGHUP, signal.SIGTERM)
    assert status == 0 and up.reloads == 2 and up.drained == 60


def test_a_terminal_that_goes_away_ends_it_well(signalled, monkeypatch):
    there = iter([True, False])
    monkeypatch.setattr(command, "_has_terminal", lambda: next(there))
    status, _, up = signalled(signal.SIGHUP)
    assert status == 0 and up.reloads == 0 and up.drained == 60


def test_json_is_one_object_and_an_open_host_is_warned_of(signalled):
    status, output, up = signalled(signal.SIGTERM, options=["--json", "--host", "0.0.0.0", "--replicas", "3"])
    told = json.loads(output.out)
    assert status == 0 and told["replicas"] == 3 and told["artifact_hash"] == up.served.artifact_hash
    assert told["limits"]["max_pixels"] == 8192 and told["url"].startswith("http://127.0.0.1:")
    assert "there is no authentication" in output.err


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]
