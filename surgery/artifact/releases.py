"""The shipped code of every release, by sha256, so that what a repository carries can be told from what it claims."""

import hashlib

# version -> sha256 of the file that its artifacts carry (surgery/nn joined by surgery/nn/shipped.py). A line is added
# when a version is released, by `python tests/frozen/make.py VERSION`, which also freezes an artifact of it; none is
# ever changed.
RELEASES = {
    "0.1.0": "91d407325169a5d3129eec6cd03ea3456fc69047d33aa5e0e9278ec2f8807551",
    "0.2.0": "e70929fb5524b7be7e1a06fe291a179d1b83e047fe2b65f21febae46510f430e",
    "0.3.0.dev0": "d034511ffa616f8801c3c3f3bf76e9c71b42f0264e1bc99b26d01300a6958924",
}


def release_of(sha256):
    """The version whose shipped code has this sha256, this installation's included, or None."""
    from surgery.nn import PATCHED
    from surgery.nn.shipped import shipped_source
    from surgery.versions import versions

    for version, known in RELEASES.items():
        if sha256 == known:
            return version
    if any(sha256 == hashlib.sha256(shipped_source(name).encode("utf-8")).hexdigest() for name in PATCHED):
        return f"{versions()['pladis-surgery']}, as installed here"
    return None
