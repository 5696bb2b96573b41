"""Engines: checked against eager before they are kept, run only where they fit, and live as eager is."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

import surgery
from surgery.artifact import read_manifest
from surgery.engines.fitting import candidates
from surgery.engines.record import Difference, Engine, parse_profile, read_engine
from surgery.errors import ArtifactError, InputError, SurgeryError
from surgery.export.engines.build import TOLERANCES, Wanted, build_engine
from surgery.export.engines.program import ChangingConstants
from surgery.export.serve.checking import Limits, ServerConfig, checked
from surgery.export.serve.refusal import Refusal
from surgery.export.serve.request import read_request
from surgery.models.patching import attachment, patched_modules
from surgery.runtime.draw import draw

from ..loopback_hub import environment, hub_server
from .artifact import JOBS, ONNX, REGIONAL, SAMPLING, assert_same_image, free_port, image, key_of, load, write_artifact


def test_engine_json_says_what_it_is_and_how_far_from_eager(built):
    engine = read_engine(built / "engines" / key_of(built, "inductor"))
    assert engine.artifact_hash == read_manifest(built).hash
    assert engine.built_on.torch == torch.__version__.split("+")[0]
    assert 0 < engine.difference.relative < 1e-4 and 0 < engine.difference.after_change < 1e-4
    assert engine.difference.calls == 3  # two of the usual size, one of the other corner
    assert engine.weights == "artifact"
    (region,) = engine.regions
    assert len(region.modules) == 2 and region.inputs[0].shape[0] == [1, 4]  # one image unguided to two guided


@pytest.mark.parametrize("backend", ["inductor", "onnx"])
def test_an_engine_draws_what_eager_draws_and_follows_tune(artifact, backend):
    eager, compiled = load(artifact), load(artifact, engine=key_of(artifact, backend))
    assert attachment(compiled.unet).engine.backend == backend and attachment(eager.unet) is None
    before = image(compiled)
    assert_same_image(before, image(eager))
    for pipeline in (eager, compiled):
        surgery.tune(pipeline, scale=-6.0, alpha=1.2)
    assert_same_image(image(compiled), image(eager))
    assert (image(compiled) - before).abs().max() > 2


def test_an_engine_is_served_at_the_sizes_that_it_was_built_for(artifact):
    pytest.importorskip("ray.serve")

    def serving(backend, limits=None, **running):
        running = {"device": "cpu", "engine": key_of(artifact, backend), **running}
        return checked(str(artifact), None, ServerConfig(port=free_port()), limits or Limits(), running)

    by_default, ranged = serving("onnx"), serving("inductor")
    assert str(by_default.served.profile) == "1..4x64x64"  # what export builds unless told otherwise
    assert by_default.limits.batch == 4 and ranged.limits.batch == 2
    assert serving("inductor", Limits(max_batch=1)).limits.batch == 1
    with pytest.raises(InputError, match=r"--max-batch 3: the engine draws at most 2 .* --shapes 1\.\.3x64x64"):
        serving("inductor", Limits(max_batch=3))
    with pytest.raises(InputError, match="the pipeline is bfloat16, the engine float32"):
        serving("inductor", dtype="bfloat16")
    assert serving("inductor", dtype="bfloat16", fallback=True).served.profile is None
    for size, refused in (("128x64", False), ("192x64", True)):
        body = json.dumps({"prompt": "a", "size": size}).encode()
        try:
            job = read_request(body, ranged.served, replace(ranged.limits, max_pixels=None))
            assert not refused and job.key.width == 128
        except Refusal as error:
            assert refused and "size must be 64x64 to 128x128 here" in str(error)


def test_an_onnx_graph_says_what_it_takes_and_nothing_of_the_machine_that_built_it(artifact):
    import onnx

    key = key_of(artifact, "onnx")
    file = artifact / "engines" / key / "whole-0.onnx"
    graph, (region,) = onnx.load(file, load_external_data=False), read_engine(file.parent).regions
    content = file.read_bytes()
    assert not any(word in content for word in (b"site-packages", b".py", b"stack_trace", os.getcwd().encode()))
    assert [one.name for one in graph.graph.input] == region.input_names
    assert [one.name for one in graph.graph.output] == region.output_names == ["output_sample"]
    told = {one.key.partition(".")[2]: one.value for one in graph.metadata_props}
    inputs = json.loads(told["inputs"])
    assert [one["name"] for one in inputs] == region.input_names[: len(inputs)]
    assert [one["shape"] for one in inputs] == [one.shape for one in region.inputs]
    assert json.loads(told["hyperparameters"]) == region.values and set(region.values["pladis_scale"]) == {2.0}
    assert [f"{name}.pladis_scale" for name in json.loads(told["modules"])] == region.hyperparameters["pladis_scale"]


def test_one_package_runs_a_range_of_sizes_with_and_without_guidance(artifact):
    eager, compiled = load(artifact), load(artifact, engine="auto")
    assert attachment(compiled.unet).engine.options["regional"]
    for other in ({"height": 128, "width": 64}, {"guidance_scale": 1.0}):
        assert_same_image(image(compiled, **other), image(eager, **other))


def test_a_size_outside_the_profile_is_refused_before_the_first_step(artifact):
    compiled = load(artifact, engine="auto")
    steps = []
    with pytest.raises(InputError, match="not built for this call: sample is .*Build one that is"):
        draw(compiled, JOBS, {**SAMPLING, "height": 192, "width": 64}, lambda: steps.append(1))
    assert not steps


def test_a_lora_is_refused_as_layers_and_followed_when_fused(artifact):
    from peft import LoraConfig

    eager, compiled = load(artifact), load(artifact, engine="auto")
    plain = image(eager)
    for pipeline in (eager, compiled):
        torch.manual_seed(0)
        pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with pytest.raises(InputError, match=r"layers of its own.*fuse_lora"):
        image(compiled)
    for pipeline in (eager, compiled):
        pipeline.fuse_lora()
    assert_same_image(image(compiled), image(eager))
    assert (image(eager) - plain).abs().max() > 2
    by_onnx = load(artifact, engine=key_of(artifact, "onnx"))
    by_onnx.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(InputError, match="holds weights of its own"):
        image(by_onnx)


def test_loras_that_batches_choose_reach_an_engine_without_weights_and_are_refused_by_others(artifact, tmp_path):
    from safetensors.torch import save_file

    from surgery.errors import UnsupportedModelError
    from surgery.runtime.loras import Loras, lora_source

    eager, compiled = load(artifact), load(artifact, engine="auto")
    state, generator = {}, torch.Generator().manual_seed(0)
    for path, module in eager.unet.named_modules():
        if path.endswith(("to_q", "to_v")):
            out, into = module.weight.shape
            state[f"unet.{path}.lora_A.weight"] = torch.randn(4, into, generator=generator) * 0.5
            state[f"unet.{path}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * 0.5
    save_file(state, tmp_path / "lora.safetensors")
    sources = [lora_source(f"a={tmp_path}/lora.safetensors")]
    plain, loras = image(compiled), [Loras(pipeline, sources) for pipeline in (eager, compiled)]
    for one in loras:
        one.wear((("a", 1.0),))
    assert_same_image(image(compiled), image(eager))
    assert (image(eager) - plain).abs().max() > 2
    loras[1].wear(())
    assert torch.equal(image(compiled), plain)
    with pytest.raises(UnsupportedModelError, match="holds weights of its own.*--weights artifact"):
        Loras(load(artifact, engine=key_of(artifact, "onnx")), sources)


def test_unpatch_takes_the_engine_away(artifact):
    eager, compiled = load(artifact), load(artifact, engine="auto")
    for pipeline in (eager, compiled):
        surgery.unpatch(pipeline)
    assert attachment(compiled.unet) is None and "forward" not in compiled.unet.__dict__
    assert torch.equal(image(compiled), image(eager))


def test_what_an_engine_does_not_compute_is_refused(artifact):
    compiled = load(artifact, engine="auto")
    compiled.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(InputError, match="FreeU"):
        image(compiled)
    compiled.disable_freeu()
    compiled.to(torch.float64)
    with pytest.raises(InputError, match="is float64, not float32"):
        image(compiled)


def test_every_engine_that_does_not_fit_says_why(artifact):
    with pytest.raises(InputError, match="none of the artifact's engines fits") as caught:
        load(artifact, engine="auto", dtype=torch.bfloat16)
    for backend in ("inductor", "onnx"):
        assert f"{key_of(artifact, backend)}: the pipeline is bfloat16, the engine float32" in str(caught.value)
    path = artifact / "engines" / key_of(artifact, "inductor") / "engine.json"
    engine = json.loads(path.read_text())
    engine["built_on"] |= {"device": "cuda", "architecture": "sm_90", "torch": "2.12.1", "cuda": "13.0"}
    path.write_text(json.dumps(engine))
    with pytest.raises(InputError) as caught:
        load(artifact, engine=path.parent.name)
    assert "it is for cuda, the pipeline is on cpu; torch 2.13, engine 2.12" in str(caught.value)
    with pytest.raises(InputError, match="no engine 'unet-nothing'"):
        load(artifact, engine="unet-nothing")
    with pytest.warns(UserWarning, match="so the pipeline runs eagerly"):
        pipeline = load(artifact, engine="auto", fallback=True, dtype=torch.bfloat16)
    assert attachment(pipeline.unet) is None


def test_altered_or_unlisted_engines_are_not_run(artifact, tmp_path):
    key = key_of(artifact, "inductor")
    package = next((artifact / "engines" / key).glob("*.pt2"))
    data = package.read_bytes()
    package.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"is not the file that surgery.json lists"):
        load(artifact, engine=key)
    package.write_bytes(data)
    smuggled = shutil.copytree(artifact / "engines" / key, artifact / "engines" / "smuggled")
    with pytest.raises(InputError, match="copied or renamed"):
        load(artifact, engine="smuggled")
    record = json.loads((smuggled / "engine.json").read_text())
    (smuggled / "engine.json").write_text(json.dumps({**record, "key": "smuggled"}))
    with pytest.raises(ArtifactError, match=r"does not list engines/smuggled"):
        load(artifact, engine="smuggled")
    surgery_json = json.loads((artifact / "surgery.json").read_text())
    assert f"engines/{key}/engine.json" in surgery_json["files"]


def test_the_same_engine_is_not_built_twice_and_a_broken_one_is(artifact, monkeypatch):
    engine, place, is_new = build_engine(artifact, REGIONAL)
    assert not is_new and place.name == engine.key
    (place / "block-0.pt2").write_bytes(b"broken")
    calls = []
    monkeypatch.setattr("surgery.export.engines.inductor.build", lambda *arguments: calls.append(1) or stop())

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(artifact, REGIONAL)
    assert calls


def test_a_build_that_was_cut_short_goes_on_from_what_is_compiled(built, tmp_path, monkeypatch):
    artifact = shutil.copytree(built, tmp_path / "artifact")
    key = key_of(artifact, "inductor")
    shutil.rmtree(artifact / "engines" / key)

    def already_compiled(module, method, calls, path, options):
        shutil.copy(built / "engines" / key / path.name, path)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("surgery.export.engines.inductor.build", already_compiled)
    monkeypatch.setattr("surgery.export.engines.build.compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_engine(artifact, REGIONAL)
    assert (artifact / "engines" / f".building-{key}" / "block-0.pt2").exists()
    monkeypatch.undo()
    monkeypatch.setattr("surgery.export.engines.inductor.build", interrupted)  # it must not be called
    said = []
    engine, place, is_new = build_engine(artifact, REGIONAL, said.append)
    assert is_new and any("there from before" in line for line in said)
    assert not (artifact / "engines" / f".building-{key}").exists()
    assert engine == Engine.model_validate(json.loads((place / "engine.json").read_text()))


def test_an_engine_that_differs_from_eager_is_not_kept(built, tmp_path, monkeypatch):
    artifact = write_artifact(tmp_path, tmp_path / "artifact")
    key = key_of(built, "inductor")
    monkeypatch.setattr(
        "surgery.export.engines.inductor.build",
        lambda module, method, calls, path, options: shutil.copy(built / "engines" / key / path.name, path) and None,
    )
    monkeypatch.setitem(TOLERANCES, "float32", 1e-12)
    with pytest.raises(SurgeryError, match=r"differs from eager by .* not kept"):
        build_engine(artifact, REGIONAL)
    assert not list((artifact / "engines").iterdir())


def test_bad_requests_are_refused_before_anything_is_built(artifact, run):
    for arguments, message in (
        (["--shapes", "1x100x64"], "height must be a multiple of 8"),
        (["--shapes", "1024"], "cannot be read; write IMAGESxHEIGHTxWIDTH"),
        (["--component", "unknown"], "the pipeline has no unknown; it has"),
        (["--component", "vae", "--regional"], "--regional is for the denoiser"),
        (["--dtype", "fp8"], "'fp8' is none of float32"),
        (["--max-autotune", "--device", "cpu"], "add --weights engine"),
    ):
        done = run("export", artifact, "--target", "inductor", *arguments, check=2)
        assert message in done.stderr
    done = run("export", artifact, "--target", "onnx", "--dtype", "bf16", "--device", "cpu", check=2)
    assert "has no bfloat16 on a CPU; give --dtype fp32 or fp16" in done.stderr
    assert "there is no folder" in run("export", artifact / "no", "--target", "onnx", check=2).stderr
    done = run("export", artifact, "--target", "tensorrt", "--device", "cpu", check=2)
    assert "is not installed: pip install" in done.stderr or "NVIDIA GPU" in done.stderr


def test_generate_with_an_engine(artifact, run, tmp_path):
    done = run("generate", artifact, "a cat", "--images", "1", "--engine", "auto", "--out", tmp_path / "x.png", check=0)
    assert "unet runs the engine" in done.stderr and (tmp_path / "x.png").exists()
    assert "built already" not in done.stderr
    again = run("export", artifact, "--target", "onnx", "--device", "cpu", "--json", check=0)
    assert json.loads(again.stdout)["engines"][0]["built"] is False
    assert ONNX.target == json.loads(again.stdout)["engines"][0]["backend"]


@pytest.mark.slow
def test_engines_on_the_hub_are_fetched_and_run_only_where_they_are_trusted(artifact, run, tmp_path):
    code = (
        "import surgery\n"
        "try:\n"
        "    surgery.load('me/engines', engine='auto')\n"
        "except surgery.errors.InputError as error:\n"
        "    print(error)\n"
        "print('then')\n"
        "surgery.load('me/engines', engine='auto', trust_engines=True)\n"
    )
    with hub_server() as server:
        server.repositories["me/engines"] = artifact
        done = run(python=code, env=environment(server, tmp_path / "home"), check=0)
        refused, _ = done.stdout.split("then")
        assert "trust_engines=True" in refused and "unet runs the engine" in done.stderr
        inductor, onnx = (f"engines/{key_of(artifact, backend)}" for backend in ("inductor", "onnx"))
        fetched = [path for path in server.fetched() if path.startswith("engines/")]
        assert fetched.index(f"{onnx}/engine.json") < fetched.index(f"{inductor}/block-0.pt2")
        assert set(fetched) == {f"{inductor}/engine.json", f"{onnx}/engine.json", f"{inductor}/block-0.pt2"}


def test_whole_engines_of_this_artifact_are_published_and_on_the_card(artifact):
    from surgery.export.publish.content import make_content, read_draft

    leftover = artifact / "engines/.building-unet-inductor-x"
    leftover.mkdir()
    (leftover / "block-0.pt2").write_bytes(b"half")
    content = make_content(read_draft(artifact), "me/engines", "copy", None)
    sent = {path for path in content.items if path.startswith("engines/")}
    keys = [key_of(artifact, backend) for backend in ("inductor", "onnx")]
    assert sent == {path for path in content.manifest.files if path.startswith("engines/")}
    assert {path.split("/")[1] for path in sent} == set(keys)
    card = content.items["README.md"].data.decode()
    assert "| unet | inductor | cpu x86_64" in card and "| float32 | 1..2x64..128x64..128 |" in card
    assert 'surgery.load("me/engines", engine="auto", trust_engines=True)' in card
    path = artifact / "engines" / keys[0] / "engine.json"
    path.write_text(path.read_text().replace(read_manifest(artifact).hash, "0" * 64))
    with pytest.raises(ArtifactError, match=r"is not the|was built of another artifact \(000000000000"):
        read_draft(artifact)


def test_a_schedule_is_carried_out_on_an_engine(artifact):
    eager, compiled = load(artifact), load(artifact, engine="auto")
    constant = image(eager)
    for pipeline in (eager, compiled):
        for module in patched_modules(pipeline.unet).values():
            module.pladis_schedule = {"scale": [-40.0, 40.0]}
    assert_same_image(image(compiled), image(eager))
    assert (image(eager) - constant).abs().max() > 2


def test_how_many_images_at_once_is_for_the_call_to_say(artifact):
    profile = parse_profile("2x64x64")
    assert profile.problem(None, 64, 64) is None and "images 1 is outside" in profile.problem(1, 64, 64)
    hash_, components = read_manifest(artifact).hash, {"unet": load(artifact).unet}
    for images, says in ((None, None), (9, "images 9 is outside")):
        found = candidates(artifact, hash_, components, (images, 64, 64))
        reasons = next(one for one in found if "inductor" in one.key).reasons
        assert reasons == () if says is None else says in reasons[0]


@pytest.mark.slow
def test_an_inductor_engine_with_weights_of_its_own_follows_tune_and_nothing_else(built, tmp_path):
    artifact = tmp_path / "artifact"
    write_artifact(built.parent, artifact)
    wanted = Wanted(target="inductor", weights="engine", profile=parse_profile("1..2x64x64"), device="cpu")
    engine, _, is_new = build_engine(artifact, wanted)
    assert is_new and engine.weights == "engine" and engine.difference.after_change < 1e-4
    assert set(engine.regions[0].hyperparameters) >= {"pladis_alpha", "pladis_scale"}
    eager, held = surgery.load(artifact, quiet=True), surgery.load(artifact, engine=engine.key, quiet=True)
    before = image(held)
    assert_same_image(before, image(eager))
    for pipeline in (eager, held):
        surgery.tune(pipeline, scale=-6.0, alpha=1.2)
    after = image(held)
    assert_same_image(after, image(eager))
    assert (after - before).abs().max() > 2
    with torch.no_grad():
        held.unet.conv_in.weight.zero_()
    assert_same_image(image(held), after)


def test_where_the_number_of_images_is_fixed_the_default_is_an_engine_for_one(artifact, monkeypatch):
    made = []

    def build(module, method, calls, path, options):
        path.write_bytes(b"")

    def changing(module, calls):
        made.append(sorted(calls))
        if calls["usual"].tensors["sample"].shape[0] > 2:  # of one image and its unguided twin
            raise ChangingConstants("it is told by a number")

    none = Difference(largest=0, mean=0, relative=0, tolerance=1, after_change=None, calls=1)
    monkeypatch.setattr("surgery.export.engines.inductor.build", build)
    monkeypatch.setattr("surgery.export.engines.build.refuse_changing_constants", changing)
    monkeypatch.setattr("surgery.export.engines.build.compare", lambda *arguments: none)
    said = []
    engine, _, _ = build_engine(artifact, Wanted(target="inductor", device="cpu"), said.append)
    assert str(engine.profile) == "1x64x64" and len(made) == 2
    assert any("serve it by --max-batch 1" in line for line in said)
    with pytest.raises(InputError, match="told by a number"):
        build_engine(artifact, Wanted(target="inductor", profile=parse_profile("1..4x64x64"), device="cpu"))
