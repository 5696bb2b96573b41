"""The metrics, one module each. A metric is a class with `info`, `__init__(files, device)` and one method by its kind.

    kind      method
    score     score(images, prompts) -> float64 array (n,)
    distance  features(images) -> array (n, d);  distance(features, reference) -> float
    fidelity  compare(patched, base) -> float64 array (n,)
    diversity features(images) -> array (n, d);  of_prompt(features) -> float64 array (n,), of one prompt's images

images, patched, base: lists of PIL images in mode RGB, of any size unless the metric says otherwise; prompts: as many
`Prompt`s. files: {part: path} for each of `info.checkpoints`, a folder for HubFiles and a file for WebFile.
"""

from importlib import import_module

from surgery.errors import InputError, nearest

# name -> module and class; a module is imported only when its metric is asked for
METRICS = {
    "clip_score": ("clip_scores", "ClipScore"),
    "pick_score": ("clip_scores", "PickScore"),
    "hps_v2": ("hps", "HpsV2"),
    "hps_v2.1": ("hps", "HpsV21"),
    "image_reward": ("image_reward", "ImageReward"),
    "hps_v3": ("hps_v3", "HpsV3"),
    "geneval": ("geneval", "GenEval"),
    "soft_tifa_gm": ("questions", "SoftTifaGm"),
    "soft_tifa_am": ("questions", "SoftTifaAm"),
    "vqa_score": ("questions", "VqaScore"),
    "dpg_bench": ("questions", "DpgBench"),
    "shape_alignment": ("shape_alignment", "ShapeAlignment"),
    "dino_diversity": ("diversity", "DinoDiversity"),
    "vendi_score": ("diversity", "VendiScore"),
    "fid": ("distances", "Fid"),
    "kid": ("distances", "Kid"),
    "ssim": ("pixels", "Ssim"),
    "psnr": ("pixels", "Psnr"),
    "lpips": ("lpips", "Lpips"),
}


def metric_class(name: str) -> type:
    """The class of a metric; InputError for a name that there is none of, or one whose libraries are not installed."""
    if name not in METRICS:
        near = nearest(name, METRICS)
        hint = f"; did you mean {near}?" if near else ""
        raise InputError(f"there is no metric {name!r}{hint} There are: {', '.join(METRICS)}")
    module, class_name = METRICS[name]
    return getattr(import_module(f"{__name__}.{module}"), class_name)
