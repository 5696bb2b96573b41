"""`surgery attention-maps`: where each word of a prompt is attended to, dense beside sparse, as one PNG."""

from surgery.console import quiet_bars
from surgery.errors import InputError

from .pictures import given_sampling, png_path, save_png
from .show import print_json, relative, table


def run(arguments):
    """Write a PNG with a row each for dense, sparse and the model's own attention and a map per word in it."""
    out, given = png_path(arguments.out), given_sampling(arguments)
    words = None if arguments.words is None else [word for word in arguments.words.split(",") if word.strip()]
    if words == []:
        raise InputError("--words names none; give words of the prompt with commas between them")
    quiet_bars()
    from surgery.analysis.attention_maps import compare_attention, heat_colours, sheet
    from surgery.runtime.load import open_model

    heat_colours()  # the error that it is not installed comes before the work
    pipeline, recorded, artifact_hash = open_model(
        arguments.model, arguments.revision, arguments.device, arguments.verify
    )
    sampling = {**recorded, **given}
    if arguments.steps is not None:
        sampling.pop("timesteps", None)
    comparison = compare_attention(
        pipeline,
        arguments.prompt,
        words=words,
        special=arguments.special,
        layers=arguments.layers or "all",
        seed=arguments.seed,
        sampling=sampling,
    )
    record = {
        "prompt": comparison.prompt,
        "seed": comparison.seed,
        "sampling": sampling,
        "words": [{"word": column.label, "tokens": column.positions} for column in comparison.columns],
        "cut_off": comparison.cut_off,
        "modules": comparison.modules,
        "rows": [{"mode": row.mode, "setting": row.setting, "words": row.figures} for row in comparison.rows],
    }
    save_png(sheet(comparison), out, {"artifact": artifact_hash, **record})
    if arguments.json:
        print_json({"schema_version": 1, "file": out, **record})
        return
    _print_figures(comparison)
    if comparison.cut_off:
        print(f"beyond the text encoder's length, in whole or in part: {', '.join(comparison.cut_off)}")
    print(f"attention maps of {len(comparison.columns)} words, {len(comparison.rows)} rows: {relative(out.absolute())}")


def _print_figures(comparison):
    sparsified = comparison.rows[1:]
    columns = ["word", *(row.mode for row in comparison.rows), *(f"{row.mode} <= 0" for row in sparsified)]
    columns += [f"{row.mode} entropy" for row in comparison.rows]
    rows = []
    for column in comparison.columns:
        of_rows = [row.figures[column.label] for row in comparison.rows]
        cells = [f"{figures['mass']:.4f}" for figures in of_rows]
        cells += [f"{figures['zeros'] + figures['negatives']:.1%}" for figures in of_rows[1:]]
        cells += ["-" if figures["entropy"] is None else f"{figures['entropy']:.4f}" for figures in of_rows]
        rows.append([column.label, *cells])
    title = "mean weight of each word, share of its weights that are not above 0, entropy of its map (1: even)"
    table(title, columns, rows)
