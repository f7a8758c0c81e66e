"""jina-embeddings-v3 against transformers, and its adapters against the published parametrization."""

import asyncio
import copy
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import sentence_transformers
import torch
import torch.nn.functional as F
from support.checkpoints import add_sentence_transformers_files, write_checkpoint, write_json
from support.devices import HAS_CUDA
from support.family_checks import (
    VOCABULARY,
    assert_cuda_agrees,
    assert_independent,
    assert_parity,
    last_hidden_state,
    random_ids,
    relative_error,
    seeded,
)
from test_family_xlm_roberta import write_tokenizer
from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

import unpadded
from unpadded.checkpoint.families import jina_v3
from unpadded.checkpoint.reader import open_checkpoint
from unpadded.checkpoint.spec import Rotary
from unpadded.errors import ConfigError, OptionError, WeightsError
from unpadded.integrations.accelerate import accelerate
from unpadded.integrations.sentence_transformers import SentenceTransformer
from unpadded.model.batch import pack

TASKS = ["retrieval.query", "retrieval.passage", "separation", "classification", "text-matching"]
PROMPTS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
}
JINA_V3 = {  # the published keys
    "model_type": "xlm-roberta",
    "architectures": ["XLMRobertaLoRA"],
    "auto_map": {"AutoModel": "jinaai/xlm-roberta-flash-implementation--modeling_lora.XLMRobertaLoRA"},
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "classifier_dropout": None,
    "emb_pooler": None,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "load_trained_adapters": True,
    "lora_adaptations": TASKS,
    "lora_alpha": 1,
    "lora_dropout_p": 0.0,
    "lora_main_params_trainable": False,
    "lora_rank": 4,
    "matryoshka_dimensions": [32, 64, 128, 256, 512, 768, 1024],
    "max_position_embeddings": 8194,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "output_past": True,
    "pad_token_id": 1,
    "position_embedding_type": "rotary",
    "rotary_emb_base": 20000.0,
    "task_instructions": dict.fromkeys(TASKS, "") | PROMPTS,
    "truncate_dim": None,
    "type_vocab_size": 1,
    "use_cache": True,
    "use_flash_attn": True,
    "vocab_size": 250002,
}
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
}
SMALL = JINA_V3 | SIZES | {"matryoshka_dimensions": [32, 64, 128]}
PLAIN = {key: value for key, value in SMALL.items() if not key.startswith("lora_")}
MODERN = SIZES | {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "max_position_embeddings": 8194, "pad_token_id": 1}
RANK, ALPHA = 4, 1
MATRICES = ("Wqkv", "out_proj", "fc1", "fc2", "word_embeddings", "token_type_embeddings", "dense")


def model_of(sizes=MODERN, tensors=None):
    model = seeded(JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**sizes)))
    if tensors is not None:
        model.load_state_dict(tensors)
    return model


RENAMED = (  # transformers' names, the published ones
    ("embeddings.LayerNorm", "emb_ln"),
    ("layers.", "encoder.layers."),
    ("self_attn.o_proj", "mixer.out_proj"),
    ("post_attention_layernorm", "norm1"),
    ("post_mlp_layernorm", "norm2"),
)


