"""What this package uses of other libraries although they do not promise it, each in one function with one test.

An upgrade that moves such a name breaks its function here, which says what moved, and fails its test in
tests/test_compat.py. What surgery/nn uses stands in surgery/nn/compat.py, which is shipped with every artifact.
"""

import inspect
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    import torch


@contextmanager
def _private(package: str, name: str) -> Iterator[None]:
    """Within this block a name of `package` that is not there becomes a SurgeryError that says so."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise SurgeryError(
            f"{package} {metadata.version(package)} has moved {name}, which pladis-surgery uses although it is not "
            f"promised ({error}); install the version that constraints.txt names"
        ) from error


# torch


def call_of(module: "torch.nn.Module") -> Callable:
    """What calling a module runs: what `module.compile()` made, or its forward with its hooks."""
    with _private("torch", "nn.Module._compiled_call_impl"):
        return module._compiled_call_impl or module._call_impl


def set_call(module: "torch.nn.Module", call: Callable) -> None:
    """Have calling a module run `call`, which torch asks before hooks and forward."""
    with _private("torch", "nn.Module._compiled_call_impl"):
        module._compiled_call_impl  # noqa: B018  assigning would make one that nobody reads
        module._compiled_call_impl = call


def is_compiled(module: "torch.nn.Module") -> bool:
    """Whether torch.compile has made something of a module, around it or in its place."""
    with _private("torch", "nn.Module._compiled_call_impl"):
        return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def without_compile(module: "torch.nn.Module") -> "torch.nn.Module":
    """The module in torch.compile's wrapper; any other as it is."""
    return getattr(module, "_orig_mod", module)


def compile_package(program: "torch.export.ExportedProgram", path: Path, settings: Mapping[str, Any]) -> None:
    """Compile a program into an AOTInductor package; settings: of torch._inductor.config."""
    import torch

    with _private("torch", "_inductor.aoti_compile_and_package"):
        compile_and_package = torch._inductor.aoti_compile_and_package
    for name in settings:
        with _private("torch", f"_inductor.config.{name}"):
            _attribute_at(torch._inductor.config, name)  # pyright: ignore[reportAttributeAccessIssue]
    compile_and_package(program, package_path=str(path), inductor_configs=dict(settings))


def _attribute_at(owner, path):
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def load_package(path: Path, device_index: int) -> Any:
    """An AOTInductor package, to be called; device_index: of the CUDA device, -1 for the current one or a CPU."""
    import torch

    with _private("torch", "_inductor.aoti_load_package"):
        load = torch._inductor.aoti_load_package
    return load(str(path), device_index=device_index)


# diffusers and peft


def repeated_block_names(model: "torch.nn.Module") -> list[str]:
    """The classes of the blocks that diffusers compiles once for all; none where the model names none."""
    with _private("diffusers", "ModelMixin._repeated_blocks"):
        from diffusers import ModelMixin

        ModelMixin._repeated_blocks  # noqa: B018  so that its absence is told
    return list(getattr(model, "_repeated_blocks", None) or ())


def has_freeu(model: "torch.nn.Module") -> bool:
    """Whether FreeU is enabled on a UNet: its up blocks have s1 then."""
    return any(getattr(block, "s1", None) is not None for block in getattr(model, "up_blocks", ()))


def has_layers_of_lora(model: "torch.nn.Module") -> bool:
    """Whether a LoRA of peft acts in layers of its own, neither fused nor disabled."""
    with _private("peft", "tuners.tuners_utils.BaseTunerLayer"):
        from peft.tuners.tuners_utils import BaseTunerLayer
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    with _private("peft", "BaseTunerLayer.merged, .disable_adapters or .active_adapters"):
        return any(not layer.merged and not layer.disable_adapters and layer.active_adapters for layer in layers)


def lora_reader(pipeline_class: str) -> Callable[..., Any] | None:
    """The function by which a pipeline class of diffusers reads LoRA files; None where it reads none."""
    import diffusers

    return getattr(getattr(diffusers, pipeline_class, None), "lora_state_dict", None)


