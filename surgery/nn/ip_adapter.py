"""What an IP-Adapter adds to a cross-attention: dense attention from the same queries to the image tokens.

The image tokens come beside the text as `(text, [tokens of each adapter])`, and their projections live in the module's
processor (`to_k_ip`, `to_v_ip`, `scale`), where diffusers' loader puts them. PLADIS is defined on text keys, so these
branches stay dense.
"""

import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor


def split_image_tokens(processor, encoder_hidden_states):
    """(text, image tokens of each adapter, (batch, images, tokens, dim)); the list is empty without adapter."""
    if isinstance(encoder_hidden_states, tuple):
        return encoder_hidden_states[0], list(encoder_hidden_states[1])
    if not hasattr(processor, "to_k_ip") or encoder_hidden_states is None:
        return encoder_hidden_states, []
    # diffusers' older calling convention: the image tokens are the last keys of one tensor.
    text_keys = encoder_hidden_states.shape[1] - processor.num_tokens[0]
    return encoder_hidden_states[:, :text_keys], [encoder_hidden_states[:, text_keys:]]


def image_attention(processor, query, image_tokens, masks=None):
    """The sum over adapters of `scale * attention(query, image keys)`, shaped as `query`: (batch, heads, queries, dim).

    masks: None, or for each adapter None or (1, images, height, width), as `cross_attention_kwargs["ip_adapter_masks"]`
    brings them. Raises ValueError where masks and adapters do not fit together.
    """
    scales = processor.scale
    if masks is None:
        masks = [None] * len(scales)
    elif not isinstance(masks, list):
        masks = list(masks.unsqueeze(1))
    if not len(masks) == len(scales) == len(image_tokens):
        raise ValueError(
            f"{len(masks)} ip_adapter_masks, {len(scales)} adapter scales and {len(image_tokens)} image embeddings "
            "must be as many: give one of each for every loaded IP-Adapter"
        )
    total = 0.0
    for tokens, scale, mask, to_key, to_value in zip(
        image_tokens, scales, masks, processor.to_k_ip, processor.to_v_ip, strict=True
    ):
        if mask is not None:
            total = total + _masked_adapter(query, tokens, scale, mask, to_key, to_value)
        elif isinstance(scale, list) and any(scale):
            raise ValueError("an IP-Adapter with one scale per image needs ip_adapter_masks in cross_attention_kwargs")
        elif not isinstance(scale, list) and scale != 0:
            total = total + scale * _dense(query, to_key(tokens), to_value(tokens))
    return total


def _masked_adapter(query, tokens, scale, mask, to_key, to_value):
    images = mask.shape[1]
    scale = scale if isinstance(scale, list) else [scale] * images
    if mask.ndim != 4 or images != tokens.shape[1] or images != len(scale):
        raise ValueError(
            f"an ip_adapter_mask of shape {tuple(mask.shape)} does not fit {tokens.shape[1]} images and {len(scale)} "
            "scales: make it (1, images, height, width) with IPAdapterMaskProcessor.preprocess"
        )
    batch, heads, queries, head_dim = query.shape
    total = 0.0
    for index in range(images):
        image = tokens[:, index]
        output = _dense(query, to_key(image), to_value(image))
        region = IPAdapterMaskProcessor.downsample(mask[:, index], batch, queries, heads * head_dim)
        region = region.view(batch, queries, heads, head_dim).transpose(1, 2)
        total = total + scale[index] * output * region.to(dtype=query.dtype, device=query.device)
    return total


def _dense(query, key, value):
    batch, heads, _, head_dim = query.shape
    key = key.reshape(batch, -1, heads, head_dim).transpose(1, 2)
    value = value.reshape(batch, -1, heads, head_dim).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value)
