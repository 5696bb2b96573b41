"""What benchmarks/reliability.py counts: by section, (what was tried, what happens, tests: file or file::test)."""

_MUTATED = "tests/artifact/test_mutations.py::"

SECTIONS = {
    "Files": [
        (
            "manifests with values replaced, removed, added or swapped, signed anew",
            "the card, `verify` and `load` end in an error of ours, or give a result",
            [f"{_MUTATED}test_manifests"],
        ),
        (
            "an artifact's configs, indexes and tokenizers, by value and by byte, signed anew",
            "`verify` and `load` end in an error of ours, or give a result",
            [f"{_MUTATED}test_configs_indexes_and_tokenizers"],
        ),
        (
            "an artifact's safetensors by byte, signed anew",
            "`verify` and `load` end in an error of ours, or give a result",
            [f"{_MUTATED}test_weights"],
        ),
        (
            "recipes by value and by byte",
            "a plan, or an error of ours",
            [f"{_MUTATED}test_recipes"],
        ),
        (
            "configs of a base",
            "a plan, or an error of ours",
            [f"{_MUTATED}test_bases", f"{_MUTATED}test_a_base_whose_index_names_no_scheduler"],
        ),
        (
            "pickled weights by byte, in both layouts",
            "the tensors, or an error of ours; none of it is run",
            [f"{_MUTATED}test_pickles"],
        ),
        (
            "scores.json and engine.json",
            "read, or an error of ours",
            [f"{_MUTATED}test_scores", f"{_MUTATED}test_engines"],
        ),
        (
            "devices and pipes in a file's place, JSON and YAML of thousands of brackets, images of too many pixels, "
            "names that no file can have",
            "refused at once by an error that names the file",
            ["tests/hub/test_bounded.py"],
        ),
        (
            "artifacts that were cut, edited or forged, foreign code in them, and whole ones",
            "refused by an error that names the file and the next step, or found by `verify`; foreign code is not run; "
            "whole ones are loaded and verified",
            ["tests/runtime/test_loading.py", "tests/publish/test_verify.py", "tests/artifact/test_weights.py"],
        ),
        (
            "files that surgery.json does not list, beside it and in the cache",
            "they take no effect, `verify` names those that diffusers would read, and `--force` leaves them there",
            ["tests/publish/test_unlisted.py"],
        ),
        (
            "recipes with wrong keys, types, numbers and names",
            "every problem at once, each with its line and the nearest valid spelling",
            ["tests/recipe/test_recipe.py"],
        ),
    ],
    "Repositories and the network": [
        (
            "a request of a push or a load fails: answers 429 and 5xx, connections cut or reset, answers lost, bytes "
            "flipped; or the process is killed at it",
            "finished by itself, or an error and the next run finishes; nothing is half-written or sent twice",
            ["tests/publish/test_faults.py"],
        ),
        (
            "repositories that mean harm, and two who push at once",
            "refused by an error that names the file; no file of the user's is deleted or published, no code is run",
            ["tests/publish/test_hostile.py"],
        ),
        (
            "what must not be published: altered files, scores and pictures of another artifact, licences, tokens",
            "refused with the reason before anything is sent",
            ["tests/publish/test_refusals.py"],
        ),
        (
            "bases on a Hub that is gated, gone, offline, failing or sends damaged files",
            "an error that says what to do, nothing is written, and a second run finishes",
            ["tests/hub/test_hub.py"],
        ),
    ],
    "The server": [
        (
            "what a web page can have a browser send, and requests that never end",
            "refused with 400, 403, 408 or 415 before anything is drawn, and counted; no redirect is "
            "built from what they say",
            ["tests/serve/test_guard.py"],
        ),
        (
            "wrong requests: fields, types, ranges, sizes, seeds",
            "refused with 400, the field and the reason; another model's name with 404",
            ["tests/serve/test_request.py"],
        ),
        (
            "a full queue, clients that leave, timeouts, draining, wrong paths, long bodies, failures in drawing",
            "refused with 404, 405, 413, 429 or 503; what was accepted is answered, with 500, 504 or 507 "
            "where it fails",
            ["tests/serve/test_gateway.py"],
        ),
        (
            "replicas that hang, run out of memory, fail on one image or do not start",
            "the other images and batches are drawn; the error says why",
            ["tests/serve/test_replica.py", "tests/serve/test_runner.py"],
        ),
    ],
    "Beside other libraries": [
        (
            "hooks of diffusers and accelerate that offload or cache, before and after a patch",
            "the right result, or refused where the hook would lose what is written",
            ["tests/models/test_patch_hooks.py"],
        ),
        (
            "LoRA, IP-Adapter, FreeU, ControlNet, quantised layers, torch.compile, slicing, other guidance",
            "the right result in either order",
            ["tests/models/test_patch_survives.py"],
        ),
        (
            "IP-Adapters of UNets and FLUX, several of them, with masks and scales",
            "what they add is what they add without a patch",
            ["tests/nn/backbones/test_ip_adapters.py"],
        ),
        (
            "what knows a model by its class: `from_pipe`, saved indexes, peft, EMA, processors, copies",
            "it finds the stock class, or is refused with what to do",
            ["tests/models/test_patch_names.py"],
        ),
        (
            "guidance with compiled, shared, saved and failing pipelines",
            "the right result in any order; after an error the denoiser is back",
            ["tests/guidance/test_attaching.py"],
        ),
    ],
    "Numbers": [
        (
            "torch.autocast, eager, compiled and in training",
            "the stock model's behaviour; what is float32 stays float32",
            ["tests/nn/test_autocast.py"],
        ),
        (
            "infinite and NaN queries, keys, values and masks; masks of -inf and of the lowest float; rows "
            "without keys",
            "finite exactly where dense attention is",
            [
                "tests/nn/test_implementations.py::test_what_is_infinite_or_no_number_is_as_in_dense_attention",
                "tests/nn/test_implementations.py::test_every_kind_of_mask",
                "tests/nn/test_cpu_kernel.py::test_the_lowest_number_as_an_additive_mask_is_no_masked_key",
                "tests/nn/test_cpu_kernel.py::test_what_is_not_finite_is_as_in_the_reference",
                "tests/nn/test_cpu_kernel.py::test_no_queries_and_no_keys",
                "tests/nn/test_entmax.py::test_nan_is_not_hidden",
                "tests/nn/test_entmax.py::test_masked_keys_get_nothing_and_a_masked_row_gets_zeros",
            ],
        ),
        (
            "every operator, dtype and alpha, any number of keys, on flat and peaked scores",
            "the definition in float64, within the rounding of the dtype",
            [
                "tests/nn/test_implementations.py::test_every_operator_in_every_dtype",
                "tests/nn/test_implementations.py::test_every_alpha_for_flat_and_for_peaked_scores",
                "tests/nn/test_implementations.py::test_cpp_takes_any_number_of_keys_and_queries",
                "tests/nn/test_cpu_kernel.py::test_the_sparse_map_of_hard_rows",
                "tests/nn/test_cpu_kernel.py::test_the_sparse_map_of_any_clusters_of_near_equal_scores",
                "tests/nn/test_entmax.py::test_float32_stays_within_2e6_of_the_float64_oracle_for_any_alpha",
            ],
        ),
        (
            "schedules and guidance by noise level, on seven schedulers, over whole runs and parts of one",
            "they act on the calls that the training's formula says",
            ["tests/runtime/test_noise_levels.py"],
        ),
    ],
}