def read_lora(path: Path, pipeline_class: str, unet_config: Mapping[str, Any] | None) -> tuple[dict, dict, dict]:
    """({key: tensor}, {key: alpha}, metadata) of a LoRA file in whatever format, keys as diffusers has them.

    unet_config: of a UNet, whose blocks other tools name otherwise.
    Raises OSError, ValueError, RuntimeError and KeyError for what is no LoRA.
    """
    from diffusers.configuration_utils import FrozenDict

    read: Any = lora_reader("StableDiffusionXLPipeline" if unet_config is not None else pipeline_class)
    with _private("diffusers", "lora_state_dict(..., return_lora_metadata=)"):
        accepted = inspect.signature(read).parameters
    arguments: dict[str, Any] = {"return_alphas": True} if "return_alphas" in accepted else {}
    arguments |= {} if unet_config is None else {"unet_config": FrozenDict(unet_config)}
    state, *alphas, lora_metadata = read(str(path), return_lora_metadata=True, **arguments)
    return state, (alphas[0] if alphas else None) or {}, lora_metadata or {}


def peft_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """{key: value} of a UNet's LoRA, keys with .lora_A and .lora_B as peft has them."""
    with _private("diffusers", "utils.convert_unet_state_dict_to_peft"):
        from diffusers.utils import convert_unet_state_dict_to_peft
    return convert_unet_state_dict_to_peft(dict(state))


def default_config_repository(checkpoint: Mapping[str, Any]) -> str:
    """The repository whose configs diffusers reads a single-file checkpoint with, by its keys and shapes."""
    with _private("diffusers", "loaders.single_file_utils.fetch_diffusers_config"):
        from diffusers.loaders import single_file_utils

        fetch = single_file_utils.fetch_diffusers_config
    return fetch(dict(checkpoint))["pretrained_model_name_or_path"]


