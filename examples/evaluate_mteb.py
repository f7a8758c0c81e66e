"""Evaluate a model on your own questions and passages with mteb.

pip install '.[mteb]'
python examples/evaluate_mteb.py bench/demo.json
"""

import json
import sys
from pathlib import Path

import mteb
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

import unpadded
from unpadded.integrations.mteb import UnpaddedEncoder

labelled = json.loads(Path(sys.argv[1]).read_text())  # the passage that answers a question has its index


class OwnTask(AbsTaskRetrieval):
    metadata = mteb.TaskMetadata(
        name="OwnTask", description="Own data", type="Retrieval", dataset={"path": "-", "revision": "-"},
        category="t2t", modalities=["text"], eval_langs=["eng-Latn"], main_score="ndcg_at_10",
    )  # fmt: skip

    def load_data(self, **_):
        queries = Dataset.from_list([{"id": f"q{i}", "text": text} for i, text in enumerate(labelled["questions"])])
        corpus = Dataset.from_list([{"id": f"d{i}", "text": text} for i, text in enumerate(labelled["passages"])])
        relevant = {f"q{i}": {f"d{i}": 1} for i in range(len(queries))}
        split = RetrievalSplitData(queries=queries, corpus=corpus, relevant_docs=relevant, top_ranked=None)
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


engine = unpadded.load("sentence-transformers/all-MiniLM-L6-v2")
result = mteb.evaluate(UnpaddedEncoder(engine), OwnTask(), cache=None)
print("ndcg@10", result.task_results[0].scores["test"][0]["ndcg_at_10"])
