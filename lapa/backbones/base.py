"""The backbone contract: embeddings, modality ids and a mask in, hidden states out.

A backbone is a module with `forward(tokens_BSD, modality_ids_BS, attention_mask_BSS) -> hidden_BSD`:

    tokens_BSD          embeddings with positions already added, float
    modality_ids_BS     one of the constants below a token, int64; a dense model ignores them
    attention_mask_BSS  bool, True where the token of the second axis may look at the token of the third;
                        every token sees at least one

Shapes: B batch, S sequence, D width.
"""

from importlib import import_module

from torch import nn

from lapa import schema

TEXT, IMAGE, LATENT_ACTION, PROPRIOCEPTION, ROBOT_ACTION = range(5)
NUM_MODALITIES = 5

# The name in the configuration, the module that holds the model, and its class.
BACKBONES: dict[str, tuple[str, str]] = {
    "dense": ("lapa.backbones.dense", "DenseTransformer"),
}


def build_backbone(config: schema.Backbone) -> nn.Module:
    """The backbone that `config.name` names, with random weights; ValueError for a name we do not know."""
    if config.name not in BACKBONES:
        raise ValueError(f"unknown backbone {config.name!r}: known are {sorted(BACKBONES)}")
    module, class_name = BACKBONES[config.name]
    return getattr(import_module(module), class_name)(config)
