"""Data: conversations and images into shards (preparation), shards into packed micro-batches (training)."""
