"""Counts the bytes that a forward pass keeps for its backward pass, without computing it.

The recipe's own model, of its full size, runs on tensors that have shapes and no values. So the
count holds for every architecture, adapter and type, and takes neither memory nor a GPU.
"""

import logging
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal
from weakref import WeakSet

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..common.logs import limit
from ..config.recipe import Recipe
from .attention import attention as by_rows
from .attention import for_all_heads, replace_attention
from .dtypes import DtypeName, torch_dtype
from .freezing import decoder_layers
from .live import Beyond, Live, beyond_kept, detached, end_of
from .loading import Model, build_meta_model, forward_arguments
from .repeated_layers import form_of, kinds_of

Attention = Literal["plain", "dense", "borders", "groups", "eager"]
"""plain: one document a row; only sliding windows need a mask. dense: every layer keeps a mask, and
keys and values of all heads. borders: neither; a kernel takes the borders of documents. groups: no
mask, but keys and values of all heads, and the result in two orders; documents of like length are
computed together. eager: every layer keeps the scores of all pairs of tokens."""

_COUNTED: dict[Attention, str] = {
    "plain": "finray_plain",
    "borders": "finray_borders",
    "groups": "finray_groups",
}


@dataclass(frozen=True)
class Kept:
    """Bytes that the forward pass of a microbatch keeps, without the logits."""

    layers: tuple[int, ...]
    """Bytes of each decoder layer."""
    before: int
    """Of what comes before the layers, or is no layer's own."""
    after: int
    """Of what follows them, such as the last norm and a low-precision copy of the head."""
    inputs: int
    """Of the layers' inputs, which checkpointing keeps instead."""
    given: int
    """Of what else they are given and do not keep, which checkpointing does: masks, for example."""
    beyond: tuple[Beyond, ...] | None
    """What each layer holds for a while; None where gradients cannot be followed."""
    tail: int
    """Most that is held of what follows the layers, or of its gradients; as far as it is known."""

    @property
    def whole(self) -> int:
        """Bytes of the whole model."""
        return sum(self.layers) + self.before + self.after


_OF_THE_MODEL = {"kind", "init", "reference_model", "rollout"}
"""Settings of a method that decide which model is built, or is refused."""


def kept_by(
    recipe: Recipe,
    rows: int,
    tokens: int,
    compute: DtypeName,
    trained: DtypeName,
    attention: Attention,
) -> Kept | None:
    """What the forward pass of so many rows keeps; None where it cannot be followed.

    Many rows take no longer than one. Two tell nothing of many: the most that is held at once is
    the gradients of weights in few, and activations in many.

    Args:
        recipe: the run's recipe, whose model's configuration is on this machine.
        rows: their number.
        tokens: length of a row.
        compute: type that the model computes in.
        trained: type of the trained weights; if it is wider, autocast computes.
        attention: what attention keeps.
    """
    relevant = recipe.model_dump_json(
        include={"model": True, "adapter": True, "freeze": True, "method": _OF_THE_MODEL},
        exclude={"model": {"gradient_checkpointing", "quantize"}},
    )
    return _counted(Keyed(relevant, recipe), rows, tokens, compute, trained, attention)


class Keyed:
    """A recipe that is equal to others with the same text, such as of what decides the model."""

    def __init__(self, text: str, recipe: Recipe) -> None:
        self.text, self.recipe = text, recipe

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyed) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=256)
def _counted(
    key: Keyed,
    rows: int,
    tokens: int,
    compute: DtypeName,
    trained: DtypeName,
    attention: Attention,
) -> Kept | None:
    limit("torch._subclasses.fake_tensor", logging.CRITICAL)  # what fails is not computed
    limit("transformers", logging.ERROR)  # nor do slow stand-ins for kernels matter here
    try:
        mode, model = _followed_model(key, compute, trained, attention)
        with mode, _GroupedProducts():  # type: ignore[no-untyped-call]
            return _forward(model, rows, tokens, compute, trained)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return None  # the code of some architectures reads values


