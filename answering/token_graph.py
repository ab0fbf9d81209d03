"""One new token of an answer as a CUDA graph: the launches of a pass are recorded once and then sent together.

A pass of one token is some hundred small kernels. A GPU ends each sooner than Python asks for the next, so it mostly
waits. A graph needs the same memory in every pass: the keys and values of the answer that is being made are copied to
a `TokenCache`, and copied back when it has ended or another answer goes on. Used by `answer.py`.

Shapes: C slots, G key heads, H query heads, D head width, V vocabulary.
"""

import sys

import torch
from transformers import DynamicCache

from answering.prefix_cache import CachedSequence
from errors import is_out_of_memory
from model.model import MMultiModal

# Slots at first: a photo of 728 tokens and its questions. Doubled when an answer needs more.
FIRST_SLOTS = 1024
# Bounds the memory that is held: 224 MiB with Qwen2.5-1.5B in bf16. A pass reads all slots, also empty ones.
MOST_SLOTS = 8192


class TokenCache:
    """Keys and values of one sequence in memory that stays where it is; each pass adds one token at `position`.

    Args:
        states: of a sequence; the shapes and dtypes are theirs.
        slots: number of tokens that there is room for.
    """

    def __init__(self, states: DynamicCache, slots: int) -> None:
        def room(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.new_zeros(1, tensor.shape[1], slots, tensor.shape[3])

        self.keys = [room(layer.keys) for layer in states.layers]
        self.values = [room(layer.values) for layer in states.layers]
        device = self.keys[0].device
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self._slots = torch.arange(slots, device=device)
        self._scores: dict[int | None, torch.Tensor] = {}

    @property
    def slots(self) -> int:
        return len(self._slots)

    def begin_pass(self) -> None:
        """Forget the mask of the pass before."""
        self._scores.clear()

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scaling: float | None,
    ) -> torch.Tensor:
        """Attention of the new token, after its key and value were kept.

        The query heads of a key head are rows of one product, so no key is copied for each of them.

        Args:
            query: (1, H, 1, D); key and value (1, G, 1, D).
            window: number of positions that a token attends to, itself included; None: all.
            scaling: factor of the scores; None: D ** -0.5.

        Returns:
            (1, 1, H, D).
        """
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.position, key)
        values.index_copy_(2, self.position, value)
        rows = query.reshape(key.shape[1], -1, query.shape[-1])  # (G, H / G, D)
        if window not in self._scores:  # shared by all layers of a pass
            hidden = self._slots > self.position
            if window is not None:
                hidden |= self._slots <= self.position - window
            self._scores[window] = torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, -torch.inf)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        # Not the fused attention: with it, a pass of Qwen2.5-1.5B took 4.7 ms for 3.9, at 4,096 slots 8.3 (H200).
        # Scores in float32, as there: Qwen2's are large, because its keys have biases, and 16 bits would round them.
        scores = torch.baddbmm(self._scores[window], rows.float(), keys[0].float().transpose(1, 2), alpha=scale)
        return (scores.softmax(-1).to(values.dtype) @ values[0]).reshape(1, 1, -1, query.shape[-1])


