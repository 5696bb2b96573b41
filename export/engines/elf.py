"""A compiled package's library without an executable stack, which newer systems (glibc 2.41) do not open."""

import os
import struct
import zipfile
from pathlib import Path

_GNU_STACK, _EXECUTABLE = 0x6474E551, 1  # of a program header: its type, and the flag (System V ABI, ELF-64)


def clear_executable_stack(package: Path) -> None:
    """Take the flag from every library in an AOTInductor package, whose entries otherwise stay as they are.

    torch's linker sets it, as the assembler file of the constants says nothing of the stack; nothing there runs on it.
    """
    partial = package.with_name(f".{package.name}.partial")
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, _cleared(content) if entry.filename.endswith(".so") else content)
    os.replace(partial, package)


def _cleared(library):
    if library[:6] != b"\x7fELF\x02\x01":  # 64 bits, least byte first
        return library
    data = bytearray(library)
    (start,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    for at in range(start, start + size * count, size):
        kind, flags = struct.unpack_from("<II", data, at)
        if kind == _GNU_STACK:
            struct.pack_into("<I", data, at + 4, flags & ~_EXECUTABLE)
    return bytes(data)
