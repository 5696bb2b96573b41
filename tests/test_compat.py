"""What is used of other libraries although they do not promise it is still there and does what it did.

A failure here after an upgrade names what moved; surgery/compat.py is where it is put right.
"""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from surgery import compat
from surgery.errors import SurgeryError

from .bases import single_files
from .models.test_patch_survives import lora_state
from .tiny import tiny_sdxl, tiny_vae


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl(blocks=1)[0]


def test_what_has_moved_is_named(monkeypatch):
    monkeypatch.delattr(nn.Module, "_compiled_call_impl")
    with pytest.raises(SurgeryError, match=r"torch 2\.\S+ has moved nn.Module._compiled_call_impl.*constraints.txt"):
        compat.call_of(nn.Linear(1, 1))
    monkeypatch.delattr("diffusers.hooks._helpers.TransformerBlockRegistry")
    with pytest.raises(SurgeryError, match=r"diffusers \S+ has moved hooks._helpers.TransformerBlockRegistry"):
        compat.block_streams(nn.Linear)


def test_a_module_calls_what_is_set():
    module, given = nn.Linear(2, 2), torch.ones(1, 2)
    inner = compat.call_of(module)
    assert torch.equal(inner(given), module(given)) and not compat.is_compiled(module)
    compat.set_call(module, lambda x: inner(x) + 1)
    assert torch.equal(module(given), inner(given) + 1) and compat.is_compiled(module)


def test_torch_compile_is_told():
    module, wrapped = nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), backend="eager")
    module.compile(backend="eager")
    assert compat.is_compiled(module) and compat.call_of(module) is not None
    assert compat.is_compiled(wrapped) and not compat.is_compiled(compat.without_compile(wrapped))
    assert compat.without_compile(module) is module


@pytest.mark.slow  # tests/engines build and load packages too, but would not say what moved
def test_an_inductor_package_computes(tmp_path):
    given = torch.ones(1, 2)
    program = torch.export.export(nn.Tanh(), (given,))
    settings = {"aot_inductor.package_constants_in_so": True, "always_keep_tensor_constants": True}
    compat.compile_package(program, tmp_path / "x.pt2", settings)
    package = compat.load_package(tmp_path / "x.pt2", -1)
    torch.testing.assert_close(package(given), given.tanh())
    assert package.get_constant_fqns() == []


def test_a_setting_that_inductor_does_not_have_is_named(tmp_path):
    program = torch.export.export(nn.Tanh(), (torch.ones(1, 2),))
    with pytest.raises(SurgeryError, match=r"moved _inductor.config.aot_inductor.no_such_key"):
        compat.compile_package(program, tmp_path / "y.pt2", {"aot_inductor.no_such_key": True})


def test_diffusers_names_the_blocks_that_repeat(sdxl):
    assert "BasicTransformerBlock" in compat.repeated_block_names(sdxl.unet)
    assert compat.repeated_block_names(nn.Linear(1, 1)) == []


def test_freeu_is_seen(sdxl):
    assert not compat.has_freeu(sdxl.unet) and not compat.has_freeu(nn.Linear(1, 1))
    sdxl.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert compat.has_freeu(sdxl.unet)
    sdxl.unet.disable_freeu()
    assert not compat.has_freeu(sdxl.unet)


def test_layers_of_a_lora_are_seen_until_it_is_fused():
    pipeline = tiny_sdxl(blocks=1)[0]
    assert not compat.has_layers_of_lora(pipeline.unet)
    pipeline.load_lora_weights(lora_state(pipeline.unet))
    assert compat.has_layers_of_lora(pipeline.unet)
    pipeline.fuse_lora()
    assert not compat.has_layers_of_lora(pipeline.unet)


def test_a_lora_is_read_with_its_alphas_and_metadata(sdxl, tmp_path):
    from safetensors.torch import save_file

    state = lora_state(sdxl.unet)
    save_file(state, tmp_path / "lora.safetensors")
    read, alphas, metadata = compat.read_lora(tmp_path / "lora.safetensors", "", dict(sdxl.unet.config))
    assert read.keys() == state.keys() and alphas == {} and metadata == {}
    old = {key.replace("lora_A.weight", "lora.down.weight"): value for key, value in state.items()}
    old = {key.replace("lora_B.weight", "lora.up.weight"): value for key, value in old.items()}
    assert compat.peft_keys(old).keys() == state.keys()
    state = {key.replace("unet.", "transformer."): value for key, value in state.items()}
    save_file(state, tmp_path / "lora.safetensors")
    for pipeline in ("FluxPipeline", "StableDiffusion3Pipeline"):
        assert compat.lora_reader(pipeline) is not None
        assert compat.read_lora(tmp_path / "lora.safetensors", pipeline, None)[0].keys() == state.keys()
    assert compat.lora_reader("PixArtSigmaPipeline") is None


