"""Interchangeable transformers behind one contract: embeddings, modality ids and a mask in, hidden states out."""
