"""The names of the metrics, for recipes and the command line, which do not import the metrics themselves."""

from typing import Literal, get_args

FIDELITY_METRICS = ("ssim", "psnr", "lpips")  # they compare with the base's images, and so have no better side
DISTANCE_METRICS = ("fid", "kid")  # they compare with reference images
MetricName = Literal[
    "clip_score",
    "pick_score",
    "hps_v2",
    "hps_v2.1",
    "image_reward",
    "hps_v3",
    "geneval",
    "soft_tifa_gm",
    "soft_tifa_am",
    "vqa_score",
    "dpg_bench",
    "shape_alignment",
    "dino_diversity",
    "vendi_score",
    "fid",
    "kid",
    "ssim",
    "psnr",
    "lpips",
]
METRIC_NAMES: tuple[MetricName, ...] = get_args(MetricName)
