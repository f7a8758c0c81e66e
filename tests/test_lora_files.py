"""jina-embeddings-v3 in the layout of transformers 5: each adapter in a PEFT folder inside the encoder's folder.

The reference is the class of transformers with W + alpha / rank * B @ A as its weights. On 2026-11-26 its own
`load_adapter` (transformers 5.24.0, PEFT 0.21.2) computed the same values within 5.2e-7, for all tasks and both names.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import change_json, write_checkpoint
from support.family_checks import assert_independent, assert_parity, last_hidden_state, random_ids
from test_family_jina_v3 import JINA_V3, PROMPTS, SIZES, TASKS, model_of, published_names

import unpadded
from unpadded.checkpoint.families import jina_v3
from unpadded.errors import CheckpointError, ConfigError, OptionError, WeightsError
from unpadded.integrations.transformers import UnpaddedModel

FOLDERS = {task: task.replace(".", "_").replace("-", "_") for task in TASKS}
# jinaai/jina-embeddings-v3-hf, at d18862d: every adapter has this configuration, in bfloat16 and under these names
PUBLISHED = {
    "peft_type": "LORA",
    "base_model_name_or_path": None,
    "r": 4,
    "lora_alpha": 1,
    "lora_dropout": 0.0,
    "target_modules": [
        "word_embeddings",
        "token_type_embeddings",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "fc1",
        "fc2",
        "dense",
    ],
}
HUB = {key: value for key, value in (JINA_V3 | SIZES).items() if key not in ("auto_map", "matryoshka_dimensions")} | {
    "model_type": "jina_embeddings_v3",
    "architectures": ["JinaEmbeddingsV3Model"],
}
# the other keys that PEFT 0.21.2 writes
WRITTEN = {
    "auto_mapping": {"base_model_class": "JinaEmbeddingsV3Model"},
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "loftq_config": {},
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "use_dora": False,
    "use_rslora": False,
}
RANK = 4


def random_adapters(model):
    """Return random factors (A, B) in PEFT's layout by task and module of transformers, including the pooler."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for task in TASKS:
        found[task] = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                rows, columns = module.weight.shape
                inner, outer = (rows, columns) if isinstance(module, torch.nn.Embedding) else (columns, rows)
                a = 0.2 * torch.randn(RANK, inner, generator=generator)
                found[task][name] = a, 0.2 * torch.randn(outer, RANK, generator=generator)
    return found


def merged(model, factors, scale):
    """Return the model of transformers with an adapter applied to its weights."""
    tensors = model.state_dict()
    for name, (a, b) in factors.items():
        change = b.double() @ a.double()
        change = change.T if "embeddings" in name else change
        tensors = tensors | {f"{name}.weight": (tensors[f"{name}.weight"].double() + scale * change).float()}
    return model_of(tensors=tensors)


def stored_name(name, published):
    """Return a module's name in an adapter file; the published files have the old names, except for q, k and v."""
    if not published:
        return f"base_model.model.{name}"
    return "roberta." + name.replace("layers.", "encoder.layers.").replace("self_attn.o_proj", "mixer.out_proj")


def write_adapters(folder, adapters, *, published=True, **config):
    for task, factors in adapters.items():
        tensors = {}
        for name, pair in factors.items():
            form = "lora_embedding_{}" if "embeddings" in name else "lora_{}.weight"
            for which, factor in zip("AB", pair, strict=True):
                tensors[f"{stored_name(name, published)}.{form.format(which)}"] = factor
        subfolder = folder / FOLDERS[task]
        subfolder.mkdir()
        save_file(tensors, subfolder / "adapter_model.safetensors")
        (subfolder / "adapter_config.json").write_text(json.dumps(PUBLISHED | config))
    return folder


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def adapters(model):
    return random_adapters(model)


@pytest.fixture
def folder(model, adapters, tmp_path):
    return write_adapters(write_checkpoint(tmp_path, HUB, published_names(model.state_dict())), adapters)


@pytest.mark.parametrize("task", [None, *TASKS])
def test_every_task_matches_transformers(folder, model, adapters, task):
    engine = unpadded.load(folder, device="cpu")
    assert engine.checkpoint.prompts == dict.fromkeys(TASKS, "") | PROMPTS
    reference = model if task is None else merged(model, adapters[task], 1 / RANK)
    assert_parity(engine, last_hidden_state(reference), task=task)


def test_files_saved_by_transformers_and_peft(model, adapters, tmp_path):
    """Both have the names of transformers, another alpha, and all keys that PEFT writes."""
    config = json.loads(model.config.to_json_string())
    folder = write_checkpoint(tmp_path, config, model.state_dict())
    write_adapters(folder, adapters, published=False, lora_alpha=6, **WRITTEN)
    engine = unpadded.load(folder, device="cpu")
    assert (engine.checkpoint.spec.lora.rank, engine.checkpoint.spec.lora.scale) == (4, 1.5)
    for task in TASKS[:2]:
        assert_parity(engine, last_hidden_state(merged(model, adapters[task], 1.5)), (1, 7, 65), task=task)