@lru_cache(maxsize=1)
def _followed_model(
    key: Keyed, compute: DtypeName, trained: DtypeName, attention: Attention
) -> tuple[FakeTensorMode, Model]:
    """The last model, which rows of another length go through, too."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = _without_values(key.recipe, mode, compute, trained)
    _attend(model, attention)
    return mode, model


class _GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives the experts' matrix product its shape: torch states it for bfloat16 alone."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            ends = args[2] if len(args) > 2 else kwargs["offs"]
            groups = (len(ends),) if args[0].dim() == args[1].dim() == 2 else ()
            return args[0].new_empty((*groups, args[0].shape[-2], args[1].shape[-1]))
        return func(*args, **(kwargs or {}))


def _without_values(
    recipe: Recipe, mode: FakeTensorMode, compute: DtypeName, trained: DtypeName
) -> Model:
    """The model to train, on a CPU of which only shapes and types exist."""
    base = torch_dtype(compute) if recipe.trains_adapter else torch.float32
    model = build_meta_model(recipe, recipe.method.head, dtype=base)  # of which buffers keep types
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor, is_weight: bool) -> torch.Tensor:
        dtype = tensor.dtype
        if is_weight and dtype.is_floating_point:
            dtype = torch_dtype(trained) if tensor.requires_grad else base
        new = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        if not is_weight:
            return new
        weight = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight)
        return weight

    with mode:
        for module in model.modules():
            for values in (module._parameters, module._buffers):
                for name, tensor in values.items():
                    if tensor is not None:
                        is_weight = values is module._parameters
                        if id(tensor) not in made:
                            made[id(tensor)] = fake(tensor, is_weight)
                        values[name] = made[id(tensor)]
    model.config.get_text_config().use_cache = False
    return model.train()


def _attend(model: Model, attention: Attention) -> None:
    """Make attention keep what its kernel would; a family without sdpa keeps its own."""
    AttentionInterface.register(_COUNTED["plain"], sdpa_attention_forward)
    AttentionInterface.register(_COUNTED["borders"], _by_borders)
    AttentionInterface.register(_COUNTED["groups"], _by_groups)
    AttentionMaskInterface.register(_COUNTED["plain"], _mask_of_windows)
    AttentionMaskInterface.register(_COUNTED["borders"], _no_mask)
    AttentionMaskInterface.register(_COUNTED["groups"], _no_mask)
    transformer = _transformer(model)
    if attention == "eager":
        transformer.set_attn_implementation("eager")
    elif attention in ("borders", "groups"):
        with suppress(ValueError):  # one whose attention cannot be replaced keeps its own
            replace_attention(transformer, _COUNTED[attention])
    elif attention == "plain" and transformer.config._attn_implementation == "sdpa":
        transformer.set_attn_implementation(_COUNTED[attention])


def _by_borders(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """What `attention` keeps of documents: its fused kernels write token by token, whatever the
    order in which the model stores its queries."""
    is_plain = settings.get("softcap") is None and settings.get("s_aux") is None
    if settings.get("dropout") or not is_plain:
        return by_rows(module, query, key, value, attention_mask, **settings)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    width = value.shape[-1]
    if width < query.shape[-1]:
        value = pad(value, (0, query.shape[-1] - width))
    computed: torch.Tensor = _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]
    return computed[..., :width], None


def _by_groups(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *others: Any,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """As `_by_borders`, where no kernel takes borders."""
    key, value = (for_all_heads(tensor, query) for tensor in (key, value))
    computed, _ = _by_borders(module, query, key, value, *others, **settings)
    return computed.clone(), None


class _Fused(torch.autograd.Function):
    """Keeps what a fused kernel does; the result is (rows, tokens, heads, width)."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        query = inputs[0].transpose(1, 2)
        computed = query.new_empty(query.shape)
        norms = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(*inputs, computed, norms)
        return computed

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _mask_of_windows(*args: Any, **settings: Any) -> Any:
    """The mask of a sliding window that is shorter than the row; none for causal attention."""
    window = settings.get("local_size")
    if window is None or settings["kv_length"] <= window:
        return None
    return sdpa_mask(*args, **{**settings, "allow_is_causal_skip": False})


def _transformer(model: Model) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _forward(model: Model, rows: int, tokens: int, compute: DtypeName, trained: DtypeName) -> Kept:
    store = _Store((*model.parameters(), *model.buffers()))
    layers = _Layers(store)
    ids = torch.zeros((rows, tokens), dtype=torch.long)
    accepted = forward_arguments(model)
    values: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if "position_ids" in accepted:
        values["position_ids"] = torch.arange(tokens).expand(rows, -1)
    casts = compute not in (trained, "float32")
    with (
        layers.watched(model),
        _without_logits(model),
        torch.autograd.graph.saved_tensors_hooks(store.keep, lambda saved: saved.tensor),
        torch.autocast("cpu", torch_dtype(compute), enabled=casts),
    ):
        outputs = model(**values)  # whose graph holds what is kept
        after = store.bytes() - layers.total
        tail = layers.follow_tail(outputs)
    beyond = [one for one in layers.beyond if one is not None]
    is_whole = len(beyond) == len(layers.kept)
    return Kept(
        layers=tuple(layers.kept),
        before=layers.total - layers.followed,
        after=after,
        inputs=layers.inputs,
        given=layers.given,
        beyond=tuple(beyond) if is_whole else None,
        tail=max(after, tail),
    )