class TokenGraph:
    """Reads tokens of answers one at a time.

    Without a GPU, it runs the pass each time; only tests use it there. Callers exclude each other.

    Args:
        model: in eval mode, all on one device.
    """

    def __init__(self, model: MMultiModal) -> None:
        self._model = model
        self._cache: TokenCache | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self._logits = torch.empty(0)
        self._owner: CachedSequence | None = None  # whose keys and values `_cache` holds
        self._ids: list[int] = []  # its tokens that `_cache` holds and the sequence does not
        self._refused = sys.maxsize  # slots that recording failed with

    @staticmethod
    def suits(model: MMultiModal) -> bool:
        """Whether the model's passes are to be recorded, and can be: on one GPU, and the same at every position.

        8-bit layers cannot: bitsandbytes looks for outliers in their inputs, and waits for the GPU.
        """
        if not model.config.gui.cuda_graph or model.config.llm.quantization == "int8":
            return False
        one_gpu = model.device.type == "cuda" and {weight.device for weight in model.LLM.parameters()} == {model.device}
        return one_gpu and model.language_model.equal_passes

    def read(self, sequence: CachedSequence, token: int) -> torch.Tensor | None:
        """Read `token` behind `sequence`, which gets it with `put_back`; return the logits (V,) in float32.

        Returns:
            None if the token must be read in the usual way: the sequence is too long, or the GPU cannot record it.
        """
        if self._owner is not sequence or self._cache is None or self._used == self._cache.slots:
            self._take(sequence)
        if self._owner is None or self._cache is None:
            return None
        self._token.fill_(token)
        self._cache.position.fill_(self._used)
        self._run()
        self._ids.append(token)
        return self._logits

    def put_back(self, sequence: CachedSequence) -> None:
        """Add to `sequence` what was read behind it."""
        if self._owner is not sequence:
            return
        assert self._cache is not None, "an owner's tokens are in it"
        start, end, layers = len(sequence.ids), self._used, sequence.states.layers
        # all before the first is replaced, because memory may run out
        whole = [
            tuple(
                torch.cat([old[:, :, :start], new[:, :, start:end]], dim=2)
                for old, new in ((layer.keys, keys), (layer.values, values))
            )
            for layer, keys, values in zip(layers, self._cache.keys, self._cache.values, strict=True)
        ]
        for layer, (keys, values) in zip(layers, whole, strict=True):
            layer.keys, layer.values = keys, values
        sequence.ids += self._ids
        self._owner, self._ids = None, []

    def end(self, sequence: CachedSequence) -> None:
        """As `put_back`, for the last time: without memory for it, what was read is forgotten."""
        try:
            self.put_back(sequence)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._owner, self._ids = None, []

    def clear(self) -> None:
        """Put back what was read behind an answer that goes on, and free all memory."""
        if self._owner is not None and self._owner.unfinished:
            self.put_back(self._owner)
        self._graph = self._cache = self._owner = None
        self._logits, self._ids = torch.empty(0), []

    @property
    def _used(self) -> int:
        return len(self._owner.ids) + len(self._ids) if self._owner is not None else 0

    def _take(self, sequence: CachedSequence) -> None:
        """Copy keys and values of `sequence`, unless it is too long."""
        if self._owner is not None and (self._owner.unfinished or self._owner is sequence):
            self.put_back(self._owner)
        self._owner, self._ids = None, []
        tokens = len(sequence.ids)
        if tokens >= MOST_SLOTS:
            return
        if self._cache is None or tokens >= self._cache.slots:
            slots = FIRST_SLOTS
            while slots <= tokens:
                slots *= 2
            self._record(sequence.states, min(slots, MOST_SLOTS))
        if self._cache is None:
            return
        for layer, *memory in zip(sequence.states.layers, self._cache.keys, self._cache.values, strict=True):
            for slots_of, states in zip(memory, (layer.keys, layer.values), strict=True):
                slots_of[:, :, :tokens] = states
                slots_of[:, :, tokens:] = 0  # NaN of an earlier answer would not be hidden by the mask
        self._owner = sequence

    def _record(self, states: DynamicCache, slots: int) -> None:
        """Make room for `slots` tokens of sequences like `states` and record the pass."""
        self.clear()
        if slots >= self._refused:
            return
        try:
            self._cache = TokenCache(states, slots)
            if self._model.device.type == "cuda":
                self._capture()
        except (RuntimeError, MemoryError) as error:
            self.clear()
            self._refused = slots if is_out_of_memory(error) else 0
            print(f"answers are written without a CUDA graph, so more slowly ({error})", file=sys.stderr)

    def _capture(self) -> None:
        before = torch.cuda.current_stream()
        with torch.cuda.device(self._model.device):
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    self._pass()  # libraries set themselves up in their first call, which cannot be recorded
                # threads of other models may use the GPU meanwhile
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self._logits = self._pass()
            finally:
                torch.cuda.set_stream(before)  # torch does not go back to it after an error
        self._graph = graph

    def _run(self) -> None:
        if self._graph is None:
            self._logits = self._pass()
        else:
            self._graph.replay()

    def _pass(self) -> torch.Tensor:
        """Read `_token` at `_cache.position`; return the logits (V,)."""
        language_model, cache = self._model.language_model, self._cache
        assert cache is not None, "a pass needs room for its keys and values"
        cache.begin_pass()
        embeddings = language_model.get_input_embeddings()(self._token)
        states = language_model.packed_states(embeddings, cache.position[None], None, cache=cache)
        return language_model.lm_head(states)[0, -1].float()
