"""Published values of real checkpoints: pytest --checkpoints DIR

DIR contains one folder per checkpoint, named owner/name or owner--name, or is the hub's cache. Tests of checkpoints
that it lacks are skipped. all-MiniLM-L6-v2 is always present.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.checkpoints import checkpoint_folder, write_bert
from support.family_checks import relative_error

import unpadded

MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"

# sentence-transformers, tests/sentence_transformer/test_pretrained.py: cosines in bfloat16, with a tolerance of 1%
QUERY = "Which planet is known as the Red Planet?"
DOCUMENTS = [
    "Venus is often called Earth's twin because of its similar size and proximity.",
    "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
    "Jupiter, the largest planet in our solar system, has a prominent red spot.",
    "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
]
SIMILARITIES = {
    "Alibaba-NLP/gte-base-en-v1.5": [0.52453, 0.78257, 0.52955, 0.63619],
    "Alibaba-NLP/gte-large-en-v1.5": [0.63957, 0.87339, 0.67198, 0.77102],
    "Alibaba-NLP/gte-multilingual-base": [0.63415, 0.92388, 0.78641, 0.74917],
    "BAAI/bge-base-en-v1.5": [0.56749, 0.85499, 0.73467, 0.69584],
    "BAAI/bge-large-en-v1.5": [0.53033, 0.81206, 0.68978, 0.71022],
    "BAAI/bge-m3": [0.41025, 0.71249, 0.64761, 0.65188],
    "BAAI/bge-small-en-v1.5": [0.60191, 0.82845, 0.7786, 0.70781],
    "Snowflake/snowflake-arctic-embed-l-v2.0": [0.33766, 0.70938, 0.553, 0.59806],
    "Snowflake/snowflake-arctic-embed-m": [0.2949, 0.4604, 0.37613, 0.3753],
    "ibm-granite/granite-embedding-english-r2": [0.79434, 0.92277, 0.87005, 0.90737],
    "intfloat/e5-base-v2": [0.79746, 0.90085, 0.84888, 0.86544],
    "intfloat/e5-large-v2": [0.77316, 0.85875, 0.83273, 0.84018],
    "intfloat/multilingual-e5-base": [0.79167, 0.87705, 0.85579, 0.86696],
    "intfloat/multilingual-e5-large": [0.76818, 0.87194, 0.82893, 0.83167],
    "intfloat/multilingual-e5-small": [0.81157, 0.90596, 0.87089, 0.85667],
    "jinaai/jina-embeddings-v2-base-de": [0.3855, 0.76282, 0.68416, 0.6388],
    "jinaai/jina-embeddings-v2-small-en": [0.76057, 0.91291, 0.88755, 0.85267],
    "lightonai/modernbert-embed-large": [0.7193, 0.88344, 0.79344, 0.84227],
    "mixedbread-ai/mxbai-embed-large-v1": [0.5803, 0.81596, 0.72407, 0.73394],
    "nomic-ai/modernbert-embed-base": [0.66362, 0.84367, 0.7503, 0.79034],
    "nomic-ai/nomic-embed-text-v1": [0.52828, 0.83103, 0.69433, 0.74755],
    "nomic-ai/nomic-embed-text-v1.5": [0.65182, 0.88804, 0.79979, 0.81292],
    "nomic-ai/nomic-embed-text-v2-moe": [0.32802, 0.75375, 0.59861, 0.69786],
    MINILM_ID: [0.46371, 0.81205, 0.72828, 0.75051],
    "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2": [0.45345, 0.72518, 0.63576, 0.66493],
    "thenlper/gte-base": [0.8318, 0.93046, 0.88728, 0.89532],
    "thenlper/gte-large": [0.81096, 0.93641, 0.88447, 0.89547],
}

# text-embeddings-inference, backends/candle/tests/snapshots: vectors of "What is Deep Learning?" without a prompt, fp32
# and not normalized. Its GELU is an approximation, which changes values by 0.1%.
POOLED = {
    "Alibaba-NLP/gte-base-en-v1.5": [0.4415129, 0.61066884, 0.06948684, -0.59306145, 0.8815817, -0.10978132],
    "Alibaba-NLP/gte-multilingual-base": [0.016608043, -0.5738141, -1.2647005, 0.1143095, 1.1395286, -1.6311411],
    "Snowflake/snowflake-arctic-embed-m-v2.0": [1.7535613, 0.79910284, -1.1066751, -0.33090124, 1.0041298, -0.790565],
    "answerdotai/ModernBERT-base": [0.34931707, -0.51038086, -0.33732572, -0.14398514, 0.42293617, 0.08094036],
    "jinaai/jina-embeddings-v2-small-en": [-0.7366036, -0.34022003, -0.0716392, 0.108484305, 0.14210966, -0.4099645],
    "nomic-ai/nomic-embed-text-v1.5": [0.27285635, 0.94036365, -2.5491776, -2.0234516, 1.4199733, 0.8992536],
    "nomic-ai/nomic-embed-text-v2-moe": [-0.7703948, 0.06603849, -0.74816215, -0.13090475, 0.047573686, -0.7196515],
    MINILM_ID: [-0.59059864, -0.25252345, 0.14972475, 0.05487579, -0.11783009, -0.16678402],
}
EXACT = {"nomic-ai/nomic-embed-text-v1.5"}  # has no GELU

# transformers, tests/models: (text or token ids, rows and columns of the last hidden state, their values in fp32)
Span = tuple[slice, slice]
INNER: Span = (slice(1, 4), slice(1, 4))
FIRST: Span = (slice(0, 3), slice(0, 3))
LAST_COLUMN: Span = (slice(None), slice(-1, None))
PLANTS = "Plants create oxygen."
DOG = [0, 581, 10269, 83, 99942, 136, 60742, 23, 70, 80583, 18276, 2]
STATES: dict[str, tuple[str | list[int], Span, list[list[float]]]] = {
    "EuroBERT/EuroBERT-210m": (
        "Hello World!",
        FIRST,
        [[1.2437, 1.8956, 50.9435], [-4.5560, -0.1686, -1.2776], [1.6557, 1.9383, 50.1393]],
    ),
    "FacebookAI/xlm-roberta-base": (
        DOG,
        LAST_COLUMN,
        [
            [x]
            for x in (-0.0101, 0.1218, -0.0803, 0.0801, 0.1327, 0.0776, -0.1215, 0.2383, 0.3338, 0.3106, 0.03, 0.0252)
        ],
    ),
    "Snowflake/snowflake-arctic-embed-m-v2.0": (
        PLANTS,
        INNER,
        [[1.2827, 0.5775, -0.4335], [1.3125, 0.2771, -0.4684], [1.4864, 0.1338, -0.3023]],
    ),
    "alibaba-nlp-community/gte-base-en-v1.5": (
        PLANTS,
        INNER,
        [[-0.0137, -0.4422, 0.5301], [-0.2834, 0.4779, 0.6164], [-0.2570, 0.3076, 0.7647]],
    ),
    "alibaba-nlp-community/gte-multilingual-base": (
        PLANTS,
        INNER,
        [[0.2660, -0.2507, 0.3888], [0.5936, -0.4777, 0.5725], [0.5867, -0.4302, 0.5467]],
    ),
    "nomic-ai/nomic-embed-text-v1.5": (
        PLANTS,
        INNER,
        [[1.7039, -4.5610, 1.5236], [1.8685, -3.6936, 1.6641], [0.53303, -4.2081, 2.3375]],
    ),
}
# the same for jina-embeddings-v3, by task; without the first token of the ids there, which is masked
JINA_IDS = [345, 232, 328, 740, 140, 1695, 69, 6078, 1588, 2]
JINA_STATES = {
    None: [[-2.1561, 1.8075, -0.1943], [-2.0813, 1.9855, -0.2760], [-2.1181, 2.0043, -0.1322]],
    "retrieval.query": [[-1.5202, 2.4074, -0.9706], [-1.5279, 2.4025, -1.1237], [-1.5252, 2.6143, -0.9416]],
    "retrieval.passage": [[-1.0778, 1.8124, -0.8223], [-1.3796, 1.8108, -0.9868], [-1.1073, 1.9459, -0.8104]],
    "separation": [[-2.3134, 1.9034, 0.1885], [-2.1804, 1.9923, 0.1184], [-2.2325, 2.0251, 0.2533]],
    "classification": [[-1.9793, 2.2602, -0.17995], [-1.8780, 2.2660, -0.21822], [-1.9202, 2.4457, -0.00022832]],
    "text-matching": [[-1.6952, 1.8568, -0.2258], [-1.6239, 1.9056, -0.2681], [-1.5218, 1.8185, 0.0062]],
}


def prompt_of(engine: unpadded.Engine, *names: str) -> str:
    """Return the prompt that encode_query and encode_document of sentence-transformers use: the first of these names.

    They use only prompts that a file states.
    """
    is_default = any("prompts=" in default for default in engine.checkpoint.defaults)
    prompts = {} if is_default else engine.checkpoint.prompts
    return next((prompts[name] for name in names if name in prompts), "")


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarities(checkpoint, name):
    engine = unpadded.load(checkpoint(name), device="cpu")
    query = engine.encode(QUERY, prompt=prompt_of(engine, "query"), normalize=True)
    documents = engine.encode(DOCUMENTS, prompt=prompt_of(engine, "document", "passage", "corpus"), normalize=True)
    np.testing.assert_allclose(documents @ query, SIMILARITIES[name], rtol=0.01)


@pytest.mark.parametrize("name", POOLED)
def test_pooled_vectors(checkpoint, name):
    engine = unpadded.load(checkpoint(name), device="cpu")
    expected = np.array(POOLED[name])
    found = engine.encode("What is Deep Learning?", prompt="", normalize=False)[: len(expected)]
    assert relative_error(found, expected) <= (1e-4 if name in EXACT else 5e-3)


@pytest.mark.parametrize("name", STATES)
def test_hidden_states(checkpoint, name):
    text, span, expected = STATES[name]
    (hidden,) = unpadded.load(checkpoint(name), device="cpu").token_embeddings([text], prompt="")
    np.testing.assert_allclose(hidden[span], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("task", JINA_STATES)
def test_hidden_states_of_a_task(checkpoint, task):
    engine = unpadded.load(checkpoint("jinaai/jina-embeddings-v3"), device="cpu")
    (hidden,) = engine.token_embeddings([JINA_IDS], task=task)
    np.testing.assert_allclose(hidden[:3, 1:4], JINA_STATES[task], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["owner/name", "owner--name", "models--owner--name/snapshots/0123"])
def test_a_checkpoint_is_found_in_every_layout(tmp_path, layout):
    assert checkpoint_folder(tmp_path, "owner/name") is None
    write_bert(tmp_path / layout, vocabulary=64, tokenizer=False)
    assert checkpoint_folder(tmp_path, "owner/name") == tmp_path / layout
    assert checkpoint_folder(tmp_path, "owner/other") is None


def test_a_test_without_its_checkpoint_is_skipped(checkpoint):
    with pytest.raises(pytest.skip.Exception, match=r"owner/absent is not in .*; pass --checkpoints DIR"):
        checkpoint("owner/absent")