def published_names(tensors):
    """Return tensors of transformers under the names of the published code."""
    found = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            tensor = torch.cat([tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        if ".k_proj." not in name and ".v_proj." not in name:
            name = name.replace("self_attn.q_proj", "mixer.Wqkv")
            for modern, published in RENAMED:
                name = name.replace(modern, published)
            found[f"roberta.{name}"] = tensor
    return found


def modern_names(tensors):
    """Return published tensors under the names of transformers."""
    found = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("roberta.")
        for modern, published in RENAMED:
            name = name.replace(published, modern)
        parts = zip("qkv", tensor.chunk(3), strict=True) if ".Wqkv." in name else [("", tensor)]
        found |= {name.replace("mixer.Wqkv", f"self_attn.{part}_proj"): rows for part, rows in parts}
    return found


def with_adapters(tensors, seed=7):
    """Add adapters to all matrices under published names, with factors large enough to change the vectors."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or not module.endswith(MATRICES):
            found[name] = tensor
            continue
        rows, columns = tensor.shape
        a, b = (RANK, columns), (rows, RANK)
        if module.endswith("embeddings"):
            a, b = (rows, RANK), (RANK, columns)
        start = f"{module}.parametrizations.weight"
        found[f"{start}.original"] = tensor
        found[f"{start}.0.lora_A"] = 0.2 * torch.randn(len(TASKS), *a, generator=generator)
        found[f"{start}.0.lora_B"] = 0.2 * torch.randn(len(TASKS), *b, generator=generator)
    return found


def merged(tensors, task):
    """Apply an adapter as the published code does: X + lora_B @ lora_A * alpha / rank, lora_A @ lora_B for tables."""
    index, found = TASKS.index(task), {}
    for name, tensor in tensors.items():
        if name.endswith(".original"):
            a, b = (tensors[name.replace("original", f"0.lora_{which}")][index].double() for which in "AB")
            change = a @ b if "embeddings" in name else b @ a
            tensor = (tensor.double() + change * ALPHA / RANK).float()
        if ".0.lora_" not in name:
            found[name.replace(".parametrizations.weight.original", ".weight")] = tensor
    return found


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def adapted(model):
    return with_adapters(published_names(model.state_dict()))


@pytest.fixture
def folder(adapted, tmp_path):
    return write_checkpoint(tmp_path, SMALL, adapted)


def test_the_published_configuration():
    spec = jina_v3.read_config(JINA_V3)
    assert (spec.layers, spec.hidden, spec.heads, spec.head_dim, spec.intermediate) == (24, 1024, 16, 64, 4096)
    assert (spec.vocabulary, spec.token_types, spec.position_rows, spec.padding_id) == (250002, 1, 0, None)
    assert spec.activation == "gelu" and not spec.prenorm and spec.norm_eps == 1e-5
    assert spec.biases == ("qkv", "out", "up", "down", "norm")
    assert spec.rotary == Rotary(base=20000.0, trained_length=8194)
    assert (spec.lora.tasks, spec.lora.rank, spec.lora.scale) == (tuple(TASKS), 4, 0.25)
    assert dict(zip(TASKS, spec.lora.prompts, strict=True)) == dict.fromkeys(TASKS, "") | PROMPTS


def test_matches_transformers(model, tmp_path):
    folder = write_checkpoint(tmp_path, PLAIN, published_names(model.state_dict()))
    assert_parity(unpadded.load(folder, device="cpu"), last_hidden_state(model))


def test_the_layout_of_transformers_raises(model, tmp_path, minilm, caplog):
    """The drop-in runs such a checkpoint as sentence-transformers loads it."""
    model.save_pretrained(tmp_path)
    lines = (minilm / "README.md").read_text().splitlines()
    write_tokenizer(tmp_path, lines)
    message = r"model_type = 'jina_embeddings_v3' is not supported; use jinaai/jina-embeddings-v3$"
    for reject in (lambda: open_checkpoint(tmp_path), lambda: accelerate(copy.deepcopy(model))):
        with pytest.raises(ConfigError, match=message):
            reject()
    drop_in, original = (
        kind(str(tmp_path), device="cpu") for kind in (SentenceTransformer, sentence_transformers.SentenceTransformer)
    )
    assert "runs as sentence-transformers loads it" in caplog.text and "use jinaai/jina-embeddings-v3" in caplog.text
    assert np.array_equal(drop_in.encode(lines[:3]), original.encode(lines[:3]))


@pytest.mark.slow
def test_real_width_and_length_match_transformers(tmp_path):
    sizes = {"num_hidden_layers": 1, "vocab_size": VOCABULARY}
    model = model_of(MODERN | {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16} | sizes)
    adapted = with_adapters(published_names(model.state_dict()))
    engine = unpadded.load(write_checkpoint(tmp_path, JINA_V3 | sizes, adapted), device="cpu")
    assert_parity(engine, last_hidden_state(model), (1, 512, 8192))


@pytest.mark.parametrize("task", TASKS)
def test_adapters_match_the_published_parametrization(folder, adapted, task):
    reference = last_hidden_state(model_of(tensors=modern_names(merged(adapted, task))))
    engine = unpadded.load(folder, device="cpu")
    assert_parity(engine, reference, (1, 7, 65, 130), task=task)
    texts = random_ids((1, 65))
    for hidden, without in zip(engine.token_embeddings(texts, task=task), engine.token_embeddings(texts), strict=True):
        assert relative_error(hidden, without) > 0.1


def test_an_adapter_with_word_embeddings_as_input(folder):
    """Rows of the adapted word table, passed as `embeds`, have the same result as ids."""
    encoder = unpadded.load(folder, device="cpu")._pipeline.runner.encoder
    batch = pack(random_ids((7, 65), vocabulary=VOCABULARY), encoder.spec)
    with torch.inference_mode():
        expected = encoder(batch, adapter=TASKS[1])
        rows = F.embedding(batch.input_ids, encoder.weights_of(TASKS[1]).word)
        in_order = replace(batch, input_ids=torch.arange(72, dtype=torch.int32))
        assert torch.equal(encoder(in_order, adapter=TASKS[1], embeds=rows), expected)
        assert not torch.equal(encoder(in_order, adapter=TASKS[2], embeds=rows), expected)


def test_tasks_can_alternate_in_any_order(folder):
    """A task's vectors do not depend on earlier tasks, and without a task no adapter is used."""
    texts = random_ids((3, 40, 65))
    alone = {task: unpadded.load(folder, device="cpu").encode(texts, task=task) for task in (None, *TASKS)}
    assert len({vectors.tobytes() for vectors in alone.values()}) == len(alone)
    engine = unpadded.load(folder, device="cpu")
    for index in np.random.default_rng(0).permutation(18 if HAS_CUDA else 6):
        task = (None, *TASKS)[index % 6]
        assert np.array_equal(engine.encode(texts, task=task), alone[task])


def test_concurrent_calls_with_several_tasks_do_not_mix(folder):
    texts = random_ids((3, 40, 65, 9))
    engine = unpadded.load(folder, device="cpu", token_budget=64)
    alone = {task: engine.encode(texts, task=task) for task in (None, *TASKS)}
    hidden = np.concatenate(engine.token_embeddings(texts, task=TASKS[0]))

    async def together():
        return await asyncio.gather(*(engine.aencode(texts, task=task) for task in alone for _ in range(2)))

    found = asyncio.run(together())
    assert all(np.array_equal(one, alone[task]) for one, task in zip(found[::2], alone, strict=True))
    assert all(np.array_equal(*pair) for pair in zip(found[::2], found[1::2], strict=True))

    wrong = []

    def tokens():
        for _ in range(8):
            wrong.append(not np.array_equal(np.concatenate(engine.token_embeddings(texts, task=TASKS[0])), hidden))

    def vectors():
        for _ in range(8):
            wrong.append(not np.array_equal(engine.encode(texts, task=TASKS[1]), alone[TASKS[1]]))

    threads = [threading.Thread(target=run) for run in (tokens, vectors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 16 and not any(wrong)


def test_an_error_while_changing_the_task_leaves_no_mixture(folder, monkeypatch):
    texts = random_ids((3, 40))
    engine = unpadded.load(folder, device="cpu")
    alone = engine.encode(texts, task=TASKS[0])
    real, adapted = torch.addmm, []

    def failing(*args, alpha=1, **options):
        adapted.append(alpha)
        if len(adapted) == 3:
            raise RuntimeError("no more")
        return real(*args, alpha=alpha, **options)

    monkeypatch.setattr(torch, "addmm", failing)
    with pytest.raises(RuntimeError, match="no more"):
        engine.encode(texts, task=TASKS[1])
    monkeypatch.undo()
    assert adapted == [0.25] * 3
    assert np.array_equal(engine.encode(texts, task=TASKS[0]), alone)


def test_a_task_selects_prompt_and_adapter(folder, minilm):
    lines = [line for line in (minilm / "README.md").read_text().splitlines() if line.strip()]
    write_tokenizer(folder, lines)
    add_sentence_transformers_files(folder, prompts=PROMPTS)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0] |= {"type": "custom_st.Transformer", "kwargs": ["task"]}
    write_json(folder / "modules.json", modules)
    engine = unpadded.load(folder, device="cpu")
    assert engine.checkpoint.prompts == dict.fromkeys(TASKS, "") | PROMPTS
    assert engine.checkpoint.matryoshka == (128, 64, 32)
    for task in TASKS:
        prompt = engine.checkpoint.prompts[task]
        ids = [tokens.ids for tokens in engine.tokenizer.encode([prompt + line for line in lines], max_length=8192)]
        assert np.array_equal(engine.encode(lines, task=task), engine.encode(ids, task=task))
        assert not np.array_equal(engine.encode(ids), engine.encode(ids, task=task))
    own = engine.encode(lines, task="separation", prompt=PROMPTS["retrieval.query"])
    ids = engine.tokenizer.encode([PROMPTS["retrieval.query"] + line for line in lines], max_length=8192)
    assert np.array_equal(own, engine.encode([tokens.ids for tokens in ids], task="separation"))
    cut = engine.encode(lines, task="separation", dimensions=32)
    whole = engine.encode(lines, task="separation")[:, :32]
    np.testing.assert_allclose(cut, whole / np.linalg.norm(whole, axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(OptionError, match=r"task is unknown: 'search_query'; .* has retrieval.query, "):
        engine.encode(lines, task="search_query")


def test_custom_code_without_adapters_raises(tmp_path, model):
    folder = write_checkpoint(tmp_path, PLAIN, published_names(model.state_dict()))
    add_sentence_transformers_files(folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "custom_st.Transformer"
    write_json(folder / "modules.json", modules)
    with pytest.raises(ConfigError, match=r"modules.json = 'custom_st.Transformer' is not implemented"):
        open_checkpoint(folder)


def test_cuda_agrees(folder, cuda):
    assert_cuda_agrees(folder, cuda)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_is_independent_of_its_batch(folder, dtype):
    assert_independent(folder, dtype)
    engine = unpadded.load(folder, device="cpu", dtype=dtype)
    texts = random_ids((1, 3, 40, 65, 130))
    together = engine.encode(texts, task="separation")
    assert np.array_equal(np.concatenate([engine.encode([text], task="separation") for text in texts]), together)


def test_missing_adapters_are_listed(model, tmp_path):
    with pytest.raises(WeightsError, match=r"missing: encoder.layers.0.mixer.Wqkv.parametrizations.weight.0.lora_A"):
        unpadded.load(write_checkpoint(tmp_path, SMALL, published_names(model.state_dict())), device="cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("position_embedding_type", "absolute"),
        ("load_trained_adapters", False),
        ("truncate_dim", 256),
        ("emb_pooler", "mean"),
        ("rope_parameters.rope_type", "yarn"),
    ],
)
def test_unsupported_settings_raise(key, value):
    outer, _, inner = key.partition(".")
    with pytest.raises(ConfigError, match=f"{key} = .* is not implemented"):
        jina_v3.read_config(JINA_V3 | {outer: {inner: value} if inner else value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_adaptations": []}, r"lora_adaptations = \[\] is not a list"),
        ({"lora_rank": None}, "lacks lora_rank"),
        ({"rotary_emb_base": None}, "lacks rotary_emb_base"),
        ({"rope_theta": 10000.0}, r"rotary_emb_base = 20000.0 but rope_theta = 10000.0"),
    ],
)
def test_contradictory_settings_raise(changes, message):
    with pytest.raises(ConfigError, match=message):
        jina_v3.read_config(JINA_V3 | changes)


def test_sentence_transformers_arguments_select_the_adapter(folder, minilm):
    lines = ["What is a tide?", "How is bread made?"]
    write_tokenizer(folder, (minilm / "README.md").read_text().splitlines())
    add_sentence_transformers_files(folder, prompts=PROMPTS)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0] |= {"type": "custom_st.Transformer", "kwargs": ["task"]}
    write_json(folder / "modules.json", modules)
    engine = unpadded.load(folder, device="cpu")
    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    for options in ({}, {"task": "separation"}, {"task": "retrieval.query", "prompt_name": "retrieval.query"}):
        expected = engine.encode(lines, task=options.get("task"))
        np.testing.assert_allclose(model.encode(lines, **options), expected, atol=1e-6)
        rows = model.encode(lines, output_value="token_embeddings", **options)
        for row, hidden in zip(rows, engine.token_embeddings(lines, task=options.get("task")), strict=True):
            np.testing.assert_allclose(row, hidden, atol=1e-5)
    with pytest.raises(OptionError, match=r"task is unknown: 'clustering'; use one of retrieval.query, "):
        model.encode(lines, task="clustering")
    with pytest.raises(OptionError, match=r"task = 'separation' .*omit output_value"):
        model.encode(lines, task="separation", output_value=None)


def test_langchain_and_mteb_select_the_adapter(folder, minilm):
    pytest.importorskip("langchain_core")
    pytest.importorskip("mteb")
    from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask
    from mteb.mocks.mock_tasks.sts import MockSTSTask
    from mteb.types import PromptType

    from unpadded.integrations.langchain import UnpaddedEmbeddings
    from unpadded.integrations.mteb import UnpaddedEncoder

    lines = ["What is a tide?", "How is bread made?"]
    write_tokenizer(folder, (minilm / "README.md").read_text().splitlines())
    engine = unpadded.load(folder, device="cpu")
    embeddings = UnpaddedEmbeddings(engine)
    assert embeddings.embed_query(lines[0]) == engine.encode(lines[0], task="retrieval.query").tolist()
    assert embeddings.embed_documents(lines) == engine.encode(lines, task="retrieval.passage").tolist()
    for task, side, expected in (
        (MockRetrievalTask, PromptType.query, "retrieval.query"),
        (MockRetrievalTask, PromptType.document, "retrieval.passage"),
        (MockSTSTask, None, "text-matching"),
    ):
        vectors = UnpaddedEncoder(engine).encode(
            [{"text": lines}], task_metadata=task.metadata, hf_split="test", hf_subset="", prompt_type=side
        )
        assert np.array_equal(vectors, engine.encode(lines, task=expected))


def test_captured_graphs_use_the_adapter_of_the_task(folder, cuda):
    """One captured graph is used for all adapters, whose weights are written where the graph reads them."""
    texts = random_ids((3, 40, 65) if HAS_CUDA else (3, 5))
    alone = {
        task: unpadded.load(folder, device=cuda, dtype="float32").encode(texts, task=task) for task in (None, *TASKS)
    }
    engine = unpadded.load(folder, device=cuda, dtype="float32")
    expected = unpadded.load(folder, device="cpu")
    for index in np.random.default_rng(0).permutation(18 if HAS_CUDA else 6):
        task = (None, *TASKS)[index % 6]
        found = engine.encode(texts, task=task)
        assert np.array_equal(found, alone[task])
        assert relative_error(found, expected.encode(texts, task=task)) <= 1e-5
