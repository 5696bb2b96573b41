"""`surgery serve` itself: a process, Ray Serve, replicas of the tiny pipeline, and what it promises its clients."""

import base64
import http.client
import json
import runpy
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from .test_gateway import call, until
from .test_runner import difference

pytest.importorskip("ray.serve")
psutil = pytest.importorskip("psutil")

QUEUE = 10


class Server:
    """A running `surgery serve`."""

    def __init__(self, processes, folder, *options):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = ["serve", folder, "--port", self.port, "--json", *options]
        self.process = processes.start(command, env={"OMP_NUM_THREADS": "1"})
        self.url = f"http://127.0.0.1:{self.port}"

    def ready(self):
        """The one JSON object on standard output, once it is there."""
        while not (out := self.process.out()).endswith("}\n"):
            assert self.process.poll() is None, f"it did not start:\n{self.process.errors()}"
            time.sleep(0.05)
        told = json.loads(out)
        assert "url" in told, f"it did not start: {told}"
        return told

    def draw(self, **asked):
        """(status, body) of a request for images."""
        status, body, _ = call(self.url, timeout=300, **{"prompt": "a red circle", "steps": 2, **asked})
        return status, json.loads(body)

    def metric(self, name):
        """The value of one line of /metrics."""
        lines = call(self.url, "/metrics")[1].decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.split()[0] == name)

    def replicas(self):
        """The processes that hold the model."""
        found = []
        for one in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # one that has just ended
                found += [one] if ":Replica" in " ".join(one.cmdline()[:1]) else []
        return found

    def end(self, number=signal.SIGTERM):
        """(exit status, standard error) after a signal."""
        self.process.send_signal(number)
        return self.process.wait(180), self.process.errors()


@pytest.fixture(scope="module")
def server(request, processes, shapes_artifact, tmp_path_factory):
    """One that takes 10 requests at a time, with a second replica where a test kills one."""
    log = tmp_path_factory.mktemp("server") / "log"
    kills = any(
        item.function is test_no_accepted_request_is_lost_with_a_replica_that_is_killed
        for item in request.session.items
    )
    meant = 1 + kills
    options = ["--replicas", meant, "--max-batch", 4, "--batch-wait", 0.2, "--queue", QUEUE, "--drain", 170]
    started = Server(processes, shapes_artifact, *options, "--device", "cpu", "--access-log", log)
    started.log, started.meant = log, meant
    try:
        yield started
    finally:
        for _ in range(2):  # the second signal asks it not to wait
            started.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        started.process.wait(60)


@pytest.fixture(scope="module")
def said(server):
    """What it prints when it is ready."""
    return server.ready()


class Encoded:
    """An image as `difference` reads one."""

    def __init__(self, image):
        self.image = image


class Drawn(Encoded):
    """The first image of an answer."""

    def __init__(self, body, at=0):
        super().__init__(body["data"][at]["b64_json"])


def test_it_says_what_it_serves_and_draws_the_same_image_alone_and_in_a_batch(server, said):
    (model,) = json.loads(call(server.url, "/v1/models")[1])["data"]
    assert (model["id"], model["artifact_hash"]) == (said["model"], said["artifact_hash"])
    status, body, headers = call(server.url, "/health", headers={"X-Request-Id": "mine-1"})
    assert status == 200 and json.loads(body)["replicas"] == said["replicas"] == server.meant
    assert headers.get_all("X-Request-Id") == ["mine-1"]
    status, alone = server.draw(seed=3)
    assert status == 200 and alone["data"][0]["seed"] == 3 and alone["size"] == "64x64"
    before = server.metric("surgery_batch_images_count"), server.metric("surgery_batch_images_sum")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda seed: server.draw(seed=seed), range(4)))
    assert [status for status, _ in answers] == [200] * 4
    assert difference(Drawn(answers[3][1]), Drawn(alone)) <= 2 < difference(Drawn(answers[3][1]), Drawn(answers[2][1]))
    batches = server.metric("surgery_batch_images_count") - before[0]
    assert server.metric("surgery_batch_images_sum") - before[1] == 4 and batches <= 2
    _, strong = server.draw(seed=3, pladis={"scale": 4.0, "alpha": 2.0})
    assert difference(Drawn(strong), Drawn(alone)) > 2 and strong["pladis"] == {"alpha": 2.0, "scale": 4.0}
    status, body = server.draw(pladis={"scale": 4.0, "eta": 1.0})
    assert status == 400 and body["error"]["param"] == "pladis.eta"


