"""The snippets of nomic's model cards; only the marked lines differ from the cards.

pip install '.[sentence-transformers]'
python examples/model_card.py
"""

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from unpadded import embed  # was: from nomic import embed
from unpadded.integrations.sentence_transformers import SentenceTransformer  # was: from sentence_transformers import
from unpadded.integrations.transformers import UnpaddedModel as AutoModel  # was: from transformers import AutoModel

NAME = "nomic-ai/nomic-embed-text-v1-unsupervised"
sentences = ["search_query: What is TSNE?", "search_query: Who is Laurens van der Maaten?"]

# sentence-transformers
first = torch.from_numpy(SentenceTransformer(NAME, trust_remote_code=True).encode(sentences))


# transformers, up to 8192 tokens
def mean_pooling(model_output, attention_mask):
    mask = attention_mask.unsqueeze(-1).expand(model_output[0].size()).float()
    return torch.sum(model_output[0] * mask, 1) / torch.clamp(mask.sum(1), min=1e-9)


tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased", model_max_length=8192)
model = AutoModel.from_pretrained(NAME, trust_remote_code=True, rotary_scaling_factor=2)
inputs = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    second = F.normalize(mean_pooling(model(**inputs), inputs["attention_mask"]), p=2, dim=1)

# nomic's client
texts = [text.removeprefix("search_query: ") for text in sentences]
third = torch.tensor(embed.text(texts=texts, model=NAME, task_type="search_query")["embeddings"])

print([f"{F.cosine_similarity(other, second).min():.4f}" for other in (first, third)])
