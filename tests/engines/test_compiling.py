"""surgery.load(..., compile=...): torch.compile in this process."""

import pytest
import torch

import surgery
from surgery.engines.compiling import call_times, compile_model, repeated_blocks
from surgery.errors import InputError

from ..nn.backbones.cross import pixart
from ..nn.backbones.two_streams import sd3
from .artifact import write_artifact
from .test_engines import assert_same_image, image


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["regional", "full", "max-autotune"])
def test_a_compiled_model_draws_what_eager_draws_and_follows_tune_without_compiling_again(mode, tmp_path):
    torch.compiler.reset()
    artifact = write_artifact(tmp_path, tmp_path / "artifact")
    eager = surgery.load(artifact, quiet=True)
    compiled = surgery.load(artifact, compile=mode, quiet=True)
    before = image(compiled)
    assert_same_image(before, image(eager))
    for pipeline in (eager, compiled):
        surgery.tune(pipeline, scale=-6.0, alpha=1.2)
    with torch.compiler.set_stance("fail_on_recompile"):
        after = image(compiled)
    assert_same_image(after, image(eager))
    assert (after - before).abs().max() > 2
    times = call_times(compiled.unet).report()
    print(times)
    assert times["mode"] == mode and times["calls"] == 4
    assert times["first_call_seconds"] > 2 * times["steady_seconds"]


class Small(torch.nn.Linear):
    device = torch.device("cpu")

    def forward(self, given):  # torch.compile passes over torch's own
        return super().forward(given).sin()


@pytest.mark.parametrize("mode", ["full", "max-autotune"])
def test_a_whole_model_is_one_graph_and_its_calls_are_timed(mode):
    torch.compiler.reset()
    model = Small(4, 4)
    given = torch.randn(2, 4)
    expected = model(given)
    times = compile_model(model, mode)
    for _ in range(3):
        torch.testing.assert_close(model(given), expected)
    assert times is call_times(model) and times.report()["calls"] == 3


@pytest.mark.parametrize("build", [pixart, sd3])
def test_blocks_are_found_where_diffusers_names_none(build):
    model = build()[0].transformer
    assert not model._repeated_blocks
    surgery.patch(model)
    assert list(repeated_blocks(model)) == [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]
    with pytest.raises(InputError, match="Linear has no repeated blocks"):
        repeated_blocks(torch.nn.Linear(1, 1))
