"""The key/value cache: per layer one tensor of keys and one of values, [B, E*G, J, D].

The expert axis is folded into the heads, so that every operation of transformers' caches (crop, reorder, repeat,
select, reset) is right as inherited, and stock ``DynamicCache(config=...)`` and ``StaticCache`` work too (model.md 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from micro.modeling.config import MiCRoConfig

_CHUNK = 64  # slots by which a store grows at least
# Slots that are reserved at most where a generation says how many it may need: on the CPU memory that nobody writes to
# costs nothing.
_AHEAD = {"cpu": 8192, "cuda": 1024}


class MiCRoCacheLayer(DynamicLayer):
    """Keys and values of one layer. Without gradient they live in a store that grows in chunks and is filled in place
    (performance.md 9.14); ``keys`` and ``values`` are views of its filled part.
    """

    def __init__(self) -> None:
        # Keys and values [B,E,G,capacity,D], how many slots of them are cached (None: what `keys` and `values` were set
        # to counts), and views of those slots with E and G as one axis, made when somebody asks for them.
        self._stores: tuple[Tensor, Tensor] | None = None
        self._length: int | None = None
        self._shown: tuple[Tensor | None, Tensor | None] | None = (None, None)
        self.expected = 0  # slots that whoever made the cache means to fill; a store that has room need not be copied
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> Tensor | None:
        """The cached keys [B,E*G,J,D]."""
        return self._show()[0]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._shown, self._length = (keys, self._show()[1]), None

    @property
    def values(self) -> Tensor | None:
        """The cached values [B,E*G,J,D]."""
        return self._show()[1]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._shown, self._length = (self._show()[0], values), None

    def _show(self) -> tuple[Tensor | None, Tensor | None]:
        if self._shown is None:
            assert self._stores is not None
            keys, values = (store.flatten(1, 2).narrow(2, 0, self._length or 0) for store in self._stores)
            self._shown = (keys, values)
        return self._shown

    def get_seq_length(self) -> int:
        """Number of cached slots."""
        return super().get_seq_length() if self._length is None else self._length

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add S slots, keys and values [B,E,G,S,D] (any strides); return all of them as [B,E,G,J,D]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if torch.is_grad_enabled():
            # A tensor that autograd may have saved must not change: concatenate, as the stock layer does.
            all_keys, all_values = super().update(keys.flatten(1, 2), values.flatten(1, 2))
        else:
            all_keys, all_values = self._append_in_place(keys, values)
        experts, groups = keys.shape[1:3]
        return all_keys.unflatten(1, (experts, groups)), all_values.unflatten(1, (experts, groups))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add S slots, [B,heads,S,D]; return all of them (the interface of stock layers)."""
        keys, values = self.append(key_states[:, None], value_states[:, None])
        return keys.flatten(1, 2), values.flatten(1, 2)

    def _append_in_place(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        batch, experts, groups, new, size = keys.shape
        old = self.get_seq_length()
        for store, part in zip(self.room(keys, batch, experts, groups, size, new), (keys, values), strict=True):
            store[:, :, :, old : old + new].copy_(part)
        self.filled(old + new)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def room(self, like: Tensor, batch: int, experts: int, groups: int, size: int, new: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B,E,G,capacity,D] with room for ``new`` slots behind the cached ones, dtype and device as
        ``like``; :meth:`filled` says that they were written. Without gradient only.
        """
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        old, stores = self.get_seq_length(), self._stores
        if stores is not None and self._length is not None and stores[0].shape[3] >= old + new:
            same = old > 0 or (stores[0].shape[:3] == (batch, experts, groups) and stores[0].dtype == like.dtype)
            if same and (torch.is_inference_mode_enabled() or not stores[0].is_inference()):
                return stores
        needed = old + new
        reserved = min(self.expected, needed + _AHEAD.get(like.device.type, 0))
        capacity = -(-max(needed, old + old // 4, reserved) // _CHUNK) * _CHUNK
        stores = (
            like.new_empty(batch, experts, groups, capacity, size),
            like.new_empty(batch, experts, groups, capacity, size),
        )
        if old:
            for store, cached in zip(stores, self._show(), strict=True):
                assert cached is not None
                store[:, :, :, :old].copy_(cached.unflatten(1, (experts, groups)))
        # From outside nothing has changed; what is cached lies in the new stores now.
        self._stores, self._length, self._shown = stores, old, None
        return stores

    def filled(self, length: int) -> None:
        """The first ``length`` slots of the stores are the cached ones from now on."""
        self._length, self._shown = length, None

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last slots (a count <= 0, as in transformers). The store is kept."""
        if self._length is None or tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        else:
            self.filled(max(0, self._length + tokens_to_remove))

    def reset(self) -> None:
        """Forget all slots and free the store."""
        super().reset()
        self._stores = None


class MiCRoCache(Cache):
    """Cache of a MiCRo model, for any ``past_key_values``: E experts' keys and values per layer (whole-block experts)
    or one pair per layer (FFN experts). Slot numbers of official caches are layer * E + expert (model.md 3.1).
    """

    def __init__(self, config: MiCRoConfig) -> None:
        if not isinstance(config, MiCRoConfig):
            raise TypeError(f"MiCRoCache(config): expected a MiCRoConfig, got {type(config).__name__}")
        super().__init__(layers=[MiCRoCacheLayer() for _ in range(config.num_hidden_layers)])
        self.experts = config.num_experts if config.is_block else 1

    @property
    def length(self) -> int:
        """Number of cached slots."""
        return int(self.get_seq_length())

    def expect(self, slots: int) -> None:
        """Say how many slots will be filled at most, so that stores have room for them from the start."""
        for layer in self.layers:
            assert isinstance(layer, MiCRoCacheLayer)
            layer.expected = slots

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` slots."""
        if not 0 <= length <= self.length:
            raise ValueError(f"MiCRoCache.truncate: length is {length}, the cache holds {self.length} slots")
        self.crop(length - self.length)

    # ------------------------------------------------------------------ official caches (model.md 3.1, 3.5)
    def export_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Copies of keys and values [B,G,J,D], in the order of official caches: index layer * E + expert (FFN experts:
        layer). Empty before the first call.
        """
        out = []
        for layer in self.layers:
            assert isinstance(layer, MiCRoCacheLayer)
            if layer.keys is None or layer.values is None or layer.get_seq_length() == 0:
                return []
            keys, values = (t.unflatten(1, (self.experts, -1)).unbind(1) for t in (layer.keys, layer.values))
            out += [(k.clone(), v.clone()) for k, v in zip(keys, values, strict=True)]
        return out

    @classmethod
    def import_pairs(cls, config: MiCRoConfig, pairs: Sequence[tuple[Tensor, Tensor]]) -> MiCRoCache:
        """A cache of what :meth:`export_pairs` gives; keys are those after norm and rotation. Raises ``ValueError`` for
        another number of pairs or differing shapes.
        """
        cache = cls(config)
        if len(pairs) != (want := len(cache.layers) * cache.experts):
            raise ValueError(f"import_pairs: there are {len(pairs)} pairs, expected {want} (layers x experts)")
        rows, _, slots, _ = pairs[0][0].shape
        shape = (rows, config.num_key_value_heads, slots, config.head_dim)
        for index, (k, v) in enumerate(pairs):
            if tuple(k.shape) != shape or tuple(v.shape) != shape:
                raise ValueError(
                    f"import_pairs: pair {index} has shapes {list(k.shape)} and {list(v.shape)}, expected {list(shape)}"
                )
        for number, layer in enumerate(cache.layers):
            assert isinstance(layer, MiCRoCacheLayer)
            keys, values = zip(*pairs[number * cache.experts : (number + 1) * cache.experts], strict=True)
            layer.append(torch.stack(keys, 1), torch.stack(values, 1))
        return cache


def check_cache(cache: object, config: MiCRoConfig, batch: int) -> Cache:
    """The cache itself, if a MiCRo model can use it; otherwise an error that names it and says what to pass."""
    advice = "pass MiCRoCache(model.config), DynamicCache(config=model.config) or StaticCache(config=model.config, ...)"
    name = type(cache).__name__
    if not isinstance(cache, (MiCRoCache, DynamicCache, StaticCache)):
        raise TypeError(f"past_key_values is a {name}; {advice}")
    if cache.layer_class_to_replicate is not None:
        raise ValueError(f"past_key_values is a {name} made without config, which has no layers yet; {advice}")
    if cache.offloading and not torch.cuda.is_available():
        raise ValueError(f"past_key_values is an offloaded {name}, which needs CUDA; {advice}")
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(f"past_key_values has {len(cache.layers)} layers, the model {config.num_hidden_layers}")
    if odd := {type(layer).__name__ for layer in cache.layers if type(layer) not in _LAYERS}:
        raise ValueError(f"past_key_values has layers of type {sorted(odd)}; {advice}")
    first = cache.layers[0]
    assert isinstance(first, _LAYERS)
    if first.keys is not None and first.keys.numel():
        have, want = tuple(first.keys.shape[:2]), (batch, config.cache_heads)
        if have != want:
            raise ValueError(
                f"past_key_values holds {have[0]} rows of {have[1]} key heads (experts x groups), "
                f"this call needs {want[0]} rows of {want[1]}"
            )
    return cache


_LAYERS = (MiCRoCacheLayer, DynamicLayer, StaticLayer)


def append_to_cache(cache: Cache, layer: int, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Add keys and values [B,E,G,S,D] of one layer; return all ``length`` filled slots as [B,E,G,J,D]."""
    own = cache.layers[layer]
    if isinstance(own, MiCRoCacheLayer):
        return own.append(keys, values)
    heads = keys.shape[1:3]
    all_keys, all_values = cache.update(keys.flatten(1, 2), values.flatten(1, 2), layer)
    # A static layer returns its whole buffer; slots that no call has filled are cut off.
    return all_keys[:, :, :length].unflatten(1, heads), all_values[:, :, :length].unflatten(1, heads)
