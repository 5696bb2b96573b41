"""What alpha-entmax does to a model's cross-attention: how many tokens keep weight, which, and how much changes.

    python benchmarks/sparse_attention.py recipes/shapes --out docs
    python benchmarks/sparse_attention.py stabilityai/stable-diffusion-xl-base-1.0 --prompts drawbench --limit 8 \
        --steps 25 --guidance 5 --height 1024 --width 1024

Draws images with the untouched model and, in every call of every cross-attention module, compares softmax with
alpha-entmax on the same scores. Means over prompts, heads and places of the image, of the conditional half, by module
and by denoising step:

support     tokens whose sparse weight is not zero
start, words, end, padding     the weight of these tokens, dense and sparse; words with their punctuation
word 1, word 2, ...            with --words: of each word, by its place in the prompt
change      the norm of the sparse minus the dense output over the norm of the dense, root mean square over the places

Writes sparse_attention.json and sparse_attention.png into --out and prints the means by block.
"""

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from surgery.analysis.attention_maps import words_of_prompt
from surgery.analysis.attention_maps.recording import Observer, attention_map
from surgery.artifact.manifest import write_json
from surgery.console import progress_bar, quiet_bars
from surgery.models.anatomy import attention_sites
from surgery.models.patching import denoiser, patched_modules, unpatch
from surgery.models.selection import select_sites
from surgery.runtime.draw import draw
from surgery.runtime.load import open_model
from surgery.validate.prompts import open_prompts
from surgery.validate.report.pictures import new_figure, png

KINDS = ("start", "words", "end", "padding")


class Figures:
    """Sums of the figures over the calls of all modules: {(module, step): {name: sum}}, and the number of calls."""

    def __init__(self, alpha):
        self.alpha = alpha
        self.step, self.positions = 0, {}
        self.sums, self.calls = defaultdict(lambda: defaultdict(float)), defaultdict(int)

    def add(self, path, module, query, key, value, mask):
        """One call: of an Observer."""
        scores = {"mask": mask, "qk_scale": module.scale, "implementation": "blocked"}
        query, key, value = query.float(), key.float(), value.float()
        dense = attention_map(query, key, operator="pladis", scale=0.0, **scores)
        sparse = attention_map(query, key, operator="sparse", alpha=self.alpha, **scores)
        figures = {"support": (sparse > 0).float().sum(-1).mean()}
        for kind, places in self.positions.items():
            figures |= {f"dense {kind}": dense[..., places].sum(-1).mean()}
            figures |= {f"sparse {kind}": sparse[..., places].sum(-1).mean()}
        change, before = ((weights @ value).square().sum() for weights in (sparse - dense, dense))
        figures["change"] = (change / before.clamp_min(1e-30)).sqrt()
        for name, figure in figures.items():
            self.sums[path, self.step][name] += figure.item()
        self.calls[path, self.step] += 1

    def means(self):
        """{name: {module: [of each step]}}."""
        found = defaultdict(lambda: defaultdict(list))
        for (path, step), sums in sorted(self.sums.items(), key=lambda item: item[0][1]):
            for name, total in sums.items():
                found[name][path].append(total / self.calls[path, step])
        return found


def measure(pipeline, prompts, sampling, alpha, each_word=False):
    """The means of Figures over images of the prompts, one of each, seeds 0, 1, ..."""
    model = denoiser(pipeline)
    if patched_modules(model):
        unpatch(pipeline)
        model = denoiser(pipeline)
    paths, _ = select_sites(attention_sites(model), ["all"])
    figures = Figures(alpha)
    with progress_bar("drawing", len(prompts), "images") as advance:
        for seed, prompt in enumerate(prompts):
            found = words_of_prompt(pipeline.tokenizer, prompt, special=True)
            figures.positions = _positions(found, each_word)
            figures.step = 0

            def next_step():
                figures.step += 1

            with torch.no_grad(), Observer(pipeline, model, paths, found.length, figures.add):
                draw(pipeline, [(prompt, seed)], sampling, next_step)
            advance(1)
    return figures.means()


def chosen_prompts(name, category, limit):
    """The texts of a prompt set, or of one category of it, `limit` of them, evenly spaced."""
    whole = open_prompts(name)
    prompts = tuple(one for one in whole.prompts if category in (None, one.category))
    if not prompts:
        known = ", ".join(sorted({str(one.category) for one in whole.prompts}))
        raise SystemExit(f"{name} has no category {category}; it has {known}")
    return [prompt.text for prompt in replace(whole, prompts=prompts).spread(limit).prompts]


