"""Latent actions: the quantizer (LAQ of arXiv 2410.11758), its training, its gate and its labels."""
