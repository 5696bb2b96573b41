"""One loaded pipeline that draws batches of either side: the same code in this process and in a remote worker."""

import io
import json
from dataclasses import dataclass
from functools import cached_property

from surgery.errors import ArtifactError, SurgeryError


@dataclass(frozen=True)
class Order:
    """What a painter is told. model: an absolute folder or a Hub repository, whose artifact must have this hash.

    threads: of the CPU, None for torch's own choice. dtype: "float16" and so on, None for the model's own.
    """

    model: str
    revision: str | None
    hash: str
    sampling: dict
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None


class Painter:
    """Holds the pipeline. Base and patched images come from the same weights in memory: the base is `unpatch`.

    It is loaded when it is first needed, since what is raised while a remote worker is made does not reach its maker.
    """

    def __init__(self, order):
        self.order, self.sampling = order, order.sampling

    @cached_property
    def pipeline(self):
        """The loaded pipeline, on its device; ArtifactError where it is not the artifact of the Order."""
        import torch

        from surgery.opening import open_model
        from surgery.quiet import quiet_bars

        quiet_bars()
        order = self.order
        if order.threads:
            torch.set_num_threads(order.threads)
        dtype = getattr(torch, order.dtype) if order.dtype else None
        pipeline, _, found = open_model(order.model, order.revision, order.device, dtype=dtype)
        if found != order.hash:
            raise ArtifactError(f"{order.model} is artifact {str(found)[:12]} here, not {order.hash[:12]}")
        return pipeline

    def draw(self, operations, jobs, on_step=None):
        """PNG files (bytes) of (prompt, seed) pairs, drawn as one batch; operations: a Side's."""
        import torch

        from surgery.generating import draw
        from surgery.patching import operate

        operate(self.pipeline, operations)
        try:
            images = draw(self.pipeline, jobs, self.sampling, on_step)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise SurgeryError(
                f"drawing {len(jobs)} images at once ran out of memory. What was drawn so far is kept: run the same "
                f"command with --batch {max(1, len(jobs) // 2)}, it goes on from there"
            ) from error
        return [_png(image, prompt, seed) for image, (prompt, seed) in zip(images, jobs, strict=True)]

    def batch_size(self):
        """How many images fit in memory at once, as a power of two up to 32; on the CPU what is fastest, by size."""
        import torch

        from surgery.generating import draw
        from surgery.patching import denoiser

        model = denoiser(self.pipeline)
        side = model.config.sample_size * self.pipeline.vae_scale_factor
        side = side if isinstance(side, int) else max(side)
        pixels = (self.sampling.get("height") or side) * (self.sampling.get("width") or side)
        if model.device.type != "cuda":
            return max(1, min(16, 16 * 128 * 128 // pixels))
        peaks = []
        for count in (1, 2):
            torch.cuda.reset_peak_memory_stats()
            draw(self.pipeline, [("memory", seed) for seed in range(count)], self.sampling)
            peaks.append(torch.cuda.max_memory_allocated())
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        fitting = 1 + 0.8 * max(0, free - peaks[0]) / max(peaks[1] - peaks[0], 1)
        return 1 << min(5, int(fitting).bit_length() - 1)


def _png(image, prompt, seed):
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    record = {"prompt": prompt, "seed": seed} | ({"flagged": True} if image.info.get("flagged") else {})
    text.add_itxt("surgery", json.dumps(record, ensure_ascii=False))
    file = io.BytesIO()
    image.convert("RGB").save(file, format="PNG", pnginfo=text)
    return file.getvalue()
