"""The Xet storage as a folder (`local://`): what the real hf_xet client put there, read from its shard files.

A shard is a header of 48 bytes, then for each file records of 48 bytes: (hash, flags, count), `count` segments, as
many verifications if flag 31 is set, and the sha256 if flag 30 is set; a hash of ones ends the list.
"""

import struct
from pathlib import Path

RECORD = 48


def folder_of(server, region):
    """The folder that is the storage of a region."""
    folder = Path(server.folder, "xet", region)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _hexadecimal(hash_bytes):
    """A hash as text: its four numbers are stored with the lowest byte first."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hash_bytes))


def stored_files(folder):
    """{sha256: Xet hash} of the files in the storage."""
    found = {}
    for shard in folder.glob("xet/xorbs/shards/*.mdb"):
        data, at = shard.read_bytes(), RECORD
        while at + RECORD <= len(data) and data[at : at + 32] != b"\xff" * 32:
            flags, count = struct.unpack_from("<II", data, at + 32)
            end = at + RECORD * (1 + count * (2 if flags >> 31 else 1))
            if flags >> 30 & 1:
                found[_hexadecimal(data[end : end + 32])] = _hexadecimal(data[at : at + 32])
                end += RECORD
            at = end
    return found
