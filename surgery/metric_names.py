"""The names of the metrics, for recipes and the command line, which do not import the metrics themselves."""

FIDELITY_METRICS = ("ssim", "psnr", "lpips")  # they compare with the base's images, and so have no better side
METRIC_NAMES = (
    "clip_score",
    "pick_score",
    "hps_v2",
    "hps_v2.1",
    "image_reward",
    "geneval",
    "shape_alignment",
    "fid",
    "kid",
    *FIDELITY_METRICS,
)
