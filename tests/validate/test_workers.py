"""Drawing on Ray: the same images as in this process, whatever the number of workers and whichever of them dies."""

import os

import pytest

from surgery.errors import InputError, SurgeryError
from surgery.runtime import workers as module
from surgery.runtime.workers import OnRay, Order, crew
from surgery.validate.jobs import draw_sides

from .test_drawing import JOBS, hashes


@pytest.fixture(scope="module")
def ray():
    """A cluster of two CPUs on this machine."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def dying_crew(ray, monkeypatch, folder, deaths, workers=2):
    """OnRay with painters whose processes end at the first batches, so many of them."""

    class Dying:  # in here, so that Ray sends the class itself: its process need not import this module
        def __init__(self, order):
            self.folder = order.model

        def draw(self, operations, pairs):
            for number in range(deaths):
                try:
                    open(f"{self.folder}/{number}", "x").close()
                except FileExistsError:
                    continue
                os._exit(1)
            return [f"{prompt} {seed}".encode() for prompt, seed in pairs]

    monkeypatch.setattr(module, "_worker_class", lambda ray, order, workers: ray.remote(num_cpus=1)(Dying))
    return OnRay(ray, Order(str(folder), None, "", {"steps": 1}), workers)


def tasks_of(sides):
    return [(side, JOBS[at : at + 2]) for at in (0, 2, 4) for side in sides]


def test_the_images_do_not_depend_on_the_workers(ray, sides, order, tmp_path):
    here, _ = draw_sides(tmp_path / "here", sides, JOBS, order, batch=2)
    there, _ = draw_sides(tmp_path / "there", sides, JOBS, order, batch=2, workers=2)
    assert hashes(here) == hashes(there)


def test_what_a_dead_worker_was_drawing_is_drawn_again(ray, sides, tmp_path, monkeypatch):
    painters = dying_crew(ray, monkeypatch, tmp_path, 2)
    done = list(painters.draw(tasks_of(sides), lambda count: None))
    assert len(done) == 6 and {(task[0].name, task[1][0].key) for task, _ in done} == {
        (side.name, jobs[0].key) for side, jobs in tasks_of(sides)
    }
    for (_, jobs), images in done:
        assert images == [f"{job.prompt} {job.seed}".encode() for job in jobs]


def test_a_batch_that_kills_every_worker_ends_the_run(ray, sides, tmp_path, monkeypatch):
    painters = dying_crew(ray, monkeypatch, tmp_path, 99, workers=1)
    with pytest.raises(SurgeryError, match="3 workers died over the same 2 images"):
        list(painters.draw(tasks_of(sides), lambda count: None))


def test_an_error_in_a_worker_is_told_as_it_is(ray, sides, order, tmp_path):
    away = Order(str(tmp_path / "gone"), None, order.hash, order.sampling, device="cpu")
    with pytest.raises(InputError, match=r"no folder .*gone; a folder must be there on every machine"):
        draw_sides(tmp_path, sides, JOBS, away, batch=2, address="auto")


def test_more_workers_than_the_cluster_has_room_for(ray, order):
    with pytest.raises(InputError, match="--workers 9 needs a CPU each, and the cluster has 3"), crew(order, 9):
        pass


def test_without_ray(order, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"needs Ray: pip install 'pladis-surgery\[ray\]'"), crew(order, 2):
        pass


def test_no_worker_at_all(order):
    with pytest.raises(InputError, match="--workers must be at least 1"), crew(order, 0):
        pass
