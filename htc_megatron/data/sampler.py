"""Which packed rows make up which global batch: a pure function of (seed, epoch, batches consumed), whatever the layout."""

from collections.abc import Sequence

from htc_megatron.config import ConfigError
from htc_megatron.data.packing import Packing, check_lengths, pack


class GlobalBatchSampler:
    """Endless global batches over the epochs. Its whole state is `consumed_batches`, one integer.

    What is left of an epoch's rows behind its last whole global batch is dropped; the next epoch packs anew.

    lengths: expanded tokens of each sample. consumed_batches: global batches taken so far, over all epochs.
    Raises ConfigError where a sample is too long or an epoch holds no whole global batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seq_length: int,
        global_batch_size: int,
        seed: int,
        shuffle: bool,
        source: str,
        consumed_batches: int = 0,
    ):
        check_lengths(lengths, seq_length, source)
        self.lengths, self.seq_length, self.global_batch_size = lengths, seq_length, global_batch_size
        self.seed, self.shuffle, self.source = seed, shuffle, source
        self.epoch = -1
        self._first = self._end = 0  # the epoch's global batches: first, and one behind the last
        self.packing = Packing([], 0.0)
        self.consumed_batches = consumed_batches
        self._reach(consumed_batches)

    def next_batch(self) -> tuple[int, list[list[int]]]:
        """(epoch, the next global_batch_size rows), each row a list of sample indices."""
        self._reach(self.consumed_batches)
        begin = (self.consumed_batches - self._first) * self.global_batch_size
        self.consumed_batches += 1
        return self.epoch, self.packing.rows[begin : begin + self.global_batch_size]

    def _reach(self, batch: int) -> None:
        while batch >= self._end:
            self.epoch += 1
            self.packing = pack(self.lengths, self.seq_length, self.seed, self.epoch, self.shuffle)
            whole = len(self.packing.rows) // self.global_batch_size
            if not whole and not self.epoch:  # a later epoch that packs a row tighter is passed over
                raise ConfigError(
                    f"training.global_batch_size is {self.global_batch_size}, but {self.source} packs into {len(self.packing.rows)} rows "
                    f"of {self.seq_length} tokens: use a smaller batch, shorter rows or more data"
                )
            self._first, self._end = self._end, self._end + whole


def rank_rows(batch: list[list[int]], micro_batch_size: int, dp_rank: int, dp_size: int) -> list[list[list[int]]]:
    """A data-parallel rank's micro-batches of a global batch: micro-batch i of all ranks together is one stretch of the batch."""
    stride = micro_batch_size * dp_size
    if len(batch) % stride:
        raise ValueError(f"a global batch of {len(batch)} rows does not divide into micro-batches of {micro_batch_size} on {dp_size} ranks")
    return [batch[i + dp_rank * micro_batch_size :][:micro_batch_size] for i in range(0, len(batch), stride)]
