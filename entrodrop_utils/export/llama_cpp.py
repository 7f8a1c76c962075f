"""llama.cpp itself, from the wheel ``xllamacpp``: logits, greedy continuations, cache size and speed of a GGUF file.

The wheel exports llama.cpp's C functions, which are called here through ctypes. Its parameter structs change between releases, so
the few fields that are set are found by their default values, and a library in which they are elsewhere is refused.
"""

import contextlib
import ctypes
import importlib.util
import re
import struct
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jaxtyping import Float

WHEEL = "xllamacpp"
KV_TYPES = {"f32": 0, "f16": 1}  # ggml's numbers


class RuntimeUnavailable(RuntimeError):
    """The wheel is not installed, or its library is not one that this module can call."""


class _Params(ctypes.Structure):
    # larger than any of llama.cpp's structs of parameters: it is the last argument where it is passed by value, and more than the
    # struct is then copied behind it
    _fields_ = (("data", ctypes.c_char * 1024),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def llama_cpp_version() -> str:
    """The wheel and its version.

    Raises:
        RuntimeUnavailable: it is not installed.
    """
    _library()
    return f"{WHEEL} {version(WHEEL)}"


def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec(WHEEL)
    files = list(Path(spec.origin).parent.glob(f"{WHEEL}*.so")) if spec and spec.origin else []
    if not files:
        raise RuntimeUnavailable(f"the wheel {WHEEL} is not installed: pip install {WHEEL}")
    try:
        library = ctypes.CDLL(str(files[0]))
    except OSError as error:
        raise RuntimeUnavailable(f"{WHEEL} cannot be loaded here ({error})") from error
    pointers = (
        "llama_model_load_from_file",
        "llama_init_from_model",
        "llama_get_logits_ith",
        "llama_get_memory",
        "llama_model_get_vocab",
    )
    for name in pointers:
        getattr(library, name).restype = ctypes.c_void_p
    library.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    library.llama_batch_init.restype = _Batch
    library.llama_init_from_model.argtypes = [ctypes.c_void_p, _Params]
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Params]
    library.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(library, name).restype, getattr(library, name).argtypes = None, [ctypes.c_void_p]  # returned through the pointer
    return library


