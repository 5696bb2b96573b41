"""Writes operators.py: the attention operators of surgery/nn, joined into one file as artifacts ship them.

    python comfyui/join.py       # from the project's root, after a change in surgery/nn

The registry is not given this script (.comfyignore).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "comfyui" / "operators.py"
HEADER = '''"""The attention operators of pladis-surgery in one file. Apache-2.0. Needs torch alone.

Joined mechanically from its surgery/nn folder by comfyui/join.py, as in an artifact; change it there.
"""
'''


def text() -> str:
    """What operators.py has to say."""
    from surgery.nn.shipped import joined, parts_behind

    return joined(parts_behind("joint.py"), HEADER)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    TARGET.write_text(text(), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
