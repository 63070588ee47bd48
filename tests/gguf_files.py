"""A small GGUF file, and the same damaged where its header says how much of what there is."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

# Bytes of a value by its type, of the GGUF specification; 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


class Place(NamedTuple):
    """A whole number in the header: where it lies, its bytes, and what it says."""

    offset: int
    size: int
    what: str


def a_gguf_file(file: Path) -> Path:
    """A llama of one layer, 16 wide, in float32, with a tokenizer of 16 tokens."""
    import gguf

    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", "w", "1", "w1", *(f"t{number}" for number in range(6, 16))])
    writer.add_token_types([1] * 16)
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    square, row = np.zeros((16, 16), np.float32), np.ones(16, np.float32)
    of_layer = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), square)
    of_layer |= {"attn_norm": row, "ffn_norm": row}
    tensors = {"token_embd": square, "output": square, "output_norm": row}
    tensors |= {f"blk.0.{name}": tensor for name, tensor in of_layer.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def places_of(content: bytes) -> list[Place]:
    """Every number of a sound header by which a reader finds its way, and every value of one number."""
    return list(_walk(content))


def _walk(content: bytes) -> Iterator[Place]:
    def number(size: int) -> int:
        return int.from_bytes(content[at : at + size], "little")

    yield Place(4, 4, "version")
    yield Place(8, 8, "tensors")
    yield Place(16, 8, "values")
    (_, tensors, values), at = struct.unpack_from("<IQQ", content, 4), 24
    for _ in range(values):
        yield Place(at, 8, "length of a name")
        at += 8 + number(8)
        yield Place(at, 4, "type of a value")
        kind, at = number(4), at + 4
        count = 1
        if kind == _ARRAY:
            yield Place(at, 4, "type of an array")
            yield Place(at + 4, 8, "length of an array")
            kind, at = number(4), at + 4
            count, at = number(8), at + 8
        for _ in range(count):
            yield Place(at, 8 if kind == _STRING else _SIZES[kind], "length of a text" if kind == _STRING else "value")
            at += 8 + number(8) if kind == _STRING else _SIZES[kind]
    for _ in range(tensors):
        yield Place(at, 8, "length of a tensor's name")
        at += 8 + number(8)
        yield Place(at, 4, "number of dimensions")
        dimensions, at = number(4), at + 4
        for _ in range(dimensions):
            yield Place(at, 8, "dimension")
            at += 8
        yield Place(at, 4, "type of a tensor")
        yield Place(at + 4, 8, "offset of a tensor")
        at += 12


_EXTREMES = [0, 1, 2, 3, 9, 255, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]


@st.composite
def damaged_gguf(draw: st.DrawFn, content: bytes) -> bytes:
    """One to three numbers of the header replaced by others; in one of four files, also bytes changed or cut off."""
    damaged = bytearray(content)
    kinds: dict[str, list[Place]] = {}
    for place in places_of(content):
        kinds.setdefault(place.what, []).append(place)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(kinds[draw(st.sampled_from(sorted(kinds)))]))
        value = draw(st.sampled_from(_EXTREMES) | st.integers(0, 2**64 - 1)) % 2 ** (8 * place.size)
        damaged[place.offset : place.offset + place.size] = value.to_bytes(place.size, "little")
    if draw(st.integers(0, 3)) == 0:
        start = draw(st.integers(0, len(damaged)))
        damaged[start : start + draw(st.integers(0, 64))] = draw(st.binary(max_size=64))
    if draw(st.integers(0, 3)) == 0:
        del damaged[draw(st.integers(0, len(damaged))) :]
    return bytes(damaged)
