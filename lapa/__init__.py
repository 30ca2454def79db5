"""The learning core: latent actions from video, and the latent vision-language-action model."""

__version__ = "0.1.0"
