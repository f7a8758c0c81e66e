"""Export a checkpoint for other libraries; each format in the environment that has its tools.

    python export.py onnx FOLDER TARGET
    python export.py ctranslate2 FOLDER TARGET
    python export.py onnx-int8 ONNX TARGET
    python export.py openvino ONNX TARGET
    python export.py openvino-int8 OPENVINO TARGET TOKENIZER

TARGET is a folder, which exists only if the export is complete. A JSON array of texts to calibrate with is on stdin.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

CALIBRATION_LENGTH = 512  # tokens, which MiniLM has at most


def onnx(folder: Path, target: Path) -> None:
    """Write model.onnx, from input_ids and attention_mask to the last hidden state, of any batch and length."""
    import torch
    from transformers import AutoModel

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # OpenVINO fuses eager attention. The export of sdpa replaces NaN after the softmax, which is not fused:
            # 3.5 GB instead of 1.3 for batches of 32 paragraphs.
            self.model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.randint(5, 1000, (2, 16))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    shape = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    torch.onnx.export(
        Encoder(),
        (ids, mask),
        target / "model.onnx",
        input_names=["input_ids", "attention_mask"],
        output_names=["hidden"],
        dynamic_shapes=(shape, shape),
        dynamo=True,
        external_data=False,
    )


def onnx_int8(source: Path, target: Path) -> None:
    """Quantize the weights per channel; activations are quantized while the model runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source / "model.onnx", target / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)


def openvino(source: Path, target: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(source / "model.onnx"), target / "model.xml", compress_to_fp16=False)


def openvino_int8(source: Path, target: Path, tokenizer: Path) -> None:
    """Quantize weights and activations, whose ranges are those of the texts on stdin."""
    import nncf
    import numpy as np
    import openvino
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    loaded.enable_truncation(CALIBRATION_LENGTH)
    loaded.no_padding()

    def inputs(text: str) -> dict[str, np.ndarray]:
        ids = np.array([loaded.encode(text).ids])
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    found = json.loads(sys.stdin.read())
    model = openvino.Core().read_model(source / "model.xml")
    quantized = nncf.quantize(
        model, nncf.Dataset(found, inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(found)
    )
    openvino.save_model(quantized, target / "model.xml", compress_to_fp16=False)


def ctranslate2(folder: Path, target: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(target), force=True)


FORMATS: dict[str, Callable[..., None]] = {
    "onnx": onnx,
    "onnx-int8": onnx_int8,
    "openvino": openvino,
    "openvino-int8": openvino_int8,
    "ctranslate2": ctranslate2,
}

if __name__ == "__main__":
    name, source, target, *rest = sys.argv[1:]
    part = Path(f"{target}.part")
    part.mkdir(parents=True, exist_ok=True)
    FORMATS[name](Path(source), part, *map(Path, rest))
    part.rename(target)
