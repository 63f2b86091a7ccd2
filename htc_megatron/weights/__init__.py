"""Which weights a model has, how tensor parallelism cuts them, and what Hugging Face calls them."""

from htc_megatron.weights.table import Partition, Rule, Weight, padded_vocab_size, partition, weights

__all__ = ["Partition", "Rule", "Weight", "padded_vocab_size", "partition", "weights"]
