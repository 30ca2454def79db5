"""Image and instruction to latent actions: tokens, heads, model, and the stage that pretrains it."""
