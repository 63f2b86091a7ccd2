"""A run from start, or from its last checkpoint, to its last step."""

import math
from pathlib import Path

import torch

from htc_megatron.checkpoint import Loaded, latest, load
from htc_megatron.checkpoint.folder import resolve, step_of
from htc_megatron.checkpoint.rng import set_rng_state
from htc_megatron.config import ConfigError, RunConfig
from htc_megatron.data.dataset import PreparedData
from htc_megatron.data.feature_cache import check_sums
from htc_megatron.data.loader import DataLoader, ValidationLoader, open_data
from htc_megatron.data.packing import PACKER
from htc_megatron.model.layout import MicroBatch
from htc_megatron.model.mgvq import load_codebook
from htc_megatron.model.stages import describe_stages
from htc_megatron.parallel import progress
from htc_megatron.parallel.groups import Groups
from htc_megatron.parallel.zero import sum_over
from htc_megatron.training.bad_steps import BadSteps
from htc_megatron.training.build import build_engine, checkpoint_state
from htc_megatron.training.flops import peak_flops, step_flops
from htc_megatron.training.life import Interrupt, Stopped, TrainingError
from htc_megatron.training.logger import Logger
from htc_megatron.training.meeting import Meeting
from htc_megatron.training.quarantine import Quarantine
from htc_megatron.training.saves import Saves, checkpoint_folder
from htc_megatron.training.schedule import learning_rate
from htc_megatron.training.step import StepResult, evaluate, train_step
from htc_megatron.training.tower_features import TowerFeatures
from htc_megatron.weights.table import ADAPTER, component

# What a checkpoint's `extra` calls the data that its step number is a place in, and the packer of the rows that steps are made of
DATA, PACKING = "data_fingerprint", "packer"
# where the run leaves out bad steps: what it knows of the last ones; and, after it went back, the global batches left out for it
BAD_STEPS, PASSED_OVER = "bad_steps", "batches_passed_over"
DATA_WAIT = 1.0  # seconds a rank waits for its data before the ranks ask each other whether to stop
MAY_BE_NEW = (ADAPTER, "voco")  # parts that a run may add to the weights it starts from


def _new_part(name: str) -> str:
    """The part that a weight belongs to, if it may be new."""
    part = component(name)
    return part if part in MAY_BE_NEW else ""


def check_files(config: RunConfig) -> None:
    """Refuse a run whose files do not fit, before any process group is made."""
    if not config.data.train:
        raise ConfigError("data.train is empty: name a folder written by tools/prepare_data.py")
    for path in filter(None, (config.data.train, config.data.validation)):
        data = open_data(config, path)
        if config.data.feature_cache:
            check_sums(data)
    if not config.data.validation and config.training.eval_interval:
        interval = config.training.eval_interval
        raise ConfigError(f"training.eval_interval is {interval}, but data.validation is empty: name prepared data or set 0")
    if config.model.has_mgvq:
        if not config.mgvq_checkpoint:
            channels = config.model.method.channels
            raise ConfigError(f"mgvq_checkpoint is empty, but channels {channels!r} needs MGVQ's codebook: name its file")
        load_codebook(config.mgvq_checkpoint, config.model.mgvq)
    if config.init_from:
        resolve(config.init_from)


