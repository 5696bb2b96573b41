"""The size of the images that a pipeline draws unless it is told otherwise, read from its configs."""


def native_resolution(denoiser_config, vae_config):
    """The side, in pixels, of the square images that a pipeline draws unasked; None where its configs do not tell."""
    sample_size, blocks = denoiser_config.get("sample_size"), vae_config.get("block_out_channels")
    if not isinstance(sample_size, int) or not blocks:
        return None
    return sample_size * 2 ** (len(blocks) - 1)  # the VAE halves the side between every two of its blocks
