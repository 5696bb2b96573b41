"""Processes of their own for tests, forked from one that has imported torch and diffusers but nothing of this package.

A python that starts anew spends ten seconds on those imports, and there are dozens of such tests. Run as a script this
file is the process that is forked: it reads requests as lines of JSON and answers each with one line. What needs
nothing but a process of its own is forked from the tests' process, which has everything imported already.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback


class Process:
    """Like subprocess.Popen; what it prints goes into the files `out` and `errors`."""

    def __init__(self, ended, pid, out, errors):
        self.pid, self.returncode = pid, None
        self._ended, self._out, self._errors = ended, out, errors

    def poll(self):
        """The exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._ended(self.pid)
        return self.returncode

    def wait(self, timeout=300):
        """The exit status; kills it and raises TimeoutExpired after so many seconds."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, self.out(), self.errors())
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def out(self):
        """What it printed until now."""
        return self._out.read_text()

    def errors(self):
        """What it printed to stderr until now."""
        return self._errors.read_text()


class Server:
    """Starts Processes; begun at the first of them. folder: of their output."""

    def __init__(self, folder):
        self._folder, self._count, self._process = folder, 0, None

    def start(self, arguments=(), python=None, env=None, cwd=None, here=False):
        """A Process of `python -m surgery`, or of `python -c`, with arguments; env is added to the environment.

        here: it is forked from this process, whose modules have read the environment already.
        """
        out, errors = (self._folder / f"{self._count}.{kind}" for kind in ("out", "err"))
        self._count += 1
        out.touch(), errors.touch()
        wanted = {
            "python": python,
            "arguments": [*map(str, arguments)],
            "environment": {**os.environ, **(env or {})},
            "cwd": str(cwd or os.getcwd()),
            "out": str(out),
            "errors": str(errors),
        }
        if here:
            import_what_is_drawn_with()
            pid = os.fork() or run_and_exit(become, wanted)
            return Process(ended, pid, out, errors)
        return Process(lambda pid: self.ask({"poll": pid}), self.ask(wanted), out, errors)

    def ask(self, request):
        """The answer to a request."""
        if self._process is None:
            command = [sys.executable, __file__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def stop(self):
        """End the process that is forked."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def ended(pid):
    """The exit status of a child of this process, negative for a signal; None while it runs."""
    pid, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def serve():
    """Answer requests until there are no more."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for line in requests:
        wanted = json.loads(line)
        if "poll" in wanted:
            answer = ended(wanted["poll"])
        elif not (answer := os.fork()):
            run_and_exit(become, wanted)
        print(json.dumps(answer), file=answers, flush=True)


def become(wanted):
    """Do what `python -m surgery` or `python -c` would do in a new process."""
    atexit._clear()  # what is registered is the parent's
    for name, number in (("out", 1), ("errors", 2)):
        os.dup2(os.open(wanted[name], os.O_WRONLY), number)
    if sys.stdout is not sys.__stdout__:  # pytest captures it
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(wanted["cwd"])
    if wanted["environment"] != dict(os.environ):
        os.environ.clear()
        os.environ.update(wanted["environment"])
        read_environment_again()
    # torch rebuilds its thread pool after a fork, unguarded: here, before a second thread asks for it.
    sys.modules["torch"].set_num_threads(sys.modules["torch"].get_num_threads())
    sys.argv, sys.path[0] = ["-c", *wanted["arguments"]], ""
    if wanted["python"] is None:
        runpy.run_module("surgery", run_name="__main__", alter_sys=True)
    else:
        exec(compile(wanted["python"], "<string>", "exec"), {"__name__": "__main__"})


def run_and_exit(function, *arguments):
    """End a forked process as python ends after a function, but for taking apart all that the parent imported."""
    status = 1
    try:
        function(*arguments)
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            status = 120  # as python's
        os._exit(status)


def read_environment_again():
    """Set anew what huggingface_hub and diffusers, and who copied it from them, took from the environment."""
    for name in ("huggingface_hub.constants", "diffusers.utils.constants"):
        before = dict(vars(sys.modules[name]))
        after = vars(importlib.reload(sys.modules[name]))
        changed = {key: old for key, old in before.items() if type(old) in (str, bool) and after[key] != old}
        for module in list(sys.modules.values()):
            if module.__name__.partition(".")[0] in ("huggingface_hub", "diffusers", "transformers"):
                for key in changed.keys() & vars(module).keys():
                    if vars(module)[key] == changed[key]:
                        setattr(module, key, after[key])
    sys.modules["huggingface_hub.hf_api"].api.endpoint = sys.modules["huggingface_hub.constants"].ENDPOINT


@functools.cache
def import_what_is_drawn_with():
    """Import what diffusers would at the first use, and ask what this machine's compiler can: else each fork does."""
    import huggingface_hub.hf_api  # noqa: F401
    from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    valid_vec_isa_list()


if __name__ == "__main__":
    import_what_is_drawn_with()
    serve()