def _context_params(library: ctypes.CDLL, tokens: int, threads: int, type_kv: int) -> _Params:
    params = _Params()
    library.llama_context_default_params(ctypes.byref(params))
    values = list(struct.unpack("<48i", bytes(params)[:192]))
    # n_ctx, n_batch, n_ubatch, n_seq_max; n_threads twice; four settings left to the model, the last of them flash attention, which
    # rounds to 16 bits; a callback without data; type_k and type_v, which are f16
    known = {0: [512, 2048, 512, 1], 7: [4, 4], 10: [-1] * 4, 24: [0, 0, 1, 1]}
    if any(values[start : start + len(expected)] != expected for start, expected in known.items()):
        raise RuntimeUnavailable(f"the parameters of {WHEEL} {version(WHEEL)} are laid out in another way than this module knows")
    values[:3] = [tokens, tokens, tokens]
    values[7:9] = [threads, threads]
    values[26:28] = [type_kv, type_kv]
    if type_kv == KV_TYPES["f32"]:
        values[13] = 0
    ctypes.memmove(ctypes.byref(params), struct.pack("<48i", *values), 192)
    return params


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU; use ``load``.

    Attributes:
        kv_bytes: of the cache of keys and values, for ``tokens`` tokens, as llama.cpp reports it.
        log: all that llama.cpp said.
    """

    def __init__(self, library: ctypes.CDLL, model: int, context: int, log: list[str], rows: int):
        self._library, self._model, self._context, self.log, self._rows = library, model, context, log, rows
        sizes = re.findall(r"size\s*=\s*([\d.]+) MiB \(\s*\d+ cells", "".join(log))
        self.kv_bytes = round(sum(map(float, sizes)) * 2**20)

    def decode(self, ids: Sequence[int], start: int = 0) -> Float[np.ndarray, "token vocabulary"]:
        """Logits after each of these tokens, the first of which stands at position ``start``; a start of 0 forgets all before."""
        library = self._library
        if start == 0:
            library.llama_memory_clear(ctypes.c_void_p(library.llama_get_memory(ctypes.c_void_p(self._context))), True)
        batch = library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, start + i, 1, 0, 1
            if status := library.llama_decode(self._context, batch):
                raise RuntimeError(f"llama.cpp does not decode ({status}): {''.join(self.log[-5:])}")
            pointers = [library.llama_get_logits_ith(self._context, i) for i in range(len(ids))]
            return np.stack(
                [np.ctypeslib.as_array(ctypes.cast(p, ctypes.POINTER(ctypes.c_float)), (self._rows,)) for p in pointers]
            )
        finally:
            library.llama_batch_free(batch)

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The ``n`` likeliest next tokens, one after the other, with the cache."""
        logits, chosen = self.decode(ids)[-1], []
        for step in range(n):
            chosen.append(int(logits.argmax()))
            if step < n - 1:
                logits = self.decode(chosen[-1:], len(ids) + step)[-1]
        return chosen

    def tokens_per_second(self, ids: Sequence[int], n: int) -> tuple[float, float]:
        """Of reading the prompt ``ids``, and of writing ``n`` tokens after it; the seconds are the process's own on a processor.

        On one thread and an idle machine they are those of the clock; on a busy one they leave out the wait for a processor.
        """
        start = time.process_time()
        self.decode(ids)
        read = time.process_time()
        for step in range(n):
            self.decode([int(ids[step % len(ids)])], len(ids) + step)
        return len(ids) / (read - start), n / (time.process_time() - read)

    def tokenise(self, text: str) -> list[int]:
        """The ids of a text, special tokens parsed and none added."""
        vocabulary = ctypes.c_void_p(self._library.llama_model_get_vocab(ctypes.c_void_p(self._model)))
        raw, ids = text.encode(), (ctypes.c_int32 * (len(text.encode()) + 8))()
        n = self._library.llama_tokenize(vocabulary, raw, len(raw), ids, len(ids), False, True)
        return list(ids[:n])


@contextlib.contextmanager
def load(path: str | Path, tokens: int = 256, threads: int = 1, kv_type: str = "f32") -> Iterator[LlamaCpp]:
    """A GGUF file in llama.cpp, with room for ``tokens`` tokens, until the context closes.

    Args:
        kv_type: of the cache: ``f32``, without flash attention, to compare numbers; ``f16`` as llama.cpp has it by default.
    Raises:
        RuntimeUnavailable: no wheel, or one that cannot be called.
        ValueError: llama.cpp does not load the file; the message has its last words.
    """
    library, log = _library(), []
    listener = _LOG(lambda level, text, data: log.append(text.decode(errors="replace")))
    library.llama_log_set(listener, None)
    params = _Params()
    library.llama_model_default_params(ctypes.byref(params))
    model = library.llama_model_load_from_file(str(path).encode(), params)
    context = None
    try:
        if model:
            settings = _context_params(library, tokens, threads, KV_TYPES[kv_type])
            context = library.llama_init_from_model(model, settings)
        if not context:
            raise ValueError(f"llama.cpp does not load {path}: {' '.join(''.join(log[-6:]).split())}")
        vocabulary = ctypes.c_void_p(library.llama_model_get_vocab(ctypes.c_void_p(model)))
        yield LlamaCpp(library, model, context, log, library.llama_vocab_n_tokens(vocabulary))
    finally:
        if context:
            library.llama_free(ctypes.c_void_p(context))
        if model:
            library.llama_model_free(ctypes.c_void_p(model))
        library.llama_log_set(_SILENT, None)


_SILENT = _LOG(lambda level, text, data: None)  # the last listener stays: llama.cpp may write at exit
