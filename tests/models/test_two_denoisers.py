"""A live pipeline with two denoisers, Wan 2.2's: patched, tuned, scheduled, guided and watched as one of one is."""

import pytest
import torch

import surgery
from surgery.errors import InputError, UnsupportedModelError
from surgery.models.patching import operate, operations_of, patched_modules, switching

from ..nn.backbones.checks import draw
from ..nn.backbones.video import wan22

FIRST = [f"blocks.{block}.attn2" for block in range(2)]
SECOND = [f"transformer_2.{path}" for path in FIRST]
PROMPT = "a cat on it"


@pytest.fixture(scope="module")
def built():
    """(Pipeline, the arguments of a call, the latents that it draws unpatched)."""
    pipeline, arguments = wan22()
    arguments = {**arguments, "output_type": "latent"}
    return pipeline, arguments, draw(pipeline, arguments)


@pytest.fixture
def pipeline(built):
    yield built[0]
    if "pladis_guidance" in vars(built[0]):
        surgery.unguide(built[0])
    operate(built[0], None)


def drawn(built, **more):
    return draw(built[0], {**built[1], **more})


def gap(one, other):
    return (one - other).abs().max().item()


def calls_of(pipeline, run):
    """In which order the denoisers are called in a run, 1 and 2."""
    seen = []
    models = (pipeline.transformer, pipeline.transformer_2)
    hooks = [model.register_forward_pre_hook(lambda *_, n=n: seen.append(n)) for n, model in enumerate(models, 1)]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def test_both_are_patched_scale_zero_is_the_base_and_unpatching_gives_every_bit_back(built, pipeline):
    base = built[2]
    before = {name: tensor.data_ptr() for name, tensor in pipeline.transformer_2.state_dict().items()}
    assert calls_of(pipeline, lambda: drawn(built)) == [1, 1, 2, 2]
    surgery.patch(pipeline, scale=0.0)
    assert list(patched_modules(pipeline)) == FIRST + SECOND
    assert [one["layers"] for one in operations_of(pipeline)] == [FIRST + SECOND]
    assert gap(drawn(built), base) < 1e-5
    surgery.tune(pipeline, scale=2.0)
    assert gap(drawn(built), base) > 1e-3
    surgery.unpatch(pipeline)
    assert torch.equal(drawn(built), base)
    assert before == {name: tensor.data_ptr() for name, tensor in pipeline.transformer_2.state_dict().items()}
    assert type(pipeline.transformer_2).__name__ == "WanTransformer3DModel"


def test_each_acts_at_its_own_steps_and_has_settings_of_its_own(built, pipeline):
    surgery.patch(pipeline)
    both = drawn(built)
    surgery.tune(pipeline, layers="transformer_2", scale=0.5)
    assert [(one["scale"], one["layers"]) for one in operations_of(pipeline)] == [(2.0, FIRST), (0.5, SECOND)]
    assert [one["scale"] for one in pipeline.transformer_2.config.pladis] == [0.5]
    tuned = drawn(built)
    assert gap(tuned, both) > 1e-4
    operations = operations_of(pipeline)
    surgery.unpatch(pipeline)
    surgery.patch(pipeline, layers="blocks.*")
    assert list(patched_modules(pipeline)) == FIRST and not hasattr(pipeline.transformer_2, "pladis_operations")
    with switching(pipeline) as switch:  # to and fro, as scoring does
        switch(operations)
        assert torch.equal(drawn(built), tuned)
        switch(None)
        assert torch.equal(drawn(built), built[2])
    assert list(patched_modules(pipeline)) == FIRST


def test_a_selector_that_hits_nothing_leaves_both_as_they_were(built, pipeline):
    with pytest.raises(InputError, match=r"transformer_2\.blocks\.7.*did you mean"):
        surgery.patch(pipeline, layers=["blocks.0.*", "transformer_2.blocks.7.attn2"])
    assert not patched_modules(pipeline)
    operations = [{"operator": "pladis", "alpha": 1.5, "scale": 2.0, "temperature": 1.0, "sparse_temperature": 1.0}]
    operations = [{**operations[0], "layers": [FIRST[0], "transformer_2.blocks.0.attn1"]}]
    with pytest.raises(ValueError, match="self-attention"):
        operate(pipeline, operations)
    assert not patched_modules(pipeline) and torch.equal(drawn(built), built[2])


