"""HTC-VLM: the hybrid front-end on the first pipeline stage, a Megatron-core GPT backbone over all of them."""

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from htc_megatron.config import RunConfig
from htc_megatron.model.attention import LayoutParams
from htc_megatron.model.frontend import HybridFrontEnd
from htc_megatron.model.layers import backbone_config, backbone_spec, vision_config
from htc_megatron.model.layout import ImageShape, MicroBatch, SequenceLayout
from htc_megatron.model.mask import MaskRule
from htc_megatron.model.naming import is_decayed
from htc_megatron.model.output import OutputLayer
from htc_megatron.model.rows import RowOrder, capacity, fill_up, wanted_rows
from htc_megatron.parallel.tied import TiedEmbedding
from htc_megatron.weights.table import COMPONENTS, is_adapter, padded_vocab_size


class HTCVLM(nn.Module):
    """One pipeline stage of the model; the whole model where there is one stage.

    Args:
        config: the run's configuration.
        first, last: whether this stage embeds images and text, and whether it computes the loss.
        device: where the stage computes.
    """

    def __init__(self, config: RunConfig, first: bool, last: bool, tp_rank: int, device: torch.device):
        super().__init__()
        model, parallel = config.model, config.parallel
        self.first, self.last, self.tp_rank, self.device = first, last, tp_rank, device
        self.rule = MaskRule.from_config(model.method)
        self.image = ImageShape.from_config(model)
        self.attention = parallel.attention
        self.shares = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        self.needs_pixels, self.needs_codes = model.has_tower, model.has_mgvq
        self.pixel_shape = (3, model.vision.image_size, model.vision.image_size)
        self.code_shape = (model.mgvq.grid**2, model.mgvq.groups)
        self.vocab_size = model.backbone.vocab_size
        tp = parallel.tensor_model_parallel_size
        self.padded_vocab = padded_vocab_size(self.vocab_size, tp)
        self.config = backbone_config(config, device.type == "cpu")
        self.model_type = ModelType.encoder_or_decoder  # asked for by mcore's schedules
        if first:
            self.frontend = HybridFrontEnd(model, vision_config(config, device.type == "cpu"))
        self.backbone = GPTModel(
            self.config,
            backbone_spec(config),
            vocab_size=self.padded_vocab,
            max_sequence_length=model.backbone.max_position_embeddings,
            pre_process=first,
            post_process=last,
            position_embedding_type="none",  # rotary frequencies come from the layout's own positions
            share_embeddings_and_output_weights=False,
            scatter_embedding_sequence_parallel=False,  # images are placed into the whole sequence first
        )
        if last:
            options = dict(config=self.config, init_method=self.config.init_method, vocab_size=self.vocab_size, tp_rank=tp_rank)
            self.backbone.output_layer = OutputLayer(model.backbone.hidden_size, self.padded_vocab, **options)
        for layer in self.backbone.decoder.layers:
            layer.behind = self.config.num_layers - layer.layer_number
        self.tied = self._tie(config) if model.backbone.tie_word_embeddings and (first or last) else None
        self.rotary_base = model.backbone.rotary_base
        self._freeze(config)

    def _tie(self, config: RunConfig) -> TiedEmbedding:
        """Let the output layer use the embedding's matrix: it has no weight of its own then, on any stage."""
        shape = (self.padded_vocab // config.parallel.tensor_model_parallel_size, config.model.backbone.hidden_size)
        trained = "backbone" not in config.training.freeze
        tied = TiedEmbedding(self.first, self.last, shape, self.config.params_dtype, self.device, trained)
        if self.last:  # mcore's own sharing would keep a second parameter on the last stage
            self.backbone.output_layer.register_parameter("weight", None)
        if self.first:
            tied.attach(self.backbone.embedding.word_embeddings, self.backbone.output_layer if self.last else None)
        return tied

    def _freeze(self, config: RunConfig) -> None:
        prefixes = tuple(COMPONENTS[name] for name in config.training.freeze)
        for name, parameter in self.named_parameters():
            if prefixes and name.startswith(prefixes) and not is_adapter(name):
                parameter.requires_grad_(False)
        # DeepSpeed sums the gradient norm over the stages once a parameter group, so every stage must hold the same groups,
        # none of them empty. Where all is frozen, a stand-in takes part with weight zero and never moves.
        trained = {is_decayed(name, p) for name, p in self.named_parameters() if p.requires_grad}
        for decayed in (True, False):
            idle = None if decayed in trained else nn.Parameter(torch.zeros(1, dtype=self.config.params_dtype, device=self.device))
            self.register_parameter("idle_decayed" if decayed else "idle_plain", idle)

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor) -> None:
        """The previous stage's hidden states, as mcore's schedules hand them over."""
        self.backbone.set_input_tensor(input_tensor)

    def forward(self, batch: MicroBatch, logits: bool = False) -> Tensor:
        """Rows [capacity (/ tp with sequence parallelism), 1, H] for the next stage; on the last stage the summed loss [].

        With `logits` the last stage returns [b, s, vocab_size] fp32 logits instead, gathered over TP, zero rows' at padding.
        """
        layout = batch.layout
        if layout is None:
            raise RuntimeError("a pipeline stage was called without the micro-batch's layout: the mask would be lost")
        params = LayoutParams.from_layout(layout, self.rule, self.attention, self.device, self.shares)
        params.cos, params.sin = self.rotary(layout, params.order)
        rows, targets, weight = self.supervised(batch, params.order) if not logits else (None, None, 1.0)
        if rows is not None:
            params.read_only(rows, self.device)
        if self.first:
            hidden = self.embed(batch, params.order)
        else:
            hidden = None
            self.backbone.decoder.set_input_tensor(self.backbone.decoder.input_tensor[: sum(params.order.local)])
        hidden = self.backbone.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=params)
        for idle in (self.idle_decayed, self.idle_plain):
            if idle is not None:
                hidden = hidden + 0.0 * idle
        if not self.last:
            return fill_up(hidden, capacity(layout.rows, layout.seq_length, self.shares) // self.shares)
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        hidden = hidden.squeeze(1)
        if params.wanted is None:  # every row was computed
            hidden = params.order.gathered(hidden)
        if logits:
            return self.logits(params.order.at_places(hidden).unflatten(0, (layout.rows, layout.seq_length)))
        hidden = hidden[: len(rows)] if params.wanted is not None else hidden.index_select(0, rows.to(self.device))
        return self._output(hidden, targets.to(self.device)) * weight

    def shape_between_stages(self, layout: SequenceLayout) -> tuple[int, int]:
        """(rows, seq_length) of what stages exchange for a micro-batch of this shape, in mcore's words."""
        return 1, capacity(layout.rows, layout.seq_length, self.shares)

    def supervised(self, batch: MicroBatch, order: RowOrder) -> tuple[Tensor, Tensor, float]:
        """Rows that are read behind the last layer, their targets, both on CPU, and the weight of their loss.

        One row at weight zero where there is none: every rank takes the same road through the output layer.
        """
        rows, targets = wanted_rows(order, batch.labels)
        if not len(rows):
            return torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0.0
        return rows, targets, 1.0

    def embed(self, batch: MicroBatch, order: RowOrder) -> Tensor:
        """Rows of text, voco and V_hy. [n (/ tp), 1, H]

        The front-end always runs: a micro-batch without an image calls it on one blank image at weight zero, so that
        no rank waits in a collective that another one skips.
        """
        places = order.places[: max(order.num_text, 1)].clamp_min(0)
        ids = batch.input_ids.reshape(-1)[places].to(self.device)
        text = self.backbone.embedding(input_ids=ids[None], position_ids=None)[: order.num_text]  # [num_text, 1, H]
        images = self.frontend(*self.visual_inputs(batch), batch.features).to(text.dtype)  # [images or 1, N + K, H]
        if order.num_images:
            visual, voco = (x.flatten(0, 1)[:, None] for x in images.split([order.image.num_visual, order.image.num_voco], 1))
            zones = fill_up(torch.cat([text, voco]), order.language), fill_up(visual, order.visual)
        else:
            zones = fill_up(text + 0.0 * images.sum(), order.language), text[:0]
        hidden = order.share_out(*zones)
        if self.config.recompute_granularity == "full" and not hidden.requires_grad and torch.is_grad_enabled():
            hidden.requires_grad_()  # a checkpointed layer whose input needs no gradient would drop its weights' gradients
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        return hidden

    def visual_inputs(self, batch: MicroBatch) -> tuple[Tensor | None, Tensor | None]:
        """Pixels, of the images that the tower has to see, and codes on the device; one blank image where there are none."""

        def pick(name: str, count: int, given: Tensor | None, blank: Tensor) -> Tensor:
            if count and (given is None or len(given) != count):
                raise ValueError(f"the first stage needs {name} of {count} images, the batch has {0 if given is None else len(given)}")
            return (given if count else blank).to(self.device)

        pixels = codes = None
        if self.needs_pixels:
            pixels = pick("pixel_values", batch.num_tower_images, batch.pixel_values, torch.zeros(1, *self.pixel_shape))
        if self.needs_codes:
            codes = pick("codes", batch.layout.num_images, batch.codes, torch.zeros(1, *self.code_shape, dtype=torch.int16))
        return pixels, codes

    def rotary(self, layout: SequenceLayout, order: RowOrder) -> tuple[Tensor, Tensor]:
        """cos and sin at the rows' positions: [rows, head_dim / 2] each, computed in fp32, in the activations' precision."""
        # made here and not kept: zero.Init would round every tensor made during construction to the parameters' precision
        head_dim = self.config.kv_channels
        powers = torch.arange(0, head_dim, 2, dtype=torch.float32, device=self.device) / head_dim
        positions = layout.position_ids.reshape(-1)[order.places.clamp_min(0)].to(self.device).float()
        angles = positions[:, None] * self.rotary_base**-powers
        return angles.cos().to(self.config.params_dtype), angles.sin().to(self.config.params_dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., vocab_size] fp32, whole on every TP rank."""
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(self._output(hidden))
        return whole[..., : self.vocab_size].contiguous()

    def _output(self, rows: Tensor, targets: Tensor | None = None) -> Tensor:
        weight = None if self.tied is None else self.tied.weight  # None: the layer's own
        return self.backbone.output_layer(rows, targets, weight=weight)
