"""Writes operators.py, the attention operators of surgery/nn joined into one file as artifacts ship them, and
combining.py, a copy of surgery/guidance/combining.py.

    python comfyui/join.py       # from the project's root, after a change in surgery/nn or there

The registry is not given this script (.comfyignore).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "comfyui"
HEADER = '''"""The attention operators of pladis-surgery in one file. Apache-2.0. Needs torch alone.

Joined mechanically from its surgery/nn folder by comfyui/join.py, as in an artifact; change it there.
"""
'''


def texts() -> dict[str, str]:
    """{file: what it has to say}."""
    from surgery.nn.shipped import joined, parts_behind

    arithmetic = (ROOT / "surgery/guidance/combining.py").read_text(encoding="utf-8")
    note = "# Copied from surgery/guidance of pladis-surgery by comfyui/join.py; change it there.\n"
    return {"operators.py": joined(parts_behind("joint.py"), HEADER), "combining.py": note + arithmetic}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"wrote comfyui/{name}")