def _positions(found, each_word):
    """{kind of token: its places}; each_word: every word is a kind too."""
    places = {kind: [] for kind in KINDS}
    for column in found.columns:
        kind = column.label.strip("<>")
        places[kind if kind in KINDS and column.label.startswith("<") else "words"] += column.positions
    if each_word:  # a label in angle brackets is of special tokens, or of punctuation
        words = [column for column in found.columns if not column.label.startswith("<")]
        places |= {f"word {number}": column.positions for number, column in enumerate(words, start=1)}
    return {kind: sorted(set(found)) for kind, found in places.items() if found}


def by_block(means):
    """[(block, {name: mean over its modules and all steps})], "all" last."""
    blocks = defaultdict(lambda: defaultdict(list))
    for name, modules in means.items():
        for path, steps in modules.items():
            block = ".".join(path.split(".")[: 1 if path.startswith("mid") else 2])
            for group in (block, "all"):
                blocks[group][name] += steps
    rows = [
        (block, {name: sum(all_) / len(all_) for name, all_ in figures.items()}) for block, figures in blocks.items()
    ]
    return sorted(rows, key=lambda row: row[0] == "all")


def picture(means, title):
    """A PNG: module by step, the support, the weight of start and padding before and after, and the change."""
    outside = {}
    for way in ("dense", "sparse"):
        others = [means[f"{way} {kind}"] for kind in KINDS if kind != "words" and f"{way} {kind}" in means]
        outside[way] = {
            path: [sum(parts) for parts in zip(*(weight[path] for weight in others), strict=True)]
            for path in means["support"]
        }
    panels = [
        ("tokens with weight, sparse", means["support"], None),
        ("weight off the words, dense", outside["dense"], (0, 1)),
        ("weight off the words, sparse", outside["sparse"], (0, 1)),
        ("change of the output", means["change"], None),
    ]
    modules = list(means["support"])
    labels = [
        path.replace("transformer_blocks.", "").replace("attentions.", "").removesuffix(".attn2") for path in modules
    ]
    figure = new_figure(16, max(3.2, 1.4 + 0.26 * min(len(modules), 40)))
    figure.suptitle(title, fontsize=11)
    for number, (name, values, limits) in enumerate(panels):
        axis = figure.add_subplot(1, len(panels), number + 1)
        low, high = limits or (0, None)
        shown = axis.imshow([values[path] for path in modules], aspect="auto", cmap="viridis", vmin=low, vmax=high)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("denoising step")
        named = labels if number == 0 and len(labels) <= 40 else []
        axis.set_yticks(range(len(named)), named, fontsize=8)
        figure.colorbar(shown, ax=axis)
    return png(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", help="a folder or a Hub repository: a pipeline, or an artifact, whose base is measured"
    )
    parser.add_argument("--prompts", default="shapes-dev", help="a prompt set or a file (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=24, help="how many of them (default: %(default)s)")
    parser.add_argument("--category", help="of these only the prompts of this category")
    parser.add_argument("--words", action="store_true", help="the weight of each word too: for prompts of one form")
    parser.add_argument("--alpha", type=float, default=1.5)
    for name, kind in (("steps", int), ("guidance", float), ("height", int), ("width", int)):
        parser.add_argument(f"--{name}", type=kind, help="unless given, the artifact's or the pipeline's own")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    quiet_bars()
    given = {"steps": options.steps, "guidance_scale": options.guidance}
    given |= {"height": options.height, "width": options.width}
    pipeline, sampling, _ = open_model(options.model, device=options.device)
    sampling = {**sampling, **{key: value for key, value in given.items() if value is not None}}
    prompts = chosen_prompts(options.prompts, options.category, options.limit)
    means = measure(pipeline, prompts, sampling, options.alpha, options.words)
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {"model": str(options.model), "prompts": options.prompts, "category": options.category}
    facts |= {"count": len(prompts), "alpha": options.alpha}
    facts |= {"sampling": sampling, "blocks": dict(by_block(means)), "modules": means}
    write_json(options.out / "sparse_attention.json", facts)
    title = f"{options.model}: alpha {options.alpha:g}, {len(prompts)} prompts of {options.prompts}"
    (options.out / "sparse_attention.png").write_bytes(picture(means, title))
    names = list(means)
    print("  ".join(["block".ljust(16), *names]))
    for block, figures in by_block(means):
        print("  ".join([block.ljust(16), *(f"{figures[name]:.3g}".rjust(len(name)) for name in names)]))


if __name__ == "__main__":
    main()