def test_a_checkpoint_in_one_file_is_converted(sdxl, tmp_path):
    state = single_files.original_unet(sdxl.unet.state_dict())
    assert compat.converted_model(sdxl.unet, state).keys() == sdxl.unet.state_dict().keys()
    assert compat.converted_model(sdxl.unet, sdxl.unet.state_dict()).keys() == sdxl.unet.state_dict().keys()
    assert compat.converted_model(nn.ModuleDict({"a": nn.Linear(1, 1)}), {}) == {}
    assert compat.default_config_repository(state) == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    state = single_files.original_clip(sdxl.text_encoder.state_dict(), "cond_stage_model")
    sdxl.text_encoder.save_pretrained(tmp_path / "text_encoder")
    kind = type(sdxl.text_encoder)
    found = compat.converted_text_encoder(kind, tmp_path, "text_encoder", state)
    assert {key.removeprefix("text_model.") for key in found} == {
        key.removeprefix("text_model.") for key in sdxl.text_encoder.state_dict()
    }
    assert compat.converted_text_encoder(kind, tmp_path, "text_encoder", {}) == {}


def test_what_diffusers_notes_in_a_config_is_left_out(sdxl, tmp_path):
    sdxl.scheduler.save_pretrained(tmp_path)
    loaded = type(sdxl.scheduler).from_pretrained(tmp_path).config
    made = type(sdxl.scheduler).from_config({"beta_end": 0.02}).config
    assert "_use_default_values" in made and "_use_default_values" not in compat.own_config(made)
    assert compat.own_config({"_name_or_path": "x", "beta_end": 0.02}) == {"beta_end": 0.02}
    assert compat.own_config(loaded)["beta_end"] == loaded["beta_end"]


def test_a_pipeline_tells_where_it_computes(sdxl):
    assert compat.execution_device(sdxl) == torch.device("cpu")


def test_an_autoencoder_gives_its_mean():
    vae = tiny_vae()
    with torch.no_grad():
        encoded = vae.encode(torch.zeros(1, 3, 64, 64))
    assert torch.equal(compat.encoded_mean(encoded), encoded.latent_dist.mode())


def test_adaptive_projected_guidance_is_cfg_without_its_additions():
    cond, uncond = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    guided = compat.normalized_guidance(cond, uncond, 2.0, None, 1.0, 0.0, use_original_formulation=True)
    torch.testing.assert_close(guided, cond + 2.0 * (cond - uncond))
    average = compat.momentum_buffer(-0.5)
    average.update(cond)
    average.update(uncond)
    torch.testing.assert_close(average.running_average, uncond - 0.5 * cond)


def test_cfg_zero_star_projects():
    cond, uncond = torch.randn(2, 16), torch.randn(2, 16)
    expected = (cond * uncond).sum(1) / uncond.square().sum(1)
    torch.testing.assert_close(compat.cfg_zero_star_scale(cond, uncond).flatten(), expected)


def test_tangential_guidance_drops_of_u_what_is_across_the_first_singular_vector():
    cond = torch.randn(1, 4, 4)
    torch.testing.assert_close(compat.tangential_guidance(cond, cond, 3.0), cond)  # they span one direction


def test_guidance_is_rescaled_to_the_deviation_with_the_prompt():
    guided, cond = 3 * torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    rescaled = compat.rescale_noise_cfg(guided, cond, 1.0)
    torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))


def test_what_a_block_gives_back_is_known():
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    assert compat.block_streams(BasicTransformerBlock) == ["hidden_states"]
    assert compat.block_streams(FluxTransformerBlock) == ["encoder_hidden_states", "hidden_states"]
    assert compat.block_streams(nn.Linear) is None


