"""Drawing on Ray: the same images as in this process, whatever the number of workers and whichever of them dies."""

import os
from contextlib import ExitStack

import pytest

from surgery.errors import InputError, SurgeryError
from surgery.runtime.pool import Batch, LocalPool, RayPool, worker_pool
from surgery.runtime.ray_client import pool_cluster
from surgery.runtime.worker import ImageRequest, WorkerConfig
from surgery.validate.jobs import Drawing, draw_sides

from ..quick import quick
from .test_drawing import JOBS, hashes


@pytest.fixture(scope="module")
def ray():
    """A cluster of two CPUs on this machine, which starts a process for each."""
    pytest.importorskip("ray")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as machine:
            machine.setattr(os, "cpu_count", lambda: 2)
            cluster = stack.enter_context(pool_cluster(None, 2))  # which tries again where a busy machine is too slow
        yield cluster


def dying_pool(ray, folder, deaths, workers=2):
    """A RayPool of workers whose processes end at the first batches, so many of them."""

    class Dying:  # in here, so that Ray sends the class itself: its process need not import this module
        def __init__(self, config):
            self.folder = config.model

        def draw_files(self, operations, requests):
            for number in range(deaths):
                try:
                    open(f"{self.folder}/{number}", "x").close()
                except FileExistsError:
                    continue
                os._exit(1)
            return [f"{request.prompt} {request.seed}".encode() for request in requests]

    return RayPool(ray, WorkerConfig(str(folder), None, "", {"steps": 1}), workers, Dying)


REQUESTS = [ImageRequest(job.prompt.text, job.seed) for job in JOBS]
BATCHES = [Batch(None, tuple(REQUESTS[at : at + 2])) for at in (0, 2, 4)]


@pytest.mark.parametrize("workers", quick([1, 2], 1))  # what goes to which of two is the next tests'
def test_the_images_do_not_depend_on_the_workers(ray, sides, config, tmp_path, workers):
    here = draw_sides(tmp_path / "here", sides, JOBS[:4], config, Drawing(batch=2)).paths
    away = Drawing(batch=2, workers=workers, address="auto")
    there = draw_sides(tmp_path / "there", sides, JOBS[:4], config, away).paths
    assert hashes(here) == hashes(there) and len(hashes(there)) == 8


def test_a_worker_computes_with_the_priority_of_the_command_that_waits_for_it(ray):
    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)


def test_what_a_dead_worker_was_drawing_is_drawn_again(ray, tmp_path):
    done = list(dying_pool(ray, tmp_path, 2).draw(BATCHES, lambda count: None))
    assert sorted(number for number, _ in done) == [0, 1, 2]
    for number, images in done:
        assert images == [f"{request.prompt} {request.seed}".encode() for request in BATCHES[number].requests]


def test_a_batch_that_kills_every_worker_ends_the_run(ray, tmp_path):
    with pytest.raises(SurgeryError, match="3 workers died over the same 2 images"):
        list(dying_pool(ray, tmp_path, 99, workers=1).draw(BATCHES, lambda count: None))


def test_an_error_in_a_worker_is_told_as_it_is(ray, tmp_path):
    class Failing:
        def __init__(self, config):
            self.folder = config.model

        def draw_files(self, operations, requests):
            raise InputError(f"there is no folder {self.folder}")

    config = WorkerConfig(str(tmp_path / "gone"), None, "", {"steps": 1})
    with pytest.raises(InputError, match=r"no folder .*gone; a folder must be there on every machine"):
        list(RayPool(ray, config, 1, Failing).draw(BATCHES, lambda count: None))


def test_one_worker_is_this_process_unless_a_cluster_is_named(ray, config):
    with worker_pool(config, 1, "auto") as there, worker_pool(config, 1) as here:
        assert isinstance(there, RayPool) and isinstance(here, LocalPool)


def test_more_workers_than_the_cluster_has_room_for(ray, config):
    with pytest.raises(InputError, match="--workers 9 needs a CPU each, and the cluster has 2"), worker_pool(config, 9):
        pass


def test_without_ray(config, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"needs Ray: pip install 'pladis-surgery\[ray\]'"), worker_pool(config, 2):
        pass


def test_no_worker_at_all(config):
    with pytest.raises(InputError, match="--workers must be at least 1"), worker_pool(config, 0):
        pass
