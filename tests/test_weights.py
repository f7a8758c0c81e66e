"""safetensors -> device: fused, in the target dtype; every damaged file is rejected with the reason."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import (
    add_sentence_transformers_files,
    change_json,
    nomic_tensors,
    transformers_names,
    write_bert,
    write_nomic,
)
from torch import Tensor

from unpadded.checkpoint.reader import open_checkpoint
from unpadded.checkpoint.safetensors_header import read_headers
from unpadded.errors import WeightsError
from unpadded.model import tensor_loader
from unpadded.model.weights import (
    EncoderWeights,
    load_dense,
    load_weights,
    packed_linear,
    plain_weights,
)
from unpadded_kernels import avx512
from unpadded_kernels.avx512 import PackedLinear

CPU = torch.device("cpu")
SMALL = {"vocabulary": 64, "tokenizer": False}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> EncoderWeights:
    return load_weights(open_checkpoint(folder), device=CPU, dtype=dtype)


def flat(weights: EncoderWeights) -> list[Tensor]:
    """Return every tensor of the nested dataclasses, in the order of their fields."""

    def tensors(value: object) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            for item in value:
                yield from tensors(item)
        elif is_dataclass(value):
            for attribute in fields(value):
                yield from tensors(getattr(value, attribute.name))

    return list(tensors(weights))


def same(first: EncoderWeights, second: EncoderWeights) -> bool:
    pairs = zip(flat(first), flat(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of the single file by name, with `__` for a dot; None removes one."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize("prefix", ["", "bert.", "model.", "0.auto_model.", "model.bert."])
@pytest.mark.parametrize("shards", [1, 3])
def test_prefixes_and_shards_load_the_same(prefix: str, shards: int, tmp_path: Path) -> None:
    plain = load(write_nomic(tmp_path / "plain", **SMALL))
    assert same(plain, load(write_nomic(tmp_path / "other", prefix=prefix, shards=shards, **SMALL)))


def test_legacy_transformers_and_mixed_names_load_the_same(tmp_path: Path) -> None:
    legacy, modern = write_nomic(tmp_path / "a", **SMALL), write_nomic(tmp_path / "b", names="transformers", **SMALL)
    assert same(load(legacy), load(modern))
    tensors = nomic_tensors(2, 128, 256, 64, gated=True, biases=False)
    renamed = transformers_names(tensors)
    second_half = {name: tensor for name, tensor in renamed.items() if "layers.1." in name}
    first_half = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    save_file(first_half | second_half, modern / "model.safetensors")
    assert same(load(legacy), load(modern))


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "geglu"])
def test_biases_of_legacy_checkpoints(activation: str, tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, activation=activation, biases=True, **SMALL)
    stored = load_file(folder / "model.safetensors")
    for index, layer in enumerate(load(folder).layers):
        of = f"encoder.layers.{index}."
        up = ["mlp.fc1"] if activation == "gelu" else ["mlp.fc12", "mlp.fc11"]
        names = {"qkv": ["attn.Wqkv"], "out": ["attn.out_proj"], "up": up, "down": ["mlp.fc2"]}
        for slot, linear in layer.linears.items():
            for part in ("weight", "bias"):
                expected = torch.cat([stored[f"{of}{name}.{part}"] for name in names[slot]])
                assert torch.equal(getattr(linear, part), expected), (slot, part)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_cast_is_that_of_torch(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, dtype=stored, **SMALL)
    expected = load_file(folder / "model.safetensors")
    weights = load(folder, dtype)
    assert {tensor.dtype for tensor in flat(weights)} == {dtype}
    assert torch.equal(weights.word, expected["embeddings.word_embeddings.weight"].to(dtype))
    assert torch.equal(weights.layers[1].mlp.down.weight, expected["encoder.layers.1.mlp.fc2.weight"].to(dtype))


@pytest.mark.parametrize("piece", [1000, 4096, 20_000])
def test_tensors_longer_than_a_piece(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_nomic(tmp_path, names="transformers", **SMALL)
    whole = load(folder, torch.float16)
    monkeypatch.setattr(tensor_loader, "PIECE", piece)
    assert same(whole, load(folder, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_matrices_are_the_same_matrices(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, **SMALL)
    whole = load(folder, dtype)
    if not avx512.can_pack(whole.word):
        pytest.skip("needs AVX-512 and a C compiler")
    for weights in (
        load_weights(open_checkpoint(folder), device=CPU, dtype=dtype, change=packed_linear),
        whole.map_linears(packed_linear),
    ):
        for layer in weights.layers:
            assert all(isinstance(linear, PackedLinear) for linear in layer.linears.values())
        assert same(plain_weights(weights), whole)


def test_the_weights_outlive_the_file(tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, **SMALL)
    weights = load(folder)
    before = weights.layers[0].qkv.linear.weight.clone()
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes(size))
    assert torch.equal(weights.layers[0].qkv.linear.weight, before)


def test_names_of_checkpoints_converted_from_tensorflow(tmp_path: Path) -> None:
    folder = write_bert(tmp_path, **SMALL)
    plain = load(folder)
    path = folder / "model.safetensors"
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path)
    assert same(plain, load(folder))


def test_heads_and_buffers_are_ignored(tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, prefix="bert.", **SMALL)
    plain = load(folder)
    rewrite(
        folder,
        cls__predictions__decoder__weight=torch.zeros(64, 128),
        bert__embeddings__position_ids=torch.arange(512),
        bert__encoder__layers__0__attn__rotary_emb__inv_freq=torch.ones(32),
    )
    assert same(plain, load(folder))


def test_all_mismatches_are_listed_in_one_error(tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, **SMALL)
    rewrite(
        folder,
        encoder__layers__0__attn__Wqkv__weight=None,
        emb_ln__bias=None,
        encoder__layers__1__mlp__fc2__weight=torch.zeros(128, 255),
        encoder__layers__1__norm1__weight=torch.zeros(128, dtype=torch.int32),
        encoder__layers__2__norm1__weight=torch.zeros(128),
        encoder__layers__1__attn__Wqkv__bias=torch.zeros(384),
    )
    with pytest.raises(WeightsError) as error:
        load(folder)
    message = str(error.value)
    assert "missing: encoder.layers.0.attn.Wqkv.weight (384, 128)" in message
    assert "missing: emb_ln.bias (128,)" in message
    assert "mis-shaped: encoder.layers.1.mlp.fc2.weight (128, 255) instead of (128, 256)" in message
    assert "stored as I32 instead of F64, F32, F16, BF16: encoder.layers.1.norm1.weight" in message
    assert "surplus: encoder.layers.2.norm1.weight (128,)" in message
    assert "surplus: encoder.layers.1.attn.Wqkv.bias (384,)" in message
    assert message.count("\n  ") == 6 and "model.safetensors" in message and "check that" in message


def test_a_tensor_under_two_names_is_rejected(tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, **SMALL)
    rewrite(folder, bert__emb_ln__bias=torch.zeros(128))
    with pytest.raises(WeightsError, match=r"stored twice: .*emb_ln\.bias"):
        load(folder)
    rewrite(folder, bert__emb_ln__bias=None, embeddings__LayerNorm__bias=torch.zeros(128))
    with pytest.raises(WeightsError, match=r"surplus: embeddings\.LayerNorm\.bias"):
        load(folder)


def test_the_word_table_may_be_longer_than_the_vocabulary_but_not_shorter(tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, **SMALL)
    change_json(folder / "config.json", vocab_size=50)  # padded to 64
    assert open_checkpoint(folder).spec.vocabulary == 64
    change_json(folder / "config.json", vocab_size=30)
    assert open_checkpoint(folder).spec.vocabulary == 64 and load(folder).word.shape == (64, 128)
    change_json(folder / "config.json", vocab_size=65)
    with pytest.raises(WeightsError, match=r"mis-shaped: .*word_embeddings.weight \(64, 128\) instead of \(65, 128\)"):
        load(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_rejected_by_tensor(bad: float, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, **SMALL)
    damaged = torch.ones(128)
    damaged[77] = bad
    rewrite(folder, encoder__layers__1__norm2__weight=damaged)
    with pytest.raises(WeightsError, match=r"layers\.1\.norm2\.weight in .* not finite; replace the file"):
        load(folder, dtype)


def test_a_value_that_overflows_the_target_is_rejected_by_tensor(tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, **SMALL)
    large = torch.zeros(128)
    large[5] = -70000.0
    rewrite(folder, encoder__layers__0__norm1__bias=large)
    with pytest.raises(WeightsError, match=r"norm1\.bias in .* does not fit torch\.float16: it contains 70000.*65504"):
        load(folder, torch.float16)
    assert load(folder, torch.bfloat16).layers[0].attention_norm.bias[5] == torch.tensor(-70000.0).bfloat16()


def test_finite_values_whose_sum_overflows_are_loaded(tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, **SMALL)
    rewrite(folder, encoder__layers__0__norm1__weight=torch.full((128,), 60000.0))
    assert load(folder, torch.float16).layers[0].attention_norm.weight[0] == 60000.0


def cut_data(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 64)


def not_json(path: Path) -> None:
    path.write_bytes((64).to_bytes(8, "little") + b"{" * 64)


def wrong_size(path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"w": [1.0]}))


def torch_saved(path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_data, "is truncated"),
        (cut_header, "is truncated or not safetensors"),
        (empty, "is truncated or not safetensors"),
        (garbage, "is truncated or not safetensors"),
        (not_json, "is truncated or not safetensors"),
        (wrong_size, "is truncated or not safetensors: .*invalid shape, data type, or offset for tensor"),
        (pickled, "pickles are never loaded"),
        (torch_saved, "pickles are never loaded"),
    ],
)
def test_a_damaged_file_is_rejected_with_the_reason(damage, message: str, tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, **SMALL)
    damage(folder / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"model\.safetensors.*{message}"):
        open_checkpoint(folder)


def test_a_file_truncated_after_its_header_was_read_is_rejected(tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, **SMALL)
    checkpoint = open_checkpoint(folder)
    headers = read_headers(checkpoint.weight_files)
    cut_data(folder / "model.safetensors")
    last = max(headers, key=lambda tensor: tensor.stop)
    with pytest.raises(WeightsError, match=r"model\.safetensors ends at byte"):
        tensor_loader.TensorLoader(CPU, torch.float32).load(last.shape, (last,))


def test_dense_modules(tmp_path: Path) -> None:
    folder = add_sentence_transformers_files(write_bert(tmp_path, **SMALL), dense=(128, 32))
    stored = load_file(folder / "2_Dense" / "model.safetensors")
    ((weight, bias, activation, _),) = load_dense(open_checkpoint(folder).dense, device=CPU)
    assert torch.equal(weight, stored["linear.weight"]) and weight.shape == (32, 128)
    assert bias is not None and torch.equal(bias, stored["linear.bias"])
    assert activation == "tanh"
    change_json(folder / "2_Dense" / "config.json", bias=False)
    with pytest.raises(WeightsError, match=r"surplus: linear\.bias"):
        load_dense(open_checkpoint(folder).dense, device=CPU)


PEAK = """
import re, sys, torch
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from unpadded.checkpoint.reader import open_checkpoint
from unpadded.model.weights import load_weights
checkpoint = open_checkpoint(sys.argv[1])
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
torch.ones(8).half().sum()
before = peak()
weights = load_weights(checkpoint, device=torch.device("cpu"), dtype=torch.float16)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_fp32_as_fp16_takes_little_more_memory_than_the_result(tmp_path: Path) -> None:
    folder = write_nomic(tmp_path, hidden=256, heads=4, intermediate=1024, layers=12, tokenizer=False)
    size = (folder / "model.safetensors").stat().st_size
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert size > 75e6
    assert 0.4 * size < int(run.stdout) < 0.8 * size  # bench/loading.py measures it at 547 MB
