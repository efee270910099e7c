"""Cuts the sizes in a configuration by the names of its fields and the relations of their values.

What is equal, a multiple or a product in the whole model stays so: widths become 64 (32 in another
tower), a head's width 16, heads 4, experts 4, windows 8. A field of no rule here stays as it is.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .shrunk_layers import Values, keep_kinds

_WIDTH, _OTHER_WIDTH = 64, 32
_FEED_FORWARD, _EXPERT_WIDTH = 96, 48
_HEADS, _OTHER_HEAD = 4, 24
_EXPERTS, _WINDOW, _TOP, _STATE, _POSITIONS = 4, 8, 4, 8, 512
_INDEXERS = 32
_RANK, _OTHER_RANK, _CODES = 8, 12, 256
_SMALL_HEAD, _SMALL_PYRAMID = 64, 128
"""Widths up to these stay as they are: a small model's copy is about as large as the model."""
_LARGEST_MULTIPLE = 16

_TEXT_PARTS = ("text_config", "thinker_config", "llm_config", "decoder", "vlm_config")
_NOT_PARTS = ("per_layer_config", "id2label", "label2id", "projector_patch_to_query_dict")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim", "embedding_dim")
_MAIN_HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "attention_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
    "num_decoder_attention_heads",
)
_GROUPS = ("n_group", "num_expert_group")

_TOKEN = re.compile(r".*(token_ids?|token_index|token_id_list|_id)")
_NOT_TOKENS = ("lang_id", "insert_layer_id")
_VOCABULARY = re.compile(
    r".*vocab_size.*|.*_vocab|vocab_offset|split_ngram_parts"
    r"|num_embeddings|num_centroids"
)
_EXPERT_COUNT = re.compile(r".*num_(local_|routed_)?experts|n_routed_experts|zero_expert_num")
_CHOSEN_EXPERTS = re.compile(r"num_experts_per_tok(en)?|moe_(top_?)?k|top_k_experts")
_WINDOWS = re.compile(
    r"(sliding_|keep_|attention_)?window(_size)?|sliding_window_size|attention_chunk_size"
    r"|local_attention(_window_len)?|(mamba_)?chunk_size|(lsh|local)_attn_chunk_length"
    r"|index_block_size|block_size|heavily_compressed_attention"
)
_POSITION_COUNT = re.compile(
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions"
)
_INDEX_HEADS = re.compile(r"index(er)?_n_heads")
"""An indexer adds up what its heads keep of a ReLU: with few of them many tokens are equal at 0."""
_HEAD_COUNT = re.compile(r".*(heads|n_head|query_groups|num_attention_heads_per_layer)")
_HEAD_WIDTH = re.compile(
    r".*(head_dim|headdim|d_head|d_kv|dim_head|head_size|kv_channels|rotary_dim)"
)
_FEED_FORWARDS = re.compile(
    r".*(intermediate_size(_mlp)?|ffn_dim|d_ff|dff|ffn_hidden_size|mlp_dim|dim_ff|n_inner"
    r"|feed_forward_size|expert_dim)|d_inner"
)
_PYRAMIDS = ("embed_dim", "hidden_sizes", "downsample_channels")
"""Widths of the steps of a tower for images or sound, each a multiple of the one before."""
_GEOMETRY = re.compile(r"(max_(action|state)|patch|video_patch|index_head|num_pos)_dim.*")
"""Sizes of an input, not of a layer."""
_WIDTHS = re.compile(
    r".*(hidden_size|_dim|output_size|embedding_size|_width|_dimension|_embd|hidden_dim|input_size)"
    r"|mamba_d_ssm|hidden_size_.*|dim_model.*|d_model"
)

_STATE_HEADS = (
    ("mamba_n_heads", "mamba_d_head"),
    ("mamba_num_heads", "mamba_head_dim"),
    ("n_mamba_heads", "mamba_headdim"),
    ("num_heads", "head_dim"),
)
"""Heads of a state-space layer and their width; the product is the layer's width."""


def parts(values: Values) -> Iterator[Values]:
    """The configuration and those inside it, as dictionaries."""
    yield values
    for key, value in values.items():
        if isinstance(value, dict) and key not in _NOT_PARTS:
            yield from parts(value)


