"""Adapters in a model: which layers are adapted, exchanged, merged, and how strongly they work."""
