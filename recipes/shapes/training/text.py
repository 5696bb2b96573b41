"""The text encoder, and its schooling: before it guides any drawing, it learns to keep what a caption says.

The part of CLIP's training that matters here. From the states at the end of the text and at a padding token after it,
linear heads read the number, the relation, each object's colour and shape, and what is where; they are thrown away.
"""

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from surgery.recipes.shapes.scenes.vocabulary import COLOURS, SHAPES
from surgery.recipes.shapes.training.loop import train
from surgery.recipes.shapes.training.scenes import caption_of, facts_of
from surgery.recipes.shapes.training.tokenizer import LENGTH

WIDTH = 128
_CLASSES = (4, 5, *(len(COLOURS) + 1, len(SHAPES) + 1) * 7)  # of each number of facts_of


def new_text_encoder(tokenizer, seed):
    """0.7 M parameters, a CLIP text encoder of three layers."""
    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=WIDTH,
        )
    )


class Heads(torch.nn.Module):
    """Logits of every fact from a state: (n, WIDTH) -> one (n, classes) for each number of `facts_of`."""

    def __init__(self):
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, classes) for classes in _CLASSES)

    def forward(self, states):
        return [head(states) for head in self.heads]


def tokens_of(tokenizer, texts):
    """(n, 77) int64, padded."""
    return tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def train_text_encoder(workers, scenes, tokenizer, training, folder):
    """Train one and write it to `folder`/text_encoder."""
    encoder = new_text_encoder(tokenizer, training.seed).to(workers.device)
    heads = Heads().to(workers.device)

    def loss_of(random, generator, count):
        texts = [caption_of(scenes.all[i], random) for i in random.integers(scenes.count, size=count)]
        facts = torch.from_numpy(np.stack([facts_of(text) for text in texts])).to(workers.device)
        tokens = tokens_of(tokenizer, texts)
        ends = (tokens == tokenizer.eos_token_id).int().argmax(1)
        later = ends + torch.from_numpy(random.integers(1, LENGTH - ends.numpy()))
        states = encoder(tokens.to(workers.device)).last_hidden_state
        rows = torch.arange(count, device=workers.device)
        loss, right = 0.0, 0.0
        for places in (ends, later):
            guesses = heads(states[rows, places.to(workers.device)])
            loss = loss + sum(torch.nn.functional.cross_entropy(guess, facts[:, i]) for i, guess in enumerate(guesses))
            told = torch.stack([guess.argmax(1) for guess in guesses], 1)
            right += (told == facts).all(1).float().mean().item() / 2
        return loss, {"all right": right}

    seconds = train("text", [*encoder.parameters(), *heads.parameters()], loss_of, training, workers, folder)
    if workers.is_first:
        encoder.save_pretrained(folder / "text_encoder")
    return seconds