def test_transformers_fills_a_model_and_tells_what_does_not_fit():
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    tensors = CLIPTextModel(config).half().state_dict()
    kept = dict(list(tensors.items())[1:])
    model, told = compat.filled_model(CLIPTextModel, config, {**kept, "stranger": torch.zeros(1)})
    assert model.dtype == torch.float32
    assert list(told["missing_keys"]) == [next(iter(tensors))] and list(told["unexpected_keys"]) == ["stranger"]
    assert all(torch.equal(model.state_dict()[name], value.float()) for name, value in kept.items())


def test_clip_gives_its_projected_features():
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = CLIPModel(
        CLIPConfig(
            text_config={**small, "vocab_size": 8, "eos_token_id": 7},
            vision_config={**small, "image_size": 8, "patch_size": 4},
            projection_dim=6,
        )
    )
    assert compat.projected_features(model.get_image_features(torch.zeros(1, 3, 8, 8))).shape == (1, 6)
    assert compat.projected_features(model.get_text_features(torch.tensor([[1, 7]]))).shape == (1, 6)


def test_the_hub_cache_names_its_blobs_by_sha256(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert compat.cached_blob("owner/name", "ab" * 32) is None
    blob = tmp_path / "models--owner--name" / "blobs" / ("ab" * 32)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"x")
    assert compat.cached_blob("owner/name", "ab" * 32) == blob


def test_a_file_to_commit_is_not_read_where_its_sha256_is_known(tmp_path):
    from huggingface_hub import CommitOperationAdd

    (tmp_path / "weights").write_bytes(b"x" * 1000)
    operation = CommitOperationAdd("weights", str(tmp_path / "weights"))
    compat.set_sha256(operation, "ab" * 32)
    assert operation.upload_info.sha256 == bytes.fromhex("ab" * 32)
    with pytest.raises(SurgeryError, match="moved CommitOperationAdd.upload_info.sha256"):
        compat.set_sha256(SimpleNamespace(upload_info=SimpleNamespace()), "ab" * 32)


def test_a_refused_copy_is_told_from_other_errors():
    from huggingface_hub.errors import FileDuplicationError, HfHubHTTPError

    request = SimpleNamespace(url="https://huggingface.co/api/models/owner/base/lfs-files/duplicate")
    error = HfHubHTTPError("no", response=SimpleNamespace(request=request, headers={}), server_message="not yours")
    assert compat.refused_copy(error) == ("owner/base", "not yours")
    # as HfApi words it; tests/loopback_hub has it from HfApi itself
    error = FileDuplicationError("Cannot copy x from models/owner/base: 1 is not there")
    assert compat.refused_copy(error)[0].startswith("owner/base")
    assert compat.refused_copy(ValueError("from models/owner/base")) is None


def test_a_broken_connection_is_told():
    from huggingface_hub import get_session

    client = pytest.importorskip(type(get_session()).__module__.partition(".")[0])  # httpx2 by now
    with pytest.raises(compat.transport_error()) as raised:
        client.get("http://127.0.0.1:9")  # the port that discards
    assert compat.never_connected(raised.value) and not compat.never_connected(ValueError())


def test_ray_reads_the_switches(monkeypatch):
    accelerators = pytest.importorskip("ray._private.accelerators")
    from ray._private import ray_constants

    names = (
        accelerators.RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR,
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR,
    )
    for name in names:
        monkeypatch.setenv(name, "")  # put back what was there
        monkeypatch.delenv(name)
    compat.set_ray_switches(on_loopback=True)
    assert [os.environ.get(name) for name in names] == ["0", "0"]


def test_ray_serve_takes_what_it_is_given(monkeypatch):
    serve = pytest.importorskip("ray.serve")
    calls = []
    monkeypatch.setattr(serve, "run_many", lambda targets, **named: calls.append((targets, named)) or ("h", "i"))
    assert compat.run_applications({"x": "app", "y": "other"}, "y", {"log_level": "ERROR"}) == ["h", "i"]
    ((targets, named),) = calls
    assert [(one.name, one.route_prefix) for one in targets] == [("x", None), ("y", "/")]
    assert named == {"wait_for_applications_running": False}


def test_ray_serve_names_what_a_deletion_and_a_replica_have():
    import inspect

    serve = pytest.importorskip("ray.serve")
    from ray.serve.context import ReplicaContext

    assert "_blocking" in inspect.signature(serve.delete).parameters
    assert "wait_for_applications_running" in inspect.signature(serve.run_many).parameters
    assert "servable_object" in inspect.signature(ReplicaContext).parameters
