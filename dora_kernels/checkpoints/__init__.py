"""A model's folder without the model: its tensors by key, an adapter merged into them, shard by shard."""
