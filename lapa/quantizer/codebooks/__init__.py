"""Codebooks behind one interface (`base.py`), one file a family."""