def converted_model(model: "torch.nn.Module", checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """{key: tensor} that a model of diffusers takes of a single-file checkpoint; {} where it has no converter.

    Raises KeyError, IndexError and others for a checkpoint without that model.
    """
    with _private("diffusers", "loaders.single_file_model.SINGLE_FILE_LOADABLE_CLASSES and what reads it"):
        from diffusers.loaders import single_file_model

        converters = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
        name = single_file_model._get_single_file_loadable_mapping_class(type(model))
    if set(model.state_dict()) <= set(checkpoint):  # in diffusers' own layout already
        return dict(checkpoint)
    if name is None:
        return {}
    config: Any = model.config
    return converters[name]["checkpoint_mapping_fn"](config=dict(config), checkpoint=dict(checkpoint))


def converted_text_encoder(model_class: Any, folder: Path, name: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """{key: tensor} that a text encoder takes of a single-file checkpoint; {} where it holds none of that class.

    folder: of the pipeline's configs; name: the component's. Raises ValueError where it holds another one.
    """
    with _private("diffusers", "loaders.single_file_utils.create_diffusers_clip_model_from_ldm and what it calls"):
        from diffusers.loaders import single_file_utils as utilities

        if model_class.__name__ == "T5EncoderModel":
            is_there, convert = utilities.is_t5_in_single_file, utilities.convert_sd3_t5_checkpoint_to_diffusers
            return convert(dict(checkpoint)) if is_there(checkpoint) else {}
        if not utilities.is_clip_model_in_single_file(model_class, checkpoint):
            return {}
        create: Any = utilities.create_diffusers_clip_model_from_ldm
        utilities.load_model_dict_into_meta  # noqa: B018  which it fills the model by
    found = {}

    def take(_model, state, **_):
        found.update(state)

    # diffusers chooses and converts in the function that also makes the model: it is run with `take` for its last step.
    variables = {**create.__globals__, "load_model_dict_into_meta": take}
    types.FunctionType(create.__code__, variables, argdefs=create.__defaults__)(
        model_class, dict(checkpoint), subfolder=name, config=str(folder), local_files_only=True
    )
    return found


def own_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what diffusers notes in it: where it was loaded from, and which values were defaults."""
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "_use_default_values")}


def execution_device(pipeline: Any) -> "torch.device":
    """Where a pipeline computes, also when its parts are offloaded."""
    with _private("diffusers", "DiffusionPipeline._execution_device"):
        return pipeline._execution_device


def encoded_mean(encoded: Any) -> "torch.Tensor":
    """The latents of what an autoencoder's encode gave: the mean of its Gaussian, or the latents themselves."""
    module = "pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
    with _private("diffusers", f"{module}.retrieve_latents"):
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
    return retrieve_latents(encoded, sample_mode="argmax")  # a Gaussian's mode is its mean


def momentum_buffer(momentum: float) -> Any:
    """The running average of adaptive projected guidance."""
    with _private("diffusers", "guiders.adaptive_projected_guidance.MomentumBuffer"):
        from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
    return MomentumBuffer(momentum)


def normalized_guidance(*arguments: Any, **named: Any) -> "torch.Tensor":
    """The output of adaptive projected guidance; arguments as diffusers has them."""
    with _private("diffusers", "guiders.adaptive_projected_guidance.normalized_guidance"):
        from diffusers.guiders import adaptive_projected_guidance

        compute = adaptive_projected_guidance.normalized_guidance
    return compute(*arguments, **named)


def cfg_zero_star_scale(cond: "torch.Tensor", uncond: "torch.Tensor") -> "torch.Tensor":
    """<cond, uncond> / |uncond|^2 of flattened rows, as CFG-Zero* has it."""
    with _private("diffusers", "guiders.classifier_free_zero_star_guidance.cfg_zero_star_scale"):
        from diffusers.guiders import classifier_free_zero_star_guidance

        compute = classifier_free_zero_star_guidance.cfg_zero_star_scale
    return compute(cond, uncond)


def tangential_guidance(
    cond: "torch.Tensor", uncond: "torch.Tensor", guidance_scale: "float | torch.Tensor"
) -> "torch.Tensor":
    """The output of tangential CFG."""
    with _private("diffusers", "guiders.tangential_classifier_free_guidance.normalized_guidance"):
        from diffusers.guiders import tangential_classifier_free_guidance

        compute: Callable = tangential_classifier_free_guidance.normalized_guidance
    return compute(cond, uncond, guidance_scale)


def rescale_noise_cfg(guided: "torch.Tensor", cond: "torch.Tensor", rescale: float) -> "torch.Tensor":
    """The guided output with the standard deviation that the one with the prompt has, by a share of `rescale`."""
    with _private("diffusers", "guiders.guider_utils.rescale_noise_cfg"):
        from diffusers.guiders import guider_utils

        compute = guider_utils.rescale_noise_cfg
    return compute(guided, cond, rescale)


def block_streams(kind: type) -> list[str] | None:
    """A transformer block's arguments that hold hidden states, in the order in which its forward gives them back.

    None for a class that diffusers' registry does not list.
    """
    with _private("diffusers", "hooks._helpers.TransformerBlockRegistry"):
        from diffusers.hooks._helpers import TransformerBlockRegistry

        look_up = TransformerBlockRegistry.get
    try:
        known = look_up(kind)
    except ValueError:
        return None
    with _private("diffusers", "hooks._helpers.TransformerBlockMetadata"):
        names = {known.return_hidden_states_index: known.hidden_states_argument_name}
        if known.return_encoder_hidden_states_index is not None:
            names[known.return_encoder_hidden_states_index] = known.encoder_hidden_states_argument_name
    return [names[index] for index in sorted(names)]


# transformers


def filled_model(
    model_class: type, config: Any, tensors: Mapping, dtype: "torch.dtype | None" = None, **arguments: Any
) -> tuple[Any, dict[str, Any]]:
    """(a model that holds `tensors`, float32 unless told, its loading info); what does not fit is told, not raised."""
    import torch

    return model_class.from_pretrained(
        None,  # no folder: of that transformers promises nothing
        config=config,
        state_dict=tensors,
        dtype=dtype or torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **arguments,
    )


def projected_features(output: Any) -> "torch.Tensor":
    """The projected features of what a CLIP model's get_image_features or get_text_features gave."""
    with _private("transformers", "get_image_features(...).pooler_output"):
        return output.pooler_output


# huggingface_hub


def cached_blob(repo: str, sha256: str) -> Path | None:
    """The file with that sha256 that the Hub cache holds of a model repository, of whatever commit; None if none."""
    with _private("huggingface_hub", "file_download.repo_folder_name"):
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name
    blob = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "blobs", sha256)
    return blob if blob.is_file() else None


def set_sha256(operation: Any, sha256: str) -> None:
    """Tell a CommitOperationAdd the sha256 of its file, which it would else read all of to compute it."""
    with _private("huggingface_hub", "CommitOperationAdd.upload_info.sha256"):
        info = operation.upload_info
        if not hasattr(type(info), "sha256"):  # reading the property itself would compute it
            raise AttributeError("it is no property")
        info.sha256 = bytes.fromhex(sha256)


def refused_copy(error: Exception) -> tuple[str, str] | None:
    """(the repository, what the Hub said) where an error says that files cannot be copied from it; None otherwise."""
    request = getattr(getattr(error, "response", None), "request", None)
    if found := re.search(r"/api/models/(.+?)/lfs-files/duplicate", str(getattr(request, "url", ""))):
        return found[1], str(getattr(error, "server_message", None) or error)
    if type(error).__name__ == "FileDuplicationError" and (found := re.search(r"from models/(\S+)", str(error))):
        return found[1], str(error)
    return None


def transport_error() -> type[Exception]:
    """The exception that huggingface_hub's HTTP client raises for a broken connection."""
    with _private("huggingface_hub", "its HTTP client httpx2"):
        try:
            import httpx2 as client
        except ImportError:  # huggingface_hub before 2
            import httpx as client  # pyright: ignore[reportMissingImports]
        return client.TransportError


def never_connected(error: Exception) -> bool:
    """Whether an error of huggingface_hub says that no connection could be made at all."""
    return type(error).__name__ in ("ConnectError", "ConnectTimeout", "OfflineModeIsEnabled")


# ray


def set_ray_switches(on_loopback: bool) -> None:
    """Set what Ray reads from the environment when it is first imported; what the user has set stays.

    on_loopback: a Ray that is started here is reachable from this machine alone.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; without it Ray warns
    if on_loopback:
        # Ray's ports run code for whoever reaches them. Despite its name this switch puts them on the loopback
        # interface, as Ray does by default on Windows and macOS; elsewhere they would be open to the network.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def run_applications(apps: Mapping[str, Any], route: str, logging_config: Mapping[str, Any]) -> list[Any]:
    """The handles of Ray Serve applications, {name: application}, that are started and not waited for.

    route: the name of the one that HTTP requests go to; the others have none.
    """
    from ray import serve

    with _private("ray", "serve.RunTarget or serve.run_many"):
        run_many, target = serve.run_many, serve.RunTarget
    logging: Any = logging_config
    routes = {name: "/" if name == route else None for name in apps}
    targets = [target(apps[name], name=name, route_prefix=routes[name], logging_config=logging) for name in apps]
    return list(run_many(targets, wait_for_applications_running=False))


def delete_application(name: str, wait: bool) -> None:
    """Take down a Ray Serve application; wait: until it is gone."""
    from ray import serve

    serve.delete(name, _blocking=wait)


def served_object() -> Any:
    """The object that Ray Serve made of a deployment's class in this process."""
    from ray import serve

    with _private("ray", "serve.get_replica_context().servable_object"):
        return serve.get_replica_context().servable_object
