"""What the diffusers backends of SGLang and vLLM-Omni do with a repository, done with an artifact.

As read in sglang's runtime/pipelines/diffusers_pipeline.py at c1fe741 and vllm-omni's
models/diffusers_adapter/pipeline_diffusers_adapter.py at 04c8a85.
"""

import inspect
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models import attention_dispatch

import surgery

from ..nn.backbones.flux import FAMILIES

SIZES = {"unet": 64, "transformer": 32}
FLASH = ["_flash_3_hub", "_flash_3_varlen_hub", "_flash_3", "_flash_varlen_3", "flash_hub", "flash_varlen_hub"]
FLASH += ["flash", "flash_varlen", "_native_flash"]


def loaded_by_sglang(folder, trusted=True, backend=None):
    """The pipeline as SGLang has it; backend: what its `--attention-backend` names."""
    load = {"torch_dtype": torch.float32, "trust_remote_code": trusted, "revision": None}
    pipeline = DiffusionPipeline.from_pretrained(folder, **load).to("cpu")
    for name in ("transformer", "unet"):
        component = getattr(pipeline, name, None)
        if backend and component is not None and hasattr(component, "set_attention_backend"):
            component.set_attention_backend(backend)
    return pipeline


def drawn_by_sglang(pipeline, **given):
    """Its DiffusersExecutionStage: what the pipeline does not take is left out."""
    device = next(pipeline.vae.parameters()).device
    given["generator"] = torch.Generator(device=device).manual_seed(given.pop("seed"))
    accepted = inspect.signature(pipeline.__call__).parameters
    given = {name: value for name, value in given.items() if name in accepted}
    with torch.no_grad(), warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        return pipeline(**given, output_type="pt").images.cpu().float()


def loaded_by_vllm_omni(folder, trusted=True, backend=None):
    """The pipeline as vLLM-Omni has it, and the backend that it chose; backend: the wanted one, else its own list."""
    load = {"torch_dtype": torch.float32, **({"trust_remote_code": True} if trusted else {})}
    pipeline = DiffusionPipeline.from_pretrained(folder, **load)
    pipeline.to(torch.device("cpu"))
    if not hasattr(pipeline, "transformer"):
        return pipeline, None
    for name in [backend] if backend else FLASH:
        try:
            pipeline.transformer.set_attention_backend(name)
            return pipeline, name
        except Exception:
            continue
    pipeline.transformer.set_attention_backend("native")
    return pipeline, "native"


def drawn_by_vllm_omni(pipeline, **given):
    """Its forward()."""
    given["generator"] = torch.Generator(device="cpu").manual_seed(given.pop("seed"))
    accepted = set(inspect.signature(pipeline.__call__).parameters)
    given = {name: value for name, value in given.items() if name in accepted}
    with torch.inference_mode():
        return pipeline(**given, output_type="pt").images


@pytest.fixture(scope="module")
def flux_artifact(tmp_path_factory):
    """The folder of an artifact of a tiny FLUX."""
    folder = tmp_path_factory.mktemp("flux")
    next(family for family in FAMILIES if family.name == "flux").build()[0].save_pretrained(folder / "base")
    operations = "[{replace: cross-attention, with: {operator: pladis}}]"
    recipe = f"schema: 1\nname: flux-pladis\nbase: {{pipeline: ./base}}\noperations: {operations}\n"
    (folder / "recipe.yaml").write_text(recipe)
    return surgery.apply(folder / "recipe.yaml", folder / "out").folder


@pytest.fixture
def backends():
    """Setting a backend sets one for the whole process too, which is put back."""
    before = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    yield
    attention_dispatch._AttentionBackendRegistry.set_active_backend(before)


def request_of(component):
    size = SIZES[component]
    return {"prompt": "two green stars", "num_inference_steps": 2, "guidance_scale": 4.0, "height": size, "width": size}


def expected(folder, component, draw):
    """What the pipeline that this package loads gives, and that the patch is in it."""
    pipeline = surgery.load(folder, dtype=torch.float32, quiet=True, device="cpu")
    images = draw(pipeline, seed=3, **request_of(component))
    surgery.unpatch(pipeline)
    assert (draw(pipeline, seed=3, **request_of(component)) - images).abs().max() > 1e-4
    return images


@pytest.mark.parametrize("component", ["unet", "transformer"])
def test_sglang_draws_what_this_package_draws(shapes_artifact, flux_artifact, backends, component):
    folder = shapes_artifact if component == "unet" else flux_artifact
    theirs = loaded_by_sglang(folder, backend="native")
    images = drawn_by_sglang(theirs, seed=3, true_cfg_of_nobody=1.0, **request_of(component))
    assert torch.equal(images, expected(folder, component, drawn_by_sglang))


@pytest.mark.parametrize("component", ["unet", "transformer"])
def test_vllm_omni_draws_what_this_package_draws(shapes_artifact, flux_artifact, backends, component):
    folder = shapes_artifact if component == "unet" else flux_artifact
    wanted = expected(folder, component, drawn_by_vllm_omni)
    theirs, backend = loaded_by_vllm_omni(folder)
    assert (backend is None) == (component == "unet")
    assert torch.equal(drawn_by_vllm_omni(theirs, seed=3, **request_of(component)), wanted)


def test_a_backend_that_only_a_gpu_has_does_not_take_the_patch_away(flux_artifact, backends, monkeypatch):
    wanted = expected(flux_artifact, "transformer", drawn_by_vllm_omni)
    for check in ("_check_attention_backend_requirements", "_maybe_download_kernel_for_backend"):
        monkeypatch.setattr(attention_dispatch, check, lambda backend: None)
    theirs, backend = loaded_by_vllm_omni(flux_artifact)
    assert backend == "_flash_3_hub"
    assert torch.equal(drawn_by_vllm_omni(theirs, seed=3, **request_of("transformer")), wanted)


@pytest.mark.parametrize("load", [loaded_by_sglang, loaded_by_vllm_omni])
def test_who_does_not_trust_the_code_gets_an_error_not_an_unpatched_model(flux_artifact, load):
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(flux_artifact, trusted=False)
