"""Adapters in a model: choose the adapted layers, replace them, merge them, and set their strength."""
