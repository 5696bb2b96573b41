"""The papers behind the operators, for the card."""

_PLADIS = """@article{kim2025pladis,
  title   = {{PLADIS}: Pushing the Limits of Attention in Diffusion Models at Inference Time by Leveraging Sparsity},
  author  = {Kim, Kwanyoung and Sim, Byeongsu},
  journal = {arXiv preprint arXiv:2503.07677},
  year    = {2025}
}"""
_GAG = """@article{kim2026gag,
  title   = {Geometry-Aware Attention Guidance for Diffusion Models via Modern Hopfield Dynamics},
  author  = {Kim, Kwanyoung},
  journal = {arXiv preprint arXiv:2603.02531},
  year    = {2026}
}"""
_ENTMAX = """@inproceedings{peters2019entmax,
  title     = {Sparse Sequence-to-Sequence Models},
  author    = {Peters, Ben and Niculae, Vlad and Martins, Andr{\\'e} F. T.},
  booktitle = {Proceedings of ACL},
  year      = {2019},
  note      = {arXiv:1905.05702}
}"""


def citations(manifest):
    """The section with BibTeX of what the artifact's operators come from."""
    operators = {operation.operator for operation in manifest.operations}
    entries = [_PLADIS, *([_GAG] if operators & {"gag", "anderson"} else []), _ENTMAX]
    return [
        "## Cite",
        "",
        "What these papers report is their authors' measurement, on their own set-up; it is not quoted here, and none "
        "of it was measured for this artifact unless it stands under Scores.",
        "",
        "```bibtex",
        *entries,
        "```",
        "",
    ]
