"""A model's folder without the model: read its tensors by key, and merge an adapter into them, shard by shard."""
