"""benchmarks/house.py: no fact stands twice, and what would is found."""

from pathlib import Path

import pytest

TWICE = """
from diffusers import FluxTransformer2DModel
KINDS = {"UNet2DConditionModel": 1, "alpha": 1.5}
class Settings:
    alpha: float = 1.5
def f(x, alpha=1.5, *, scale=2.0, eta=1.0): ...
"""


@pytest.fixture
def house(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import house

    return house


def test_no_fact_stands_twice(house, capsys):
    assert house.main() == 0
    assert "surgery/nn" in capsys.readouterr().out


def test_a_backbone_or_a_default_in_a_second_place_is_found(house):
    texts = {"surgery/x.py": TWICE, "surgery/nn/backbones/flux.py": TWICE, "surgery/nn/operators.py": TWICE}
    backbones = ["FluxTransformer2DModel", "UNet2DConditionModel"]
    assert house.repeated_backbones({"surgery/x.py": TWICE}, backbones) == [
        "surgery/x.py:2 names FluxTransformer2DModel",
        "surgery/x.py:3 names UNet2DConditionModel",
    ]
    found = house.repeated_defaults(texts, {"alpha": 1.5, "scale": 2.0, "eta": 15.0})
    assert sorted(line for line in found if line.startswith("surgery/x.py")) == [
        "surgery/x.py:3 gives alpha 1.5",
        "surgery/x.py:5 gives alpha 1.5",
        "surgery/x.py:6 gives alpha 1.5",
        "surgery/x.py:6 gives scale 2.0",
    ]
    assert not [line for line in found if line.startswith("surgery/nn/operators.py")]


def test_modules_that_stand_in_no_room_are_counted(house):
    names = ["surgery/__init__.py", "surgery/__main__.py", "surgery/errors.py", "surgery/nn/model.py", "export/x.py"]
    assert house.loose_modules(names) == ["surgery/errors.py"]