def test_the_official_client_streams_edits_and_follows_an_address_through_ray(server, said):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    extra = {"seed": 3, "steps": 4}
    first, second, last = client.images.generate(prompt="a star", stream=True, partial_images=2, extra_body=extra)
    assert (first.partial_image_index, second.partial_image_index) == (0, 1) and last.usage.input_tokens > 2
    made = client.images.generate(prompt="a star", response_format="url", extra_body=extra)
    with urllib.request.urlopen(made.data[0].url) as answer:
        image = answer.read()
    assert difference(Encoded(last.b64_json), Encoded(base64.b64encode(image).decode())) <= 2
    edited = client.images.edit(image=image, prompt="a red circle", extra_body={**extra, "strength": 0.5})
    assert edited.size == "64x64" and edited.usage.input_tokens_details.image_tokens > 0
    before = server.metric("surgery_images_total")
    events = client.images.generate(prompt="a star", stream=True, partial_images=3, extra_body={"steps": 80})
    events.response.close()  # the client leaves after the first
    until(lambda: server.metric("surgery_requests_in_flight") == server.metric("surgery_batches_in_flight") == 0)
    assert server.metric("surgery_images_total") == before
    assert {json.loads(line)["status"] for line in server.log.read_text().splitlines()} >= {200}


def test_the_example_of_a_client_draws(server, said, tmp_path):
    pytest.importorskip("openai")
    file = Path(__file__).parent.parent.parent / "examples/openai_client.py"
    example = runpy.run_path(str(file))
    example["draw"](server.url, tmp_path)
    names = {"preview-0.png", "preview-1.png", "image.png", "edited.png"}
    assert {path.name for path in tmp_path.iterdir() if Image.open(path).size == (64, 64)} == names


def test_no_port_but_its_own_answers_who_has_not_its_token(server, said):
    import grpc
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    tree = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    listening = {one.laddr for process in tree for one in process.net_connections("tcp") if one.status == "LISTEN"}
    beyond = {address.port for address in listening if address.ip.removeprefix("::ffff:") != "127.0.0.1"}
    assert server.port in {address.port for address in listening} - beyond
    for port in beyond:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
            serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest(serve_pb2.ASGIRequest(), timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_full_queue_refuses_and_clients_that_leave_make_room(server, said):
    body = json.dumps({"prompt": "a", "steps": 1000, "n": 4, "size": "64x128"})
    clients = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(QUEUE)]
    for client in clients:
        client.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    until(lambda: server.metric("surgery_requests_in_flight") == QUEUE)
    status, refused = server.draw()
    assert status == 429 and refused["error"]["code"] == "queue_full"
    assert call(server.url, "/health")[0] == 200
    for client in clients:
        client.close()
    until(lambda: server.metric("surgery_requests_in_flight") == 0)
    assert server.draw()[0] == 200 and server.metric("surgery_batches_in_flight") == 0


@pytest.mark.slow
def test_no_accepted_request_is_lost_with_a_replica_that_is_killed(server, said):
    before = [server.draw(seed=seed, steps=60)[1] for seed in (0, QUEUE - 1)]
    victim = server.replicas()[0]
    with ThreadPoolExecutor(QUEUE) as pool:
        begun = victim.cpu_times().user
        answers = [pool.submit(server.draw, seed=seed, steps=60) for seed in range(QUEUE)]
        until(lambda: victim.cpu_times().user > begun + 0.3)  # it draws, and what Serve itself would retry is past
        victim.kill()
        bodies = [answer.result() for answer in answers]
    assert [status for status, _ in bodies] == [200] * QUEUE
    assert server.metric("surgery_replica_deaths_total") >= 1 and server.metric("surgery_retried_images_total") >= 1
    for again, first in zip((bodies[0][1], bodies[-1][1]), before, strict=True):
        assert difference(Drawn(again), Drawn(first)) <= 2


