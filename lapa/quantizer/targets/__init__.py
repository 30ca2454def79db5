"""What a latent action must explain: targets and conditioning, trained with a quantizer and not saved with it."""