@contextmanager
def _without_logits(model: Model) -> Iterator[None]:
    """Inside, the output layer hands on a number, as the loss computes the logits."""
    head = _transformer(model).get_output_embeddings()
    if head is None:
        yield
        return
    own = head.forward
    head.forward = lambda states, *_, **__: states[:, :1, :1].clone()
    try:
        yield
    finally:
        head.forward = own


class _Saved:
    """A tensor that the graph keeps, for as long as it does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        storage = tensor.untyped_storage()
        self.storage, self.bytes = storage._cdata, storage.nbytes()


class _Store:
    """What the graph keeps, beside the model's own tensors."""

    def __init__(self, own: Iterable[torch.Tensor]) -> None:
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._kept: WeakSet[_Saved] = WeakSet()

    def keep(self, tensor: torch.Tensor) -> _Saved:
        """What stands for a tensor in the graph."""
        saved = _Saved(tensor)
        if saved.storage not in self._own:
            self._kept.add(saved)
        return saved

    def bytes(self, without: Container[int] = ()) -> int:
        """Bytes that are kept; storages of some numbers may not count."""
        of_storages = {saved.storage: saved.bytes for saved in self._kept}
        return sum(size for key, size in of_storages.items() if key not in without)

    def given(self, tensors: Iterable[torch.Tensor]) -> dict[int, int]:
        """Bytes by storage, without the model's own."""
        storages = [tensor.untyped_storage() for tensor in tensors]
        return {one._cdata: one.nbytes() for one in storages if one._cdata not in self._own}


class _Layers:
    """Follows how much is kept inside each decoder layer.

    The first two of each kind run. Those after them keep as much as the second, and hand on what
    they get. What layers are given is no layer's own.
    """

    def __init__(self, store: _Store) -> None:
        self.kept: list[int] = []
        self.followed = 0
        """Bytes of the layers that ran."""
        self.inputs = 0
        self.beyond: list[Beyond | None] = []
        self.total = 0
        """Bytes that were kept when the last layer ended."""
        self.given = 0
        """Of what layers are given beside their input, and do not keep."""
        self._store = store
        self._given: dict[int, int] = {}
        self._alive: list[Any] = []
        """What keeps its storage, so that no other gets its number."""
        self._tail, self._open = Live(), ExitStack()
        self._repeated: dict[Hashable, list[tuple[int, Beyond | None]]] = {}

    @contextmanager
    def watched(self, model: Model) -> Iterator[None]:
        """Inside, the layers' passes are followed."""
        transformer = _transformer(model)
        layers = decoder_layers(transformer)[1]
        own = [layer.forward for layer in layers]
        kinds = kinds_of(layers, transformer.config.get_text_config())
        for layer, kind in zip(layers, kinds, strict=True):
            layer.forward = partial(self._pass, layer.forward, kind)
        layers[-1].forward = partial(self._end, layers[-1].forward)
        try:
            yield
        finally:
            self._open.close()
            for layer, forward in zip(layers, own, strict=True):
                layer.forward = forward

    def _end(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The last layer's pass, with whose result another graph begins."""
        last = forward(*args, **kwargs)
        self._alive.append(last)
        self.total = self._store.bytes()
        saved = self.total - self._store.bytes(without=self._given)
        self.given = sum(self._given.values()) - saved
        self._open.enter_context(self._tail)
        return tree_map(detached, last)

    def follow_tail(self, outputs: Any) -> int:
        """Most bytes of what follows the layers; 0 where its gradients cannot be followed."""
        last = [one for one in tree_leaves(self._alive.pop()) if isinstance(one, torch.Tensor)]
        storages = self._store.given(last)
        saved = self._store.bytes() - self._store.bytes(without=storages)
        end = end_of(outputs.logits)
        outputs.clear()
        of_pass = self._tail.most
        self._tail.begin_backward()
        with suppress(RuntimeError, NotImplementedError, ValueError, TypeError):
            end.backward()  # type: ignore[no-untyped-call]
        self._open.close()
        return max(of_pass, self._tail.most) + saved

    def _pass(self, forward: Callable[..., Any], kind: Hashable, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.inputs += hidden.untyped_storage().nbytes()
        followed = self._repeated.setdefault((kind, form_of((args, *sorted(kwargs.items())))), [])
        if len(followed) > 1:
            self._add(*followed[-1])
            return hidden.clone()
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        self._alive += given
        self._given |= self._store.given(one for one in given if one is not hidden)
        beyond = beyond_kept(forward, args, kwargs)
        before = self._store.bytes(without=self._given)
        output = forward(*args, **kwargs)
        kept = self._store.bytes(without=self._given) - before
        self._add(kept, beyond)
        self.followed += kept
        if isinstance(output, torch.Tensor) and form_of(output) == form_of(hidden):
            followed.append((kept, beyond))
        return output

    def _add(self, kept: int, beyond: Beyond | None) -> None:
        self.kept.append(kept)
        self.beyond.append(beyond)
