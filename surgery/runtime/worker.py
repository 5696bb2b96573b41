"""A worker: one model made ready to draw, for validation and for serving alike."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from surgery.errors import ArtifactError, SurgeryError
from surgery.recipe.guidance_scale import is_range, scale_of

from .loras import Chosen, Loras, LoraSource

ImageFormat = Literal["png", "jpeg", "webp"]
VideoFormat = Literal["mp4", "webp", "gif"]


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker is to load. model: an absolute folder or a Hub repository.

    hash: of the artifact that must be there; None for a plain pipeline. sampling: as its manifest records it.
    threads: of the CPU, None for torch's own choice. dtype: "float16" and so on, None for the model's own.
    engine, trust_engines, fallback, compile: as in `surgery.load`. loras: those that a batch may have.
    """

    model: str
    revision: str | None
    hash: str | None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    engine: str | None = None
    trust_engines: bool = False
    fallback: bool = False
    compile: str | None = None
    loras: tuple[LoraSource, ...] = ()


@dataclass(frozen=True)
class ImageRequest:
    """One image or video to draw. It depends on nothing but this and its batch's settings, so any worker may redo it.

    format: of the file that a server answers with; compression: its quality, 0 to 100, where it loses something.
    previews: how many images of the way there are wanted. image, mask: files that it is drawn from.
    """

    prompt: str
    seed: int
    negative_prompt: str | None = None
    format: ImageFormat | VideoFormat = "png"
    compression: int | None = None
    previews: int = 0
    image: bytes | None = None
    mask: bytes | None = None


