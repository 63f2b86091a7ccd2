"""Samples that cannot be used: trained on by no rank, counted, and named in <output_dir>/quarantine.jsonl."""

import json
from pathlib import Path

import torch.distributed as dist

from htc_megatron.config import RunConfig
from htc_megatron.model.layout import MicroBatch
from htc_megatron.parallel.groups import Groups
from htc_megatron.training.life import TrainingError

FILE = "quarantine.jsonl"


class Quarantine:
    """The ranks that decode images tell the others which samples are broken, and all of them take the loss off these.

    A sample without a supervised token changes no gradient: samples of a row do not see each other, and the mean is over the global
    batch's supervised tokens. samples: of the data set, which data.max_bad_share is a share of.
    """

    def __init__(self, config: RunConfig, groups: Groups, samples: int):
        self.share, self.groups, self.samples = config.data.max_bad_share, groups, samples
        self.path = Path(config.output_dir) / FILE
        self.known: set[str] = set()
        if groups.rank == 0 and self.path.exists():
            self.known = {json.loads(line)["why"] for line in self.path.read_text().splitlines()}

    def clear(self, step: int, batches: list[MicroBatch]) -> int:
        """Take the loss off every broken sample of a step's micro-batches, in place. Returns how many samples have been found since the
        run began. Called by every rank where any has one. Raises TrainingError, on all alike, where they are more than the share."""
        place = self.groups.dp_rank
        mine = [(place, number, sample, why) for number, batch in enumerate(batches) for sample, why in batch.broken]
        everywhere: list[list] = [[] for _ in range(self.groups.world_size)]
        dist.all_gather_object(everywhere, mine, group=self.groups.checkpoint)
        found = sorted({tuple(one) for ours in everywhere for one in ours})
        for dp_rank, number, sample, _ in found:
            if dp_rank == place:
                row, start, stop = batches[number].layout.samples[sample].tolist()
                batches[number].labels[row, start:stop] = -100
        total = [0]
        if self.groups.rank == 0:
            self._write(step, [why for *_, why in found])
            total = [len(self.known)]
        dist.broadcast_object_list(total, src=0, group=self.groups.checkpoint)
        if total[0] > self.share * self.samples:
            raise TrainingError(
                f"step {step}: {total[0]} of {self.samples} samples are broken, data.max_bad_share is {self.share:g}; the last: "
                f"{found[-1][-1]}; all of them are in {self.path}"
            )
        return total[0]

    def _write(self, step: int, reasons: list[str]) -> None:
        new = [why for why in dict.fromkeys(reasons) if why not in self.known]
        self.known.update(new)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.writelines(json.dumps({"step": step, "why": why}) + "\n" for why in new)
