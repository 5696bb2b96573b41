"""What the tests of the Hub send."""

import json
import struct

from huggingface_hub import CommitOperationAdd

REPO = "me/model"
README = b"---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n"


def safetensors(values=b"\0" * 64):
    """A file with one uint8 tensor `w`."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    return struct.pack("<Q", len(header)) + header + values


def push(api, files, repo=REPO, **options):
    """Commit {path: bytes}."""
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(repo, operations, commit_message="push", **options)