def test_a_saved_copy_keeps_the_adapters(folder, tmp_path):
    UnpaddedModel.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    ids = random_ids((7, 40))
    copied, original = (
        unpadded.load(one, device="cpu").encode(ids, task=TASKS[0]) for one in (tmp_path / "copy", folder)
    )
    assert np.array_equal(copied, original)


def test_q_k_and_v_have_separate_factors(folder, model, adapters):
    encoder = unpadded.load(folder, device="cpu")._pipeline.runner.encoder
    for task in (TASKS[3], TASKS[0]):
        for index, layer in enumerate(encoder.weights_of(task).layers):
            parts = []
            for part in "qkv":
                name = f"layers.{index}.self_attn.{part}_proj"
                a, b = adapters[task][name]
                parts.append(torch.addmm(model.state_dict()[f"{name}.weight"], b, a, alpha=1 / RANK))
            assert torch.equal(layer.qkv.linear.weight, torch.cat(parts))


def test_a_text_is_independent_of_its_batch(folder):
    assert_independent(folder, "float32")
    texts = random_ids((1, 3, 40, 65, 130))
    alone = {task: unpadded.load(folder, device="cpu").encode(texts, task=task) for task in (None, *TASKS)}
    assert len({vectors.tobytes() for vectors in alone.values()}) == len(alone)
    engine = unpadded.load(folder, device="cpu")
    for index in np.random.default_rng(0).permutation(18):
        task = (None, *TASKS)[index % 6]
        found = [engine.encode([text], task=task) for text in texts]
        assert np.array_equal(np.concatenate(found), alone[task])


def test_a_task_without_its_adapter_folder_raises(model, tmp_path):
    folder = write_checkpoint(tmp_path, HUB, published_names(model.state_dict()))
    engine = unpadded.load(folder, device="cpu")
    assert_parity(engine, last_hidden_state(model), (1, 7, 65))
    message = f"task 'text-matching' is missing from {folder.name}: {folder / 'text_matching'}; download it"
    with pytest.raises(OptionError, match=message):
        engine.encode(random_ids([3]), task="text-matching")


def test_a_missing_adapter_folder_raises(folder):
    (folder / "separation" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"separation/adapter_config.json cannot be read: No such file"):
        unpadded.load(folder, device="cpu")


def test_a_pickled_adapter_raises(folder):
    file = folder / "separation" / "adapter_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(WeightsError, match=r"separation/adapter_model.safetensors is absent, and pickled adapters are"):
        unpadded.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("bias", "lora_only"),
        ("init_lora_weights", "pissa"),
        ("use_dora", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["pooler"]),
        ("rank_pattern", {"fc1": 8}),
        ("alpha_pattern", {"fc1": 8}),
        ("layers_to_transform", [0]),
        ("exclude_modules", ["fc1"]),
        ("target_modules", "all-linear"),
        ("target_modules", ["q_proj", "v_proj"]),
        ("unknown_feature", 1),
    ],
)
def test_unsupported_adapter_settings_raise(folder, key, value):
    change_json(folder / "classification" / "adapter_config.json", **{key: value})
    with pytest.raises(ConfigError, match=rf"{key} in .*classification/adapter_config.json = .* is not implemented"):
        unpadded.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("classification/adapter_config.json", {"r": 8}, r"\(rank, scale\): .*'classification': \(8, 0.125\)"),
        ("classification/adapter_config.json", {"lora_alpha": 2}, r"'classification': \(4, 0.5\).*; only equal"),
        ("classification/adapter_config.json", {"r": None}, "lacks r; add"),
        ("classification/adapter_config.json", {"r": 0}, "r = 0 is not a whole number"),
    ],
)
def test_contradictory_settings_raise(folder, file, changes, message):
    change_json(folder / file, **changes)
    with pytest.raises(ConfigError, match=message):
        unpadded.load(folder, device="cpu")


def test_the_name_of_a_task_is_no_path():
    lora = jina_v3.read_config(HUB | {"lora_adaptations": ["../other"]}).lora
    assert lora is not None and lora.folders == ("___other",)


def test_missing_and_surplus_tensors_are_listed(folder):
    file = folder / "separation" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["roberta.encoder.layers.1.self_attn.k_proj.lora_B.weight"]
    tensors["roberta.encoder.layers.0.mlp.fc1.lora_magnitude_vector"] = torch.ones(256)
    save_file(tensors, file)
    with pytest.raises(WeightsError) as error:
        unpadded.load(folder, device="cpu")
    assert str(file) in str(error.value)
    assert "missing: encoder.layers.1.self_attn.k_proj.lora_B.weight (128, 4)" in str(error.value)
    assert "surplus: roberta.encoder.layers.0.mlp.fc1.lora_magnitude_vector (256,)" in str(error.value)