def test_a_schedule_is_carried_out_in_both_by_the_callback_of_either(built, pipeline):
    surgery.patch(pipeline)
    second_alone = {**operations_of(pipeline)[0], "layers": SECOND}
    operate(pipeline, [second_alone])
    wanted = drawn(built)
    operate(pipeline, None)
    surgery.patch(pipeline, schedule={"steps": [1, None]})
    with pipeline.transformer.scheduled(pipeline) as callback:
        assert gap(drawn(built, callback_on_step_end=callback), wanted) < 1e-5
    assert all(module.hyperparameters()["scale"] == 2.0 for module in patched_modules(pipeline).values())


def test_a_negative_prompt_in_attention_reaches_both(built, pipeline):
    call = {"guidance_scale": 1.0, "negative_prompt": None}
    plain = drawn(built, **call)
    images = []
    for layers in ("blocks.*", "transformer_2", "all"):
        surgery.patch(pipeline, operator="vsf", layers=layers)
        surgery.negative(pipeline, ["dog", "dog"])
        images.append(drawn(built, **call))
        surgery.unpatch(pipeline)
    assert all(gap(image, plain) > 1e-4 for image in images) and gap(images[0], images[2]) > 1e-4
    assert torch.equal(drawn(built, **call), plain)


@pytest.mark.parametrize("method", ["cfg", "apg", "pag", "slg", "cfg-zero"])
def test_guidance_is_over_both(built, pipeline, method):
    settings = {"zero_init": 0} if method == "cfg-zero" else {}
    surgery.guide(pipeline, method, **settings)
    weakened = {"pag": 3, "slg": 3}.get(method, 2)
    order = calls_of(pipeline, lambda: drawn(built))
    assert order == [1] * weakened + [2] * weakened
    guided = drawn(built)
    surgery.unguide(pipeline)
    # The first step alone: what it is without the method over the second denoiser.
    surgery.guide(pipeline, method, steps=[0, 1], **settings)
    assert gap(guided, drawn(built)) > 1e-4 and (gap(guided, built[2]) < 1e-5) == (method == "cfg")


def test_the_second_denoisers_own_scale_is_its_methods_too(built, pipeline):
    call = {"guidance_scale": 5.0, "guidance_scale_2": 2.0}
    plain = drawn(built, **call)
    assert gap(plain, drawn(built, guidance_scale=5.0)) > 1e-4
    surgery.guide(pipeline, "apg", momentum=0.0, eta=1.0, rescale=0.0)  # which is CFG
    assert gap(drawn(built, **call), plain) < 1e-4
    unguided = {"guidance_scale": 5.0, "guidance_scale_2": 1.0}
    surgery.unguide(pipeline)
    plain = drawn(built, **unguided)
    surgery.guide(pipeline, "cfg")
    assert gap(drawn(built, **unguided), plain) < 1e-4
    surgery.unguide(pipeline)
    surgery.guide(pipeline, "pag", steps=[1, None])
    assert torch.isfinite(drawn(built, **unguided)).all() and gap(drawn(built, **unguided), plain) > 1e-3


def test_a_single_weaker_model_is_refused_by_name(pipeline, tmp_path):
    pipeline.transformer.save_pretrained(tmp_path / "weak" / "transformer")
    with pytest.raises(UnsupportedModelError, match="two denoisers"):
        surgery.guide(pipeline, "autoguidance", weak={"pipeline": str(tmp_path / "weak")})


def test_diagnostics_see_both(pipeline):
    sampling = {
        "steps": 2,
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "guidance_scale": 1.0,
        "max_sequence_length": 16,
    }
    found = surgery.diagnose(pipeline, [PROMPT], sampling=sampling)
    assert list(found.totals) == FIRST + SECOND
    assert set(found.by_block()) == {"all", "blocks", "transformer_2.blocks"}
    assert not patched_modules(pipeline)
