"""Tiny Qwen-VL repositories in the files that real ones come in, made from configs, with random weights."""

import json

import torch

# As Qwen's, but for what a user's message of one image and one text does not need.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
HEAD_DIM_SECTIONS = [2, 1, 1]  # of rotary frequencies for frames, rows and columns


def write_tokenizer(folder):
    """A byte-level tokenizer with Qwen's special tokens, and words of their own for "Yes", "No" and numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: at for at, letter in enumerate(alphabet)}
    merges = []
    for word in ("Yes", "yes", "No", "no", "two", "Two"):
        for start in (word, f"Ġ{word}"):
            built = start[0]
            for letter in start[1:]:
                merges.append((built, letter))
                built += letter
                vocabulary.setdefault(built, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    made.save_pretrained(folder)
    return made


def write_reader(folder, token_ids):
    """preprocessor_config.json and chat_template.json, as Qwen's repositories have them."""
    config = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 400},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def write_judge(folder, seed=0):
    """A Qwen3-VL repository; returns the model."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    write_reader(folder, ids)
    config = Qwen3VLConfig(
        text_config={
            **TEXT,
            "head_dim": 8,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": HEAD_DIM_SECTIONS},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 14,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def write_hps_v3(folder, seed=0):
    """{"weights", "reader", "instruction"}: HPSv3's checkpoint by the names it was published with, and what goes along.

    Returns (files, Qwen2VLModel, the head).
    """
    import zipfile

    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig, Qwen2VLModel

    reader, weights = folder / "reader", folder / "weights"
    reader.mkdir(parents=True)
    weights.mkdir()
    tokenizer = write_tokenizer(reader)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    write_reader(reader, ids)
    text = {
        **TEXT,
        "vocab_size": len(tokenizer) + 40,  # more rows than tokens, as Qwen's; HPSv3 cuts them
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": HEAD_DIM_SECTIONS},
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    config.save_pretrained(reader)
    config.text_config.vocab_size = len(tokenizer) + 1
    torch.manual_seed(seed)
    model = Qwen2VLModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    layers = torch.nn.Linear(32, 1024), torch.nn.ReLU(), torch.nn.Dropout(0.05), torch.nn.Linear(1024, 16)
    head = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(16, 2)).eval()
    old = {
        name if name.startswith("visual.") else name.replace("language_model.", "model.", 1): tensor
        for name, tensor in model.state_dict().items()
    }
    old |= {f"rm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    old["lm_head.weight"] = torch.zeros(len(tokenizer) + 1, 32)
    save_file({name: tensor.contiguous().clone() for name, tensor in old.items()}, weights / "HPSv3.safetensors")
    wheel = folder / "hpsv3.whl"
    source = (
        "import nothing_there\n"
        'INSTRUCTION = """\nRate it.\nPrompt - {text_prompt}\n\n"""\n'
        'prompt_with_special_token = """\nHow good: <|Reward|>\n\nEND\n"""\n'
    )
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr("hpsv3/dataset/data_collator_qwen.py", source)
    return {"weights": weights, "reader": reader, "instruction": wheel}, model, head