class Worker:
    """Draws batches with one pipeline, which is loaded when it is first needed.

    Not before, since what is raised while a remote worker is made does not reach its maker. Base and patched images
    come from the same weights in memory.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config

    @cached_property
    def pipeline(self) -> Any:
        """The loaded pipeline, on its device; ArtifactError where the model is not the artifact of the config."""
        import torch

        from surgery.console import quiet_bars

        from .load import open_model

        quiet_bars()
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        dtype = getattr(torch, config.dtype) if config.dtype else None
        running = {name: getattr(config, name) for name in ("engine", "trust_engines", "fallback", "compile")}
        pipeline, _, found = open_model(config.model, config.revision, config.device, dtype=dtype, **running)
        if found != config.hash:
            raise ArtifactError(
                f"{config.model} is artifact {str(found)[:12]} here, not {str(config.hash)[:12]}; give every machine "
                "the same"
            )
        return pipeline

    @cached_property
    def loras(self) -> Loras | None:
        """The config's LoRAs, read; None without any."""
        return Loras(self.pipeline, self.config.loras) if self.config.loras else None

    def draw(
        self,
        requests: Sequence[ImageRequest],
        sampling: Mapping[str, Any] | None = None,
        hyperparameters: Mapping[str, float] | None = None,
        on_step: Callable[[], object] | None = None,
        show: Callable[[int, int, Any], object] | None = None,
        loras: Chosen = (),
    ) -> list[Any]:
        """PIL images, or `Video`s, drawn as one batch.

        sampling: what a request may choose, in place of the config's; the rest of that stays. hyperparameters: of every
        patched module, for this batch alone. on_step: called after each denoising step. show: called with the previews
        that requests want (`surgery.runtime.previews`). loras: (name, scale) of those that this batch has.
        """
        from .draw import draw, number_of_steps

        own = dict(self.config.sampling)
        sampling = own if sampling is None else {**{name: own[name] for name in _FIXED if name in own}, **sampling}
        if any(request.negative_prompt is not None for request in requests):
            sampling = {**sampling, "negative_prompt": [request.negative_prompt or "" for request in requests]}
        scheduler = sampling.get("scheduler")
        sampling = {name: value for name, value in sampling.items() if name != "scheduler"}
        jobs = [(request.prompt, request.seed) for request in requests]
        if self.loras is not None:
            self.loras.wear(loras)
        with self._tuned(hyperparameters or {}), self._scheduled(scheduler):
            pipeline, sampling = self._with_images(requests, sampling)
            wanted = [request.previews for request in requests]
            on_latents = None
            if show is not None and any(wanted):
                from .previews import Previews

                steps = number_of_steps(sampling)
                steps = max(1, int(steps * sampling["strength"])) if "strength" in sampling else steps
                on_latents = Previews(pipeline, wanted, steps, show)
            return draw(pipeline, jobs, sampling, on_step, on_latents)

    def _with_images(self, requests, sampling):
        """(the pipeline that draws from the images of requests, sampling with them), or what there was."""
        from .inputs import Inputs, images_of, with_inputs

        pipeline = self.pipeline
        if requests[0].image is None:
            return pipeline, sampling
        drawing, each = pipeline, []
        for request in requests:
            given = {"image": request.image, "mask": request.mask}
            images = images_of({name: content for name, content in given.items() if content is not None})
            drawing, arguments = with_inputs(pipeline, Inputs(), images, sampling)
            each.append(arguments)
        names = [name for name in ("image", "mask_image") if name in each[0]]
        return drawing, {**each[0], **{name: [arguments[name] for arguments in each] for name in names}}

    @contextmanager
    def _scheduled(self, name: str | None) -> Iterator[None]:
        """While it lasts the pipeline has a scheduler of another class of diffusers, with its own's settings."""
        if name is None:
            yield
            return
        import diffusers

        pipeline, before = self.pipeline, self.pipeline.scheduler
        pipeline.scheduler = getattr(diffusers, name).from_config(before.config)
        try:
            yield
        finally:
            pipeline.scheduler = before

    @contextmanager
    def _tuned(self, hyperparameters: Mapping[str, float]) -> Iterator[None]:
        from surgery.models.patching import read_hyperparameters, tune, update_config, write_hyperparameters

        if not hyperparameters:
            yield
            return
        before = read_hyperparameters(self.pipeline)
        try:
            tune(self.pipeline, layers="all", **hyperparameters)
            yield
        finally:
            write_hyperparameters(self.pipeline, before)
            update_config(self.pipeline)

    def draw_files(
        self,
        operations: list | None,
        requests: Sequence[ImageRequest],
        on_step: Callable[[], object] | None = None,
    ) -> list[bytes]:
        """PNG files of a batch drawn with `operations` in place of the model's own; None: as the untouched base.

        Those of videos are animated; `surgery.runtime.video.frames_of` reads them.
        """
        import torch

        from surgery.models.patching import operate

        operate(self.pipeline, operations)
        try:
            images = self.draw(requests, on_step=on_step)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise SurgeryError(_out_of_memory(len(requests))) from error
        sampling = self.config.sampling
        return [_png(image, request, sampling) for image, request in zip(images, requests, strict=True)]

    def batch_size(self) -> int:
        """How many images fit in memory at once, as a power of two up to 32; on the CPU what is fastest, by size.

        Videos: one, which keeps a device busy; to draw some to find out would take as long as the run itself. One, too,
        where images are drawn singly, or on the CPU where their size is not known.
        """
        import torch

        from surgery.models.modular import is_modular
        from surgery.models.patching import denoiser
        from surgery.models.videos import draws_videos

        if draws_videos(type(self.pipeline)) or is_modular(self.pipeline):
            return 1
        if denoiser(self.pipeline).device.type != "cuda":
            pixels = self._pixels()
            return max(1, min(16, 16 * 128 * 128 // pixels)) if pixels else 1
        peaks = []
        for count in (1, 2):
            torch.cuda.reset_peak_memory_stats()
            self.draw([ImageRequest("memory", seed) for seed in range(count)])
            peaks.append(torch.cuda.max_memory_allocated())
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        fitting = 1 + 0.8 * max(0, free - peaks[0]) / max(peaks[1] - peaks[0], 1)
        return 1 << min(5, int(fitting).bit_length() - 1)

    def _pixels(self) -> int | None:
        """Of one image; None where neither the settings nor the pipeline say."""
        from surgery.models.patching import denoiser

        height, width = (self.config.sampling.get(name) for name in ("height", "width"))
        if height and width:
            return height * width
        size = denoiser(self.pipeline).config.get("sample_size")
        size = getattr(self.pipeline, "default_sample_size", None) if size is None else size
        if size is None:
            return None
        sides = size if isinstance(size, (list, tuple)) else (size, size)
        own = [side * self.pipeline.vae_scale_factor for side in sides[-2:]]
        return (height or own[0]) * (width or own[1])


# Of a recipe's sampling what no request chooses; its negative prompt is that of the requests without one.
_FIXED = ("guidance", "guidance_scale_2", "true_cfg_scale", "max_sequence_length", "negative_prompt")


def _out_of_memory(count):
    if count == 1:
        return (
            "drawing one image or video at a time ran out of memory. What was drawn so far is kept; it takes a smaller "
            "size or fewer frames, another --dtype, or another device"
        )
    return (
        f"drawing {count} images at once ran out of memory. What was drawn so far is kept: run the same command with "
        f"--batch {count // 2}, it goes on from there"
    )


def _png(drawn, request, sampling):
    from PIL.PngImagePlugin import PngInfo

    from .sheet import png_of
    from .video import Video, lossless_file

    record = {"prompt": request.prompt, "seed": request.seed}
    record |= {"guidance_scale": scale_of(sampling, request.seed)} if is_range(sampling) else {}
    record |= {"flagged": True} if drawn.info.get("flagged") else {}
    record |= {"frames": len(drawn.frames), "fps": drawn.fps} if isinstance(drawn, Video) else {}
    text = PngInfo()
    text.add_itxt("surgery", json.dumps(record, ensure_ascii=False))
    if isinstance(drawn, Video):
        return lossless_file(drawn, text)
    return png_of(drawn.convert("RGB"), text)