def number(value: Any) -> int:
    """The value where it is a positive whole number, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def cut_sizes(values: Values, vocabulary: int, all_layers: bool = False) -> None:
    """Cut a configuration and those inside it, in place."""
    widths = _small_widths(values)
    tokens: dict[int, int] = {}
    for part in list(parts(values)):
        sizes = _Part(part, widths, tokens, vocabulary)
        if not all_layers:
            keep_kinds(part)
        sizes.cut()


def _first(values: Values, names: tuple[str, ...]) -> int:
    return next((number(values[name]) for name in names if number(values.get(name))), 0)


def _small_widths(values: Values) -> dict[int, int]:
    """The small width of every stream in the model, by its width in the whole model."""
    text = values
    for name in _TEXT_PARTS:
        if isinstance(text.get(name), dict):
            text = text[name]
    streams = {number(part.get(name)) for part in parts(values) for name in _HIDDEN} - {0}
    main = _first(text, _HIDDEN) or max(streams, default=0)
    # xLSTM's code rounds half of the width up to a multiple of 64.
    wide = 2 * _WIDTH if "qk_dim_factor" in text else _WIDTH
    return {width: wide if width == main else _OTHER_WIDTH for width in streams}


def _rank(size: int) -> int:
    """Two ranks, because latent attention has one for queries and one for keys."""
    return min(size, _RANK if _OTHER_RANK < size < 1024 else _OTHER_RANK)


class _Part:
    """One configuration: what it says of the whole model, and how its fields are cut."""

    def __init__(
        self, values: Values, widths: dict[int, int], tokens: dict[int, int], vocabulary: int
    ) -> None:
        self.values, self.old = values, dict(values)
        self.widths, self.tokens, self.vocabulary = widths, tokens, vocabulary
        self.hidden = _first(values, _HIDDEN)
        self.small = widths.get(self.hidden, 0)
        self.heads = _first(values, _MAIN_HEADS)
        self.expand = values.get("expand") or values.get("mamba_expand") or 0
        # A configuration of latent attention has the width of its rotary part under this name.
        is_latent = number(values.get("qk_rope_head_dim")) > 0
        self.head_width = 0 if is_latent else number(values.get("head_dim"))
        self.small_head = self._small_head()
        heads = (number(value) for key, value in values.items() if _HEAD_WIDTH.fullmatch(key))
        self.has_small_heads = max(heads, default=0) <= _SMALL_HEAD

    def cut(self) -> None:
        """Cut this configuration's own fields, not those of configurations inside it."""
        for key, value in self.values.items():
            self.values[key] = self._field(key, value)
        if isinstance(layers := self.values.get("per_layer_config"), dict):
            self.values["per_layer_config"] = {
                layer: {key: self._field(key, value) for key, value in changes.items()}
                for layer, changes in layers.items()
            }
        self._keep_products()
        for key in ("rope_parameters", "rope_scaling"):
            for rope in parts(self.values[key]) if self.values.get(key) else ():
                self._cut_rope(rope)

    def _small_head(self) -> int:
        """A head's width: the heads together are as wide as the stream only where they were."""
        if not self.head_width or self.head_width * self.heads == self.hidden:
            return self.small // _HEADS
        return _OTHER_HEAD if self._turns(_OTHER_HEAD) else 32

    def _turns(self, width: int) -> bool:
        """True if rotary positions turn an even number of a head's values, with a mrope's three."""
        rope = self.old.get("rope_parameters") or {}
        turned = int(width * self._rotary_factor(rope))
        return turned % 2 == 0 and turned >= (8 if "mrope_section" in rope else 2)

    def _rotary_factor(self, rope: Values) -> float:
        name = "partial_rotary_factor"
        return float(rope.get(name) or self.old.get(name) or 1)

    def _field(self, key: str, value: Any) -> Any:
        if _TOKEN.fullmatch(key) and key not in _NOT_TOKENS:
            return self._token(value)
        if not isinstance(value, list | tuple):
            return self._rule(key)(number(value)) if number(value) else value
        if key in _PYRAMIDS:
            return [max(8, each // 16) for each in value] if max(value) > _SMALL_PYRAMID else value
        sizes = (_EXPERT_COUNT, _CHOSEN_EXPERTS, _FEED_FORWARDS, _HEAD_COUNT)
        if key != "num_heads" and any(names.fullmatch(key) for names in sizes):
            return [self._field(key, entry) for entry in value]
        return value  # also a pyramid's heads, which divide its widths

    def _rule(self, key: str) -> Callable[[int], int]:
        """How the whole number of this field is cut; the first name that fits decides."""
        windows = _WINDOWS.fullmatch(key) and "patch_size" not in self.old
        rules: tuple[tuple[Any, Callable[[int], int]], ...] = (
            (_VOCABULARY.fullmatch(key), partial(min, self.vocabulary)),
            (_CHOSEN_EXPERTS.fullmatch(key), partial(min, 2)),
            (_EXPERT_COUNT.fullmatch(key), self._experts),
            (key == "codebook_size", partial(min, _CODES)),
            (key in (*_GROUPS, "mamba_n_groups", "mamba_ngroups", "n_groups"), partial(min, 2)),
            (key in ("topk_group", "index_topk_blocks"), partial(min, 1)),
            (key in ("mamba_d_state", "ssm_state_size", "state_size"), partial(min, _STATE)),
            (key in ("index_topk", "index_kpool", "indexer_budget"), partial(min, _TOP)),
            (windows, lambda size: min(size, _WINDOW + size % 2)),
            (_POSITION_COUNT.fullmatch(key), self._positions),
            (_INDEX_HEADS.fullmatch(key), partial(min, _INDEXERS)),
            (_HEAD_COUNT.fullmatch(key), self._head_count),
            (_HEAD_WIDTH.fullmatch(key), self._head_width),
            (key.endswith("multiple_of"), partial(min, 8)),
            (key.endswith(("_channels", "num_filters")), self._channels),
            (key.endswith("rank"), _rank),
            (_FEED_FORWARDS.fullmatch(key), partial(self._feed_forward, key)),
            (_GEOMETRY.fullmatch(key), int),
            (_WIDTHS.fullmatch(key), self._width),
        )
        return next((rule for fits, rule in rules if fits), int)

    def _token(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._token(entry) for entry in value]
        if number(value) < self.vocabulary:
            return value
        return self.tokens.setdefault(
            value, self.vocabulary - 1 - len(self.tokens) % self.vocabulary
        )

    def _experts(self, count: int) -> int:
        is_grouped = max(number(self.old.get(name)) for name in _GROUPS) > 1
        return min(count, 2 * _EXPERTS if is_grouped else _EXPERTS)

    def _positions(self, count: int) -> int:
        """Rotary positions cost nothing; learned ones have a row each."""
        return count if self.old.get("rope_parameters") else min(count, _POSITIONS)

    def _channels(self, count: int) -> int:
        return min(count, _OTHER_WIDTH)

    def _head_count(self, count: int) -> int:
        """Fewer heads, such as those of keys, stay fewer, and more stay more."""
        if count == 1 or not self.heads or count == self.heads:
            return min(count, _HEADS)
        return _HEADS // 2 if count < self.heads else 2 * _HEADS

    def _head_width(self, width: int) -> int:
        """The main one follows the stream; others keep their ratios."""
        if width == self.head_width:
            return self.small_head
        return width if self.has_small_heads else -(-width // 64) * 8

    def _feed_forward(self, key: str, width: int) -> int:
        if self.expand and width == self.expand * self.hidden:  # a state-space layer's
            return int(self.expand * self.small)
        return min(width, _EXPERT_WIDTH if "moe" in key or "expert" in key else _FEED_FORWARD)

    def _width(self, width: int) -> int:
        """The stream's width, or the same multiple or fraction of one."""
        if width in self.widths:
            return self.widths[width]
        for stream in (self.hidden, *self.widths):
            if stream and width % stream == 0 and width // stream <= _LARGEST_MULTIPLE:
                return width // stream * self.widths[stream]
            if stream and stream % width == 0 and stream // width in (2, 4):
                return self.widths[stream] // (stream // width)
        return min(width, _OTHER_WIDTH)

    def _keep_products(self) -> None:
        """Keep the widths that are products of heads and a head's width."""
        old, new = self.old, self.values
        for heads, width in _STATE_HEADS:
            product = number(old.get(heads)) * number(old.get(width))
            if self.expand and product == int(self.expand * self.hidden):
                new[width] = int(self.expand * self.small) // new[heads]
            if product and old.get("mamba_d_ssm") == product:
                new["mamba_d_ssm"] = new[heads] * new[width]
        whole = self.head_width or self.hidden // max(self.heads, 1)
        if number(old.get("rotary_dim")) and whole:  # the part of a head that positions turn
            small = number(new.get("head_dim")) or self.small // _HEADS
            new["rotary_dim"] = max(2, old["rotary_dim"] * small // whole // 2 * 2)
        if "qk_rope_head_dim" in old:
            if "qk_head_dim" in old:
                new["qk_head_dim"] = new["qk_nope_head_dim"] + new["qk_rope_head_dim"]
            return
        for width in old if self.hidden else ():
            is_other = width == "head_dim" or width.startswith(("linear_", "index"))
            if _HEAD_WIDTH.fullmatch(width) and not is_other:
                times = number(old[width]) * self.heads / self.hidden
                if times in (1, 2):
                    new[width] = int(times) * self.small // min(self.heads, _HEADS)

    def _cut_rope(self, rope: Values) -> None:
        """Give the lists of rotary positions the new width of a head, which may be a wider one."""
        new = self.values
        width = number(new.get("qk_rope_head_dim")) or number(new.get("head_dim"))
        width = width or self.small // (_first(new, _MAIN_HEADS) or _HEADS)
        turned = int(width * self._rotary_factor(rope)) // 2
        for key in ("short_factor", "long_factor"):
            if isinstance(rope.get(key), list):
                rope[key] = (rope[key] + rope[key][-1:] * turned)[:turned]
        if sections := rope.get("mrope_section"):
            cut = [max(1, turned * size // sum(sections)) for size in sections]
            single = next((i for i, size in enumerate(sections) if sections.count(size) == 1), 0)
            cut[single] += turned - sum(cut)  # equal ones stay equal
            rope["mrope_section"] = cut
