"""Files that programs wrote, with bytes that are not theirs: GGUF, safetensors, Parquet and npz are read or refused."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification

from gguf_files import a_gguf_file, damaged_gguf
from meftbench.backbones import gguf as loading
from meftbench.backbones.build import build_model
from meftbench.backbones.gguf import dequantized
from meftbench.errors import UserError, is_out_of_memory
from meftbench.memory_limit import memory_limit
from meftbench.tasks.data import load_splits
from mutations import hostile, mutated, refused_or, watched
from task_data import a_task, write

MiB = 2**20
TINY = BertConfig(
    vocab_size=20,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=16,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of `content` replaced, in up to three places, by others or by numbers at the ends of their ranges; in one
    of four it is cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        # Most near the ends, where such files have what they say of themselves.
        near = draw(st.integers(0, min(300, len(changed))))
        place = draw(st.sampled_from([near, max(0, len(changed) - near), draw(st.integers(0, len(changed)))]))
        new = draw(st.binary(max_size=8) | st.sampled_from([b"\xff" * 4, b"\x7f" * 8, b"\x80" * 9, bytes(8)]))
        changed[place : place + draw(st.sampled_from([len(new), 0, 8]))] = new
    if draw(st.integers(0, 3)) == 0:
        del changed[draw(st.integers(0, len(changed))) :]
    return bytes(changed)


def read_with_little_memory(read, *arguments):
    """What reads the file answers or refuses, or needs more memory than there is, which is a result of its cell."""
    with memory_limit(512 * MiB):
        try:
            return refused_or(read, *arguments)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return error


# --- models ---


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    pytest.importorskip("gguf", reason="writes GGUF files; pip install 'meftbench[gguf]'")
    return a_gguf_file(tmp_path_factory.mktemp("gguf") / "sound.gguf").read_bytes()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEFTBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "_TEMPORARY", {})


def test_the_sound_gguf_file_is_read(gguf_bytes, cache, tmp_path):
    """So that damage alone is why another is refused."""
    (tmp_path / "sound.gguf").write_bytes(gguf_bytes)

    assert (dequantized("sound", tmp_path / "sound.gguf") / "config.json").is_file()


@hostile("GGUF file")
@given(data=st.data())
def test_a_damaged_gguf_file_is_one_line(gguf_bytes, cache, tmp_path, data):
    """Counts, lengths, dimensions, offsets and types of its header may say anything."""
    file = tmp_path / "model.gguf"
    file.write_bytes(data.draw(damaged_gguf(gguf_bytes)))
    os.utime(file, (1, data.draw(st.integers(1, 2**31))))  # the cache knows files by size and time

    with watched(tmp_path):
        read_with_little_memory(dequantized, "model", file)


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    """config.json, and the weights as safetensors: the length of their header, the header, and what is behind it."""
    folder = tmp_path_factory.mktemp("model")
    BertForSequenceClassification(TINY).save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(weights[:8], "little")
    return (folder / "config.json").read_bytes(), json.loads(weights[8:length]), weights[length:]


@hostile("weights of a model")
@given(data=st.data())
def test_damaged_weights_of_a_model_are_one_line(model_files, tmp_path, data):
    config, header, tensors = model_files
    text = data.draw(mutated(header, "json"))
    size = data.draw(st.sampled_from([len(text)] * 6 + [0, 1, 2**31, 2**63, 2**64 - 1]))
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_bytes(config)
    weights = size.to_bytes(8, "little") + text + tensors
    (tmp_path / "model" / "model.safetensors").write_bytes(weights[: data.draw(st.sampled_from([len(weights), 100]))])

    with watched(tmp_path):
        read_with_little_memory(build_model, str(tmp_path / "model"))


# --- data ---


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("parquet")
    write(folder, "train", form="parquet")
    return (folder / "train.parquet").read_bytes()


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Temporary folders, which `datasets` needs to read, lie in the folder of the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@hostile("data: Parquet")
@given(data=st.data())
def test_a_damaged_parquet_file_is_one_line(parquet, caches, tmp_path, data):
    (tmp_path / "train.parquet").write_bytes(data.draw(damaged(parquet)))
    (tmp_path / "validation.parquet").write_bytes(parquet)

    with watched(tmp_path):
        refused_or(lambda: load_splits(a_task(tmp_path), None))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> bytes:
    """Images and labels in an npz file."""
    file = Path(tmp_path_factory.mktemp("npz") / "train.npz")
    np.savez(file, images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4) % 2)
    return file.read_bytes()


@hostile("data: npz")
@given(data=st.data())
def test_a_damaged_npz_file_is_one_line(images, tmp_path, data):
    """Nothing in it is unpickled."""
    (tmp_path / "train.npz").write_bytes(data.draw(damaged(images)))
    (tmp_path / "validation.npz").write_bytes(images)
    task = a_task(tmp_path, kind="images", texts=("image",), label="label", labels=("a", "b"), scores=("accuracy",))

    with watched(tmp_path):
        refused = refused_or(lambda: load_splits(task, None))
        assert isinstance(refused, UserError) or refused
