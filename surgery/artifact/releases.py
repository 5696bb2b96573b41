"""The shipped code of every release, by sha256, so that what a repository carries can be told from what it claims."""

# version -> sha256 of the file that its artifacts carry (surgery/nn joined by surgery/nn/shipped.py). A line is added
# when a version is released, from `python -m surgery.nn.shipped`; none is ever changed.
RELEASES = {}


def release_of(sha256):
    """The version whose shipped code has this sha256, this installation's included, or None."""
    import hashlib

    from surgery.nn.shipped import shipped_source
    from surgery.versions import versions

    for version, known in RELEASES.items():
        if sha256 == known:
            return version
    if sha256 == hashlib.sha256(shipped_source().encode("utf-8")).hexdigest():
        return f"{versions()['pladis-surgery']}, as installed here"
    return None
