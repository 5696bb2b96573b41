"""`surgery invert`: images to noise and back by each attention operator, how near that comes, and a PNG of it."""

from surgery.console import quiet_bars

from .pictures import given_sampling, png_path, save_png
from .show import print_json, relative, table
from .validate import checkpoints_of


def run(arguments):
    """Write a PNG with a row for each image and print each side's scores, beside dense attention's."""
    out, given = png_path(arguments.out), given_sampling(arguments)
    checkpoints = checkpoints_of(arguments.checkpoints)
    quiet_bars()
    from surgery.analysis.inversion import captioned_images, invert
    from surgery.analysis.inversion import pictures as sheet
    from surgery.analysis.inversion.pictures import check_images
    from surgery.runtime.load import open_model

    images, prompts = captioned_images(arguments.images, arguments.prompt, arguments.prompts)
    check_images(images)  # the error that one is not there comes before the model is loaded
    pipeline, recorded, artifact_hash = open_model(
        arguments.model, arguments.revision, arguments.device, arguments.verify
    )
    size = {name: recorded[name] for name in ("height", "width") if recorded.get(name)}
    found = invert(
        pipeline,
        images,
        prompts,
        operators=[name.strip() for name in arguments.operators.split(",") if name.strip()],
        inverted_by=arguments.inverted_by,
        metrics=arguments.metrics,
        checkpoints=checkpoints,
        batch=arguments.batch,
        **{**size, **given},
    )
    record = {
        "files": [str(path) for path in images],
        "prompts": found.prompts,
        "settings": found.settings,
        "sides": [{"side": name, "setting": side.setting, "scores": side.scores} for name, side in found.rows.items()],
    }
    shown = {
        "artifact": artifact_hash,
        "rows": len(found.images),
        "settings": found.settings,
        "sides": list(found.rows),
    }
    save_png(sheet(found), out, shown)
    if arguments.json:
        values = [
            {name: _values(side, index) for name, side in found.rows.items()} for index in range(len(found.prompts))
        ]
        print_json({"schema_version": 1, "file": out, "artifact": artifact_hash, **record, "values": values})
        return
    _print_scores(found)
    shown = len(found.images)
    cut = f", the first {shown} of {len(images)}" if shown < len(images) else ""
    print(f"images, their way through the VAE, and the reconstructions{cut}: {relative(out.absolute())}")


def _values(side, index):
    """{target: {metric: value}} of one image."""
    return {target: {name: float(found[index]) for name, found in of.items()} for target, of in side.values.items()}


def _print_scores(found):
    for target, title in (("image", "to the image"), ("round_trip", "to its VAE round trip")):
        columns = ["side"]
        for info in found.metrics.values():
            columns += [info.title, "from dense", "95% interval"]
        rows = []
        for name, side in found.rows.items():
            if target not in side.scores:
                continue
            rows.append([name, *(cell for mean in side.scores[target].values() for cell in _cells(mean))])
        table(f"{title}, mean of {len(found.prompts)}", columns, rows)
    for name, side in found.sides.items():
        if side.setting:
            print(f"{name}: {side.setting}")
    settings = found.settings
    inverted = "each by its own operator" if settings["inverted_by"] == "same" else "all by dense attention"
    print(
        f"{settings['steps']} DDIM steps ({settings['timestep_spacing']}) to noise, {inverted}, and as many back at "
        f"guidance {settings['guidance_scale']:g}"
    )


def _cells(mean):
    if mean.difference is None:
        return [f"{mean.mean:.4g}", "", ""]
    interval = "" if mean.interval is None else "{:+.3g} to {:+.3g}".format(*mean.interval)
    return [f"{mean.mean:.4g}", f"{mean.difference:+.3g}", interval]
