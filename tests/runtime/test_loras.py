"""LoRAs in a live denoiser's weights: what they add, whatever was there before, and that nothing of them stays."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.errors import ArtifactError, InputError
from surgery.runtime.loras import Loras, LoraSource, check_loras, lora_source

from ..conftest import SHAPES, draw, load_shapes
from ..models.test_patch_survives import lora_state


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of two LoRAs of the shapes UNet, one of them with a convolution and an alpha."""
    folder = tmp_path_factory.mktemp("loras")
    unet = load_shapes().unet
    save_file(lora_state(unet, 0), folder / "one.safetensors")
    generator = torch.Generator().manual_seed(3)
    state = {
        "down_blocks.0.resnets.0.conv1.lora_down.weight": torch.randn(4, 48, 3, 3, generator=generator) * 0.05,
        "down_blocks.0.resnets.0.conv1.lora_up.weight": torch.randn(48, 4, 1, 1, generator=generator) * 0.05,
        "down_blocks.0.resnets.0.conv1.alpha": torch.tensor(2.0),
    }
    kohya = {
        f"lora_unet_{name.partition('.lora_')[0].removesuffix('.alpha').replace('.', '_')}"
        + (".alpha" if name.endswith("alpha") else ".lora_" + name.partition(".lora_")[2]): tensor
        for name, tensor in state.items()
    }
    save_file(kohya, folder / "two.safetensors")
    return folder


def sources_of(folder):
    return [lora_source(f"{name}={folder / name}.safetensors") for name in ("one", "two")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_the_formulas_and_afterwards_bit_for_bit_what_they_were(files, dtype):
    pipeline = surgery.patch(load_shapes()).to(dtype)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    loras = Loras(pipeline, sources_of(files))
    loras.wear((("one", -0.5), ("two", 2.0)))
    state = lora_state(pipeline.unet, 0)
    changed = 0
    for name, tensor in pipeline.unet.state_dict().items():
        expected = before[name].double().numpy()
        if f"unet.{name.removesuffix('weight')}lora_A.weight" in state:
            up, down = (state[f"unet.{name.removesuffix('weight')}lora_{which}.weight"] for which in "BA")
            expected = expected - 0.5 * (up.double().numpy() @ down.double().numpy())  # alpha is the rank
        elif name == "down_blocks.0.resnets.0.conv1.weight":
            from safetensors.torch import load_file

            file = load_file(files / "two.safetensors")
            up, down = (file[f"lora_unet_down_blocks_0_resnets_0_conv1.lora_{one}.weight"] for one in ("up", "down"))
            delta = np.einsum("or,rikl->oikl", up.double().numpy()[:, :, 0, 0], down.double().numpy())
            expected = expected + 2.0 * 2.0 / 4 * delta
        else:
            assert torch.equal(tensor, before[name])
            continue
        changed += 1
        error = np.abs(tensor.double().numpy() - expected).max() / np.abs(expected).max()
        assert error < (1e-6 if dtype == torch.float32 else 5e-3)
    assert changed == len(state) // 2 + 1
    loras.wear((("two", 1.0),))
    loras.wear(())
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.unet.state_dict().items())


def test_it_draws_what_diffusers_draws_with_the_lora_on_a_patched_pipeline(files):
    pipeline, reference = surgery.patch(load_shapes()), surgery.patch(load_shapes())
    plain = draw(pipeline)
    loras = Loras(pipeline, sources_of(files))
    loras.wear((("one", 0.5),))
    reference.load_lora_weights(str(files / "one.safetensors"))
    worn = draw(pipeline)
    expected = draw(reference, cross_attention_kwargs={"scale": 0.5})
    assert (worn - expected).abs().max() < 1e-3 < (worn - plain).abs().max()
    loras.wear(())
    assert torch.equal(draw(pipeline), plain)


def test_a_weight_that_overflows_is_refused_and_none_is_changed(files):
    pipeline = load_shapes().to(torch.float16)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    loras = Loras(pipeline, sources_of(files))
    with pytest.raises(InputError, match="overflows torch.float16; use a smaller scale"):
        loras.wear((("one", 1e9),))
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.unet.state_dict().items())


def test_one_that_does_not_fit_is_refused_without_reading_the_weights(files, tmp_path):
    check_loras(SHAPES, sources_of(files))
    state = lora_state(load_shapes().unet)
    name = next(iter(state)).removeprefix("unet.").partition(".lora_")[0]
    down, up = (f"unet.{name}.lora_{which}.weight" for which in "AB")
    for wrong, words in (
        ({down: state[down][:, :-1].contiguous(), up: state[up]}, f"{name}.weight has .* values, the weight"),
        ({down: state[down][:-1].contiguous(), up: state[up]}, f"{name}.weight has .* values, the weight"),
        ({down.replace("down_blocks", "over_blocks"): state[down]}, "cannot be read as a LoRA|lacks|does not have"),
    ):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(InputError, match=f"--lora a: .*({words})"):
            check_loras(SHAPES, [lora_source(f"a={tmp_path / 'wrong.safetensors'}")])
    (tmp_path / "no.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="--lora a: .*no.safetensors"):
        check_loras(SHAPES, [lora_source(f"a={tmp_path / 'no.safetensors'}")])


def test_another_file_than_the_one_that_was_checked_is_refused(files, tmp_path):
    path = tmp_path / "one.safetensors"
    path.write_bytes((files / "one.safetensors").read_bytes())
    source = lora_source(f"one={path}")
    assert source.path() == path
    path.write_bytes((files / "two.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="another file than the one that was checked"):
        source.path()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "write NAME=FILE"),
        ("=x.safetensors", "write NAME=FILE"),
        ("a=", "write NAME=FILE"),
        ("a=x.safetensors", "there is no file x.safetensors"),
        ("a=loras/x.safetensors", "there is no file loras/x.safetensors"),
        ("a=./x/y/z.safetensors", "there is no file x/y/z.safetensors"),
    ],
)
def test_what_is_no_lora_is_told(text, words):
    with pytest.raises(InputError, match=words):
        lora_source(text)


def test_a_folder_has_the_file_that_diffusers_writes(files, tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes((files / "one.safetensors").read_bytes())
    found = lora_source(f"a={tmp_path}")
    assert found == LoraSource("a", None, str(tmp_path / "pytorch_lora_weights.safetensors"), None, found.sha256)


def test_one_of_the_hub_is_found_at_a_commit_by_its_repository_alone_or_by_its_file(files, run, tmp_path):
    from ..loopback_hub import COMMIT, environment, hub_server

    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "one.safetensors").write_bytes((files / "one.safetensors").read_bytes())
    code = (
        "from surgery.errors import InputError\n"
        "from surgery.runtime.loras import lora_source\n"
        "for text in ('a=me/lora', 'a=me/lora/one.safetensors', 'a=me/lora/two.safetensors'):\n"
        "    try:\n"
        "        found = lora_source(text)\n"
        "        print(found.repo, found.file, found.revision, len(found.path().read_bytes()))\n"
        "    except InputError as error:\n"
        "        print(error)\n"
    )
    with hub_server() as server:
        server.repositories["me/lora"] = repository
        done = run(python=code, env=environment(server, tmp_path / "home"), check=0)
    size = (files / "one.safetensors").stat().st_size
    first, second, third = done.stdout.splitlines()
    assert first == second == f"me/lora one.safetensors {COMMIT} {size}"
    assert "me/lora has no two.safetensors; it has these weights: one.safetensors" in third