@pytest.mark.slow
def test_a_model_that_changes_on_disk_is_loaded_anew_under_load_and_no_request_is_lost(processes, tmp_path):
    import surgery

    folder, key = tmp_path / "model", tmp_path / "admin"
    key.write_text("a" * 32)
    surgery.apply("shapes", folder)
    changing = Server(processes, folder, "--device", "cpu", "--admin-key-file", str(key))
    first = changing.ready()
    headers, path = {"Authorization": f"Bearer {key.read_text()}"}, f"/v1/models/{first['model']}/reload"
    answers, over = [], threading.Event()

    def ask():
        while not over.is_set():
            status, body = changing.draw()
            answers.append((status, body.get("artifact_hash")))

    def reload():
        status, body, _ = call(changing.url, path, 300, headers, ignored=1)
        return status, json.loads(body)

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        second = surgery.apply("shapes", folder, overrides=["operations.0.with.scale=2.0"], force=True).manifest.hash
        status, body = reload()
        assert status == 200 and body["artifact_hash"] == second != first["artifact_hash"], body
        assert changing.draw()[1]["artifact_hash"] == second
        weights = folder / "vae/diffusion_pytorch_model.safetensors"
        content = weights.read_bytes()
        weights.unlink()  # which may be another name of the pipeline's own
        weights.write_bytes(content[:5000])
        status, body = reload()
        assert status == 422 and "cut short" in body["error"]["message"]
        weights.write_bytes(content)
        for replica in changing.replicas():  # whatever comes up in its place is the new one
            replica.kill()
        assert changing.draw()[1]["artifact_hash"] == second
    finally:
        over.set()
        for client in clients:
            client.join()
        status, errors = changing.end()
        print(errors)
    assert set(answers) == {(200, first["artifact_hash"]), (200, second)}
    assert status == 0 and "was loaded anew" in errors and "is served as before" in errors


@pytest.mark.slow
def test_what_a_replica_cannot_load_is_the_error_of_the_command(processes, tmp_path):
    import shutil

    from ..conftest import SHAPES

    folder = tmp_path / "broken"
    shutil.copytree(SHAPES, folder)
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    broken = Server(processes, folder, "--device", "cpu")
    assert broken.process.wait() == 1
    output, errors = broken.process.out(), broken.process.errors()
    assert "diffusion_pytorch_model.safetensors" in errors and "build or fetch it again" in errors
    assert "diffusion_pytorch_model.safetensors" in json.loads(output)["error"]
    assert len(errors.strip().splitlines()) == 1, errors


def test_sigterm_finishes_what_was_accepted_refuses_what_is_new_and_exits_0(server, said):
    until(lambda: server.metric("surgery_replicas") == server.meant, 180)  # the one that was killed is up again
    with ThreadPoolExecutor(7) as pool:  # six clients, and who ends it while they wait
        answers = [pool.submit(server.draw, seed=seed, steps=25) for seed in range(6)]
        until(lambda: server.metric("surgery_requests_in_flight") == 6)
        ended = pool.submit(server.end)
        until(lambda: call(server.url, "/health")[0] == 503)
        status, body = server.draw()
        assert status == 503 and body["error"]["code"] == "shutting_down"
        assert [answer.result()[0] for answer in answers] == [200] * 6
        status, errors = ended.result()
    assert status == 0, errors
    assert "a red circle" not in errors and json.loads(server.process.out()) == said
    assert not [one for one in psutil.process_iter() if _is_of(one, server)]


def _is_of(process, server):
    try:
        return process.ppid() == server.process.pid
    except psutil.NoSuchProcess:
        return False
