"""Ray's own start: begun again where Ray gives up on a busy machine, and told where it never comes up."""

import sys
import types

import pytest

from surgery.errors import InputError, SurgeryError
from surgery.runtime.ray_client import serve_cluster


@pytest.fixture
def ray(monkeypatch):
    """A module in Ray's place whose `init` raises what `failures` holds, one after the other, then works."""
    made = types.ModuleType("ray")
    made.failures, made.begun, made.ended = [], 0, 0

    def init(**_):
        made.begun += 1
        if made.failures:
            raise made.failures.pop(0)

    def shutdown():
        made.ended += 1

    made.init, made.shutdown, made.cluster_resources = init, shutdown, lambda: {"CPU": 2}
    monkeypatch.setitem(sys.modules, "ray", made)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_AUTO_CONNECT", "FORWARDED_ALLOW_IPS"):
        monkeypatch.setenv(name, "")  # which a start sets, and are put back
    return made


def test_a_start_that_ray_gives_up_on_is_begun_again(ray, capsys):
    ray.failures = [Exception("The current node timed out during startup."), Exception()]
    with serve_cluster() as there:
        assert there == {"CPU": 2.0} and ray.begun == 3 and ray.ended == 2
    assert ray.ended == 3 and "timed out during startup.); once more" in capsys.readouterr().err


def test_one_that_never_comes_up_says_so_and_what_to_do(ray):
    ray.failures = [Exception("The current node timed out during startup.")] * 6
    with (
        pytest.raises(SurgeryError, match=r"6 times \(The current node.*the machine may be too busy: try again"),
        serve_cluster(),
    ):
        pass
    assert ray.begun == 6


def test_other_errors_are_told_at_once(ray):
    for error, kind in ((ConnectionError("no cluster"), InputError), (KeyError("x"), KeyError)):
        ray.begun, ray.failures = 0, [error]
        with pytest.raises(kind), serve_cluster():
            pass
        assert ray.begun == 1
