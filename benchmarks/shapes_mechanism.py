"""Which part of alpha-entmax costs the shapes pipeline its second object.

    python benchmarks/shapes_mechanism.py --out docs

alpha-entmax changes softmax's weights in two ways: how much goes to the start token, to the words and to the end token
with the padding (the shares of these kinds), and which tokens within a kind have it. The images of the same prompts
and seeds are drawn with either change alone and judged as `surgery validate` does. Weights are computed plainly, by a
diffusers attention processor on the unpatched UNet; where entmax leaves a kind nothing, softmax's weights within it
stand. Writes shapes_mechanism.json into --out and prints a line for each variant.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from surgery.artifact.manifest import write_json
from surgery.console import progress_bar, quiet_bars
from surgery.models.patching import denoiser
from surgery.nn import entmax
from surgery.runtime.draw import draw
from surgery.runtime.load import open_model
from surgery.validate.jobs import jobs_of
from surgery.validate.metrics.shape_alignment import ShapeAlignment
from surgery.validate.prompts import open_prompts
from surgery.validate.session import hardware
from surgery.validate.statistics import paired

VARIANTS = {  # name -> (between the kinds, within a kind)
    "softmax": ("softmax", "softmax"),
    "entmax": ("entmax", "entmax"),
    "entmax between the kinds, softmax within": ("entmax", "softmax"),
    "softmax between the kinds, entmax within": ("softmax", "entmax"),
}
SAMPLING = {"steps": 25, "guidance_scale": 4.0, "height": 64, "width": 64}
_NOTHING = 1e-6  # a share that counts as none


class Mixture:
    """A diffusers attention processor whose weights between and within the kinds of tokens come from either map.

    kinds: (batch, kind, token), 1.0 where a token is of a kind.
    """

    def __init__(self, variant, alpha, kinds):
        self.between, self.within = VARIANTS[variant]
        self.alpha, self.kinds = alpha, kinds

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        """(batch, place, channel), as diffusers' AttnProcessor; the shapes pipeline has no mask here."""
        projected = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        query, key, value = (one.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for one in projected)
        scores = query @ key.transpose(-1, -2) * attn.scale
        weights = self._map(self.between, scores)
        if self.between != self.within:
            weights = mixture(weights, self._map(self.within, scores), self.kinds)
        return attn.to_out[1](attn.to_out[0]((weights @ value).transpose(1, 2).flatten(-2)))

    def _map(self, name, scores):
        return scores.softmax(-1) if name == "softmax" else entmax(scores, alpha=self.alpha)


def mixture(between, within, kinds):
    """Weights (batch, head, place, token) with each kind's share of the map `between` and its inside of `within`."""

    def share(weights):  # of the kind that a token is of
        return torch.einsum("bhqk,bgk->bhqg", weights, kinds) @ kinds.unsqueeze(1)

    inside = share(within)
    wanted = within * (share(between) / inside.clamp_min(_NOTHING))
    # A map that gives a kind nothing has no inside there: the other's stands.
    return torch.where(inside > _NOTHING, wanted, between)


def kinds_of(tokenizer, prompts):
    """(2 n, 3, tokens): start, words, end and padding, of n empty prompts and of the prompts."""
    length = tokenizer.model_max_length
    kinds = torch.zeros(2 * len(prompts), 3, length)
    for row, prompt in zip(kinds, [""] * len(prompts) + prompts, strict=True):
        end = len(tokenizer(prompt, truncation=True).input_ids) - 1
        row[0, :1] = row[1, 1:end] = row[2, end:] = 1.0
    return kinds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=400, help="prompts of shapes-dev (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=1.5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    quiet_bars()
    pipeline, _, _ = open_model("recipes/shapes")
    modules = [module for name, module in denoiser(pipeline).named_modules() if name.endswith("attn2")]
    chosen = open_prompts("shapes-dev", limit=options.limit)
    jobs = jobs_of(chosen)
    scorer = ShapeAlignment({}, None)
    verdicts = {name: [] for name in VARIANTS}
    with progress_bar("drawing", len(jobs) * len(VARIANTS), "images") as advance, torch.no_grad():
        for start in range(0, len(jobs), options.batch):
            part = jobs[start : start + options.batch]
            kinds = kinds_of(pipeline.tokenizer, [job.prompt.text for job in part])
            for name, found in verdicts.items():
                for module in modules:
                    module.set_processor(Mixture(name, options.alpha, kinds))
                images = draw(pipeline, [(job.prompt.text, job.seed) for job in part], SAMPLING)
                found += list(scorer.score(images, [job.prompt for job in part]))
                advance(len(part))
    results = summary(verdicts, chosen.prompts)
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {"prompts": "shapes-dev", "count": len(jobs), "alpha": options.alpha, "sampling": SAMPLING}
    write_json(options.out / "shapes_mechanism.json", {**facts, "hardware": hardware("cpu"), "variants": results})
    for name, groups in results.items():
        for group, figures in groups.items():
            ends = " to ".join(f"{100 * end:+.1f}" for end in figures["interval"])
            print(
                f"{name:42} {group:14} n {figures['n']:4}  {figures['aligned']:.1%}  "
                f"{100 * figures['difference']:+.1f} ({ends})"
            )


def summary(verdicts, prompts):
    """{variant: {"all" or "two_objects": share aligned, and the paired difference from softmax}}."""
    group = np.unique([prompt.text for prompt in prompts], return_inverse=True)[1]
    two_objects = np.array([prompt.category == "two_objects" for prompt in prompts])
    verdicts = {name: np.array(found) for name, found in verdicts.items()}
    results = {}
    for name, found in verdicts.items():
        results[name] = {}
        for subset, chosen in {"all": np.ones_like(two_objects), "two_objects": two_objects}.items():
            pair = paired(verdicts["softmax"][chosen], found[chosen], group[chosen])
            results[name][subset] = {
                "n": pair.n,
                "aligned": pair.patched,
                "difference": pair.difference,
                "interval": list(pair.interval),
            }
    return results


if __name__ == "__main__":
    main()
