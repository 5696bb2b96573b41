"""A graph with the nodes through ComfyUI's validation and executor, as its page would queue it. Needs COMFYUI_PATH."""

import asyncio
import types

import pytest
import torch

from . import real
from .pack import FOLDER
from .test_real import MAKERS

pytestmark = pytest.mark.skipif(real.folder() is None, reason="COMFYUI_PATH names no folder of ComfyUI")


@pytest.fixture(scope="module")
def queue():
    """queue(graph): ({node: what it shows}, messages) of a run of ComfyUI's executor, which keeps its caches."""
    real.comfyui()
    import execution
    import nodes

    side = MAKERS["sd15"]()
    text, negative = side.text, side.negative

    class TinyModel:
        RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT")
        FUNCTION, CATEGORY = "give", "tests"

        @classmethod
        def INPUT_TYPES(cls):  # noqa: N802  as ComfyUI has it
            return {"required": {}}

        def give(self):
            return side.model, [[text, {}]], [[negative, {}]], {"samples": torch.zeros(1, 4, 8, 8)}

    asyncio.run(nodes.load_custom_node(str(FOLDER)))
    asyncio.run(nodes.load_custom_node(f"{real.folder()}/comfy_extras/nodes_preview_any.py"))
    nodes.NODE_CLASS_MAPPINGS["TinyModel"] = TinyModel
    sent = []
    server = types.SimpleNamespace(
        client_id=None, last_node_id=None, send_sync=lambda event, data, *_: sent.append((event, data))
    )
    executor = execution.PromptExecutor(server)

    def run(graph):
        valid = asyncio.run(execution.validate_prompt("one", graph, None))
        if not valid[0]:
            return None, [(str(valid[1]), str(valid[3]))]
        sent.clear()
        executor.execute(graph, "one", {"client_id": "page"}, valid[2])
        shown = {data["node"]: data["output"] for event, data in sent if event == "executed"}
        return shown, list(executor.status_messages)

    yield run
    nodes.NODE_CLASS_MAPPINGS.pop("TinyModel")


def graph_of(**pladis):
    sampler = {"seed": 0, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    inputs = {"model": ["1", 0], "alpha": 1.5, "scale": 2.0, "temperature": 1.0, "sparse_temperature": 1.0}
    inputs |= {"layers": "all", "sigma_low": 0.0, "sigma_high": 1000.0, **pladis}
    drawn = {**sampler, "model": ["2", 0], "positive": ["1", 1], "negative": ["1", 2], "latent_image": ["1", 3]}
    return {
        "1": {"class_type": "TinyModel", "inputs": {}},
        "2": {"class_type": "PladisSurgeryPLADIS", "inputs": inputs},
        "3": {"class_type": "KSampler", "inputs": drawn},
        "4": {"class_type": "PladisSurgeryReport", "inputs": {"model": ["2", 0], "after": ["3", 0]}},
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 1]}},
    }


def test_a_graph_runs_and_reports_and_runs_anew_with_other_values(queue):
    shown, _ = queue(graph_of())
    assert "8 of 8 attention calls changed, in 2 calls" in shown["5"]["text"][0]
    assert shown["4"]["text"][0] == shown["5"]["text"][0]
    shown, _ = queue(graph_of(layers="mid"))  # the model itself comes from the cache
    assert "2 of 8 attention calls changed" in shown["5"]["text"][0]


def test_what_is_wrong_is_said_where_it_is(queue):
    shown, messages = queue(graph_of(alpha=3.0))
    assert shown is None and "alpha" in messages[0][1] and "bigger than max" in messages[0][1]
    _, messages = queue(graph_of(sigma_low=3.0, sigma_high=2.0))
    error = dict(messages)["execution_error"]
    assert error["node_type"] == "PladisSurgeryPLADIS" and "schedule.sigma must rise" in error["exception_message"]