def last_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that a run goes on from, if it does."""
    return latest(checkpoint_folder(config)) if config.resume == "auto" else None


def first_step(config: RunConfig) -> int:
    """The step that a run begins or goes on at, by the name of its last checkpoint."""
    found = last_checkpoint(config)
    return 0 if found is None else step_of(found)


def check_same_order(saved: RunConfig, config: RunConfig, source: Path) -> None:
    """Refuse to resume where the data's order would be another: the checkpoint's position in it, a step number, would mean nothing."""
    for section, name in (("training", "global_batch_size"), ("training", "seq_length"), ("data", "seed"), ("data", "shuffle")):
        seen, wanted = getattr(getattr(config, section), name), getattr(getattr(saved, section), name)
        if seen != wanted:
            raise ConfigError(
                f"{section}.{name}: got {seen}, wanted {wanted} as in {source}, whose place in the data it decides; to start anew from its "
                "weights, name it in init_from and set another output_dir"
            )


def check_same_data(loaded: Loaded, data: PreparedData) -> None:
    """Refuse to resume on other data, or on the same packed into other rows: the step number would be another place."""
    anew = "to start anew from its weights, name it in init_from and set another output_dir"
    packer = loaded.extra.get(PACKING, "first fit, 64")  # of the versions that did not say
    if packer != PACKER:
        raise ConfigError(f"data.train: this version packs samples by {PACKER!r}, wanted {packer!r} as in {loaded.folder}; {anew}")
    wanted = loaded.extra.get(DATA)
    if data.fingerprint != wanted:
        raise ConfigError(
            f"data.train: the samples in {data.path} have fingerprint {data.fingerprint[:12]}, wanted {str(wanted)[:12]} as in "
            f"{loaded.folder}, which was trained on other data; {anew}"
        )


class Trainer:
    """Everything one rank needs for a run. Made and run by every rank alike.

    interrupt: what may ask a rank to save and stop. All ranks then do so at the same step, and `run` raises Stopped.
    """

    def __init__(self, config: RunConfig, zero: dict, groups: Groups, interrupt: Interrupt | None = None):
        self.config, self.groups = config, groups
        self.meeting = Meeting(groups, interrupt or Interrupt())
        codebook = None
        if groups.first_stage and config.model.has_mgvq:
            codebook = load_codebook(config.mgvq_checkpoint, config.model.mgvq)
        self.engine = build_engine(config, zero, groups, codebook)
        self.state = checkpoint_state(self.engine, config)
        self.new_parts: tuple[str, ...] = ()  # what init_from was without
        self.bad = BadSteps(config.faults, groups)
        self.passed_over, self.rollbacks = 0, 0  # global batches left out by going back; how often
        resumed = self._start()
        self.step_number = 0 if resumed is None else resumed.step
        needs_pixels = groups.first_stage
        data, place = config.data, (groups.dp_rank, groups.dp_size, needs_pixels)
        # after the start, which decides the tower's weights
        self.features = TowerFeatures(self.engine, config, groups) if data.feature_cache and groups.first_stage else None
        cache = self.features and self.features.cache
        tolerant = data.max_bad_share > 0 and not data.feature_cache  # features of what stands for a broken image must not be kept
        self.loader = DataLoader(config, data.train, *place, self.step_number + self.passed_over, data.shuffle, cache, tolerant)
        self.quarantine = Quarantine(config, groups, len(self.loader.data))
        self.validation = None
        if data.validation and config.training.eval_interval:
            self.validation = ValidationLoader(config, data.validation, *place, config.training.eval_iters, cache)
        peak = peak_flops(groups.device, next(self.engine.module.parameters()).dtype)
        self.logger = Logger(config, groups, self.step_number, peak, self.engine.clock)
        self.saves = Saves(config, self.state, groups, self.logger, resumed)
        for part in self.new_parts:
            self.logger.say(f"init_from: {config.init_from} has no {part}, which begins as drawn from training.seed")
        if groups.pp_size > 1:
            micro_batches = config.training.global_batch_size // config.training.micro_batch_size // groups.dp_size
            self.logger.say(describe_stages(config, micro_batches))

    def _start(self) -> Loaded | None:
        """Load what the run starts from. Returns the checkpoint that it goes on from, if it does."""
        config = self.config
        found = last_checkpoint(config)
        progress.mark("load")
        if found is not None:
            loaded = load(found, self.state)
            if loaded.config.model != config.model:
                raise ConfigError(f"{found} holds another model than the configuration describes: resume with its own model section")
            check_same_order(loaded.config, config, found)
            check_same_data(loaded, PreparedData(config.data.train))
            self._take_up(loaded)
            return loaded
        if config.init_from:
            # weights must fit, some parts may be new; mask and fusion may differ between stages
            start = load(config.init_from, self.state, optimizer=False, may_lack=_new_part)
            self.new_parts = start.lacking
            saved, alpha = start.config.model.lora, config.model.lora.alpha
            if saved.rank and saved.alpha != alpha:
                raise ConfigError(
                    f"model.lora.alpha: got {alpha}, wanted {saved.alpha}, which the adapters in {start.folder} were trained with"
                )
        return None

    def _take_up(self, loaded: Loaded) -> None:
        """What a checkpoint holds beside weights and optimiser."""
        if loaded.rng is not None:
            set_rng_state(loaded.rng)
        self.passed_over = loaded.extra.get(PASSED_OVER, 0)
        self.bad.load(loaded.extra.get(BAD_STEPS, {}))

    def run(self) -> Path:
        """Train to the last step; without steps, save what the run starts from. Returns the last checkpoint's folder."""
        training, optimizer = self.config.training, self.config.optimizer
        epoch = self.loader.epoch
        self.logger.say(f"data: epoch {epoch + 1} has {self._report_epoch()}")
        if self.features is not None:
            cache, size = self.features.cache, self.features.cache.size_of(self.loader.data) / 2**30
            self.logger.say(f"data.feature_cache: {cache.folder} takes up to {size:.2f} GiB, {cache.stride} bytes an image")
        try:
            self.meeting.interrupt.arm()
            while self.step_number < training.train_iters:
                batches = self._next_batches()
                if self.features is not None:
                    self.features.agree(batches)
                lr = learning_rate(optimizer, self.step_number, training.train_iters)
                judge = (self.bad.is_bad,) if self.bad.judges else ()
                result = train_step(self.engine, batches, lr, *judge)
                self.step_number += 1
                if self._went_back(result):
                    continue
                tokens, flops = self._global_work(batches)
                if self.features is not None:
                    self.features.keep(batches)
                self.logger.step(self.step_number, result, lr, tokens, flops, self.loader.wait_share)
                if self.loader.epoch != epoch:
                    epoch = self.loader.epoch
                    self._report_epoch()
                self.saves.watch(self.step_number)
                if self.validation is not None and self.step_number % training.eval_interval == 0:
                    self._evaluate()
                if self.step_number == training.train_iters or (training.save_interval and self.step_number % training.save_interval == 0):
                    self._save()
            if not training.train_iters and self.config.init_from and self.saves.last is None:
                self._save()  # what the run starts from, as it is under this run's model section
            if self.features is not None:
                self._report_features(*self.features.totals())
            self.logger.say(f"waited for data {self.logger.waited:.2%} of the time since the first step, on the rank that waited most")
        finally:
            self.saves.end(self.step_number)  # after an error too: what is being written is good
            self.loader.close()
            if self.features is not None:
                self.features.close()
            self.logger.close()
        if self.saves.last is None:
            raise TrainingError(f"training.train_iters is {training.train_iters}: there was nothing to do")
        return self.saves.last

    def _went_back(self, result: StepResult) -> bool:
        """Do with a bad step as faults.on_bad_loss says. Returns whether the run has taken up its last checkpoint again."""
        finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        self.bad.count(result.loss, result.grad_norm, result.applied and finite)
        if not self.bad.in_a_row:
            return False
        faults = self.config.faults
        seen = f"step {self.step_number}: the loss is {result.loss:.6g} and the gradient norm {result.grad_norm:.6g}"
        wanted = "both must be finite" if not finite else "more than faults.max_loss_jump or faults.max_norm_jump lets pass"
        if faults.on_bad_loss != "stop" and self.bad.in_a_row <= faults.max_skipped:
            self.logger.say(f"{seen}, {wanted}: it is left out, the {self.bad.in_a_row}. of at most {faults.max_skipped} in a row")
            self.logger.write(self.step_number, {"faults/skipped_steps": self.bad.total})
            return False
        self.saves.end(self.step_number)
        end = f"{seen}, {wanted}; the last checkpoint is {self.saves.last or 'none'}"
        if faults.on_bad_loss != "roll_back" or self.saves.last is None:
            raise TrainingError(end)
        if self.rollbacks == faults.max_rollbacks:
            raise TrainingError(f"{end}; the run went back {self.rollbacks} times before, which faults.max_rollbacks allows")
        self._roll_back(end)
        return True

    def _roll_back(self, why: str) -> None:
        """Take up the last checkpoint again, and go on with the data behind those that were read since."""
        read = self.step_number + self.passed_over
        self.rollbacks += 1
        loaded = load(self.saves.last, self.state)
        self._take_up(loaded)
        self.bad.in_a_row = 0
        self.step_number, self.passed_over = loaded.step, read - loaded.step
        self.logger.say(f"{why}: the run goes on from there, with the data behind the {read} global batches that were read")
        self.logger.write(self.step_number, {"faults/rollbacks": self.rollbacks})

    def _next_batches(self) -> list[MicroBatch]:
        """The data of the next step, or the end of the run where any rank is asked to stop: also while a rank waits for its data,
        which the others then wait for."""
        progress.mark("data", self.step_number + 1)
        ready = self.loader.ready(0.0)
        while True:
            reason, waiting, broken = self.meeting.agree(not ready, ready and self.loader.broken)
            if reason:
                self._stop(reason)
            if not waiting:
                batches = next(self.loader)
                if broken:
                    total = self.quarantine.clear(self.step_number + 1, batches)
                    self.logger.say(f"step {self.step_number + 1}: leaves out broken samples, {total} so far: {self.quarantine.path}")
                return batches
            ready = self.loader.ready(DATA_WAIT)

    def _stop(self, reason: str) -> None:
        """Save where there is something to save, and raise Stopped."""
        self.saves.end(self.step_number)
        if self.step_number > max(self.saves.last_step, 0):
            self._save(wait=True)
        where = f"goes on from {self.saves.last}" if self.saves.last else "has no checkpoint to go on from"
        raise Stopped(f"step {self.step_number}: asked to stop by {reason}; the run {where}")

    def _report_epoch(self) -> str:
        """Write down how the current epoch is packed, and say it."""
        loader, length = self.loader, self.config.training.seq_length
        self.logger.write(self.step_number, {"data/epoch": loader.epoch, "data/padding_share": loader.padding_share})
        return f"{len(loader.data)} samples in {loader.rows} rows of {length} tokens, {loader.padding_share:.1%} of them padding"

    def _report_features(self, spared: int, computed: int, failed: int) -> None:
        share = spared / max(spared + computed, 1)
        self.logger.say(f"data.feature_cache: the tower ran on {computed} images and was spared {spared}, {share:.1%} of all")
        if failed:
            self.logger.say(
                f"data.feature_cache: {failed} ranks could not write all they computed; {self.features.failure or 'others did'}"
            )

    def _global_work(self, batches: list[MicroBatch]) -> tuple[int, float]:
        """Tokens and operations of the global batch."""
        tokens = sum(int((b.layout.samples[:, 2] - b.layout.samples[:, 1]).sum()) for b in batches)
        work = torch.tensor([float(tokens), step_flops(self.config, batches)], dtype=torch.float64, device=self.groups.device)
        sum_over(work, self.groups.dp)
        return int(work[0]), float(work[1])

    def _evaluate(self) -> None:
        """Measure the loss on the validation data; a run that is asked to stop leaves off, and stops before its next step."""
        steps = self.validation if self.features is None else self.features.around(self.validation)
        self.logger.state("evaluating")
        loss = evaluate(self.engine, self.meeting.until_asked(steps))
        self.logger.state("training")
        if self.meeting.asked:
            return
        self.logger.write(self.step_number, {"validation/loss": loss})
        self.logger.say(f"step {self.step_number}: validation loss {loss:.4f}")

    def _save(self, wait: bool = False) -> None:
        """Write a checkpoint of this step, or begin to; see Saves.save."""
        extra = {DATA: self.loader.data.fingerprint, PACKING: PACKER}
        if self.bad.judges:
            extra[BAD_STEPS] = self.bad.state()
        if self.passed_over:
            extra[PASSED_OVER] = self.passed_over
        self.saves.save(self.step_number, extra, wait)
