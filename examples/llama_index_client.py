"""LlamaIndex with `unpadded serve`.

pip install llama-index-embeddings-openai-like
unpadded serve nomic-ai/nomic-embed-text-v1.5 --alias text-embedding-3-small --default-task search_document
python examples/llama_index_client.py http://127.0.0.1:8080/v1
"""

import sys

from llama_index.core import Document, VectorStoreIndex
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

embed_model = OpenAILikeEmbedding(model_name="text-embedding-3-small", api_base=sys.argv[1], api_key="-")
documents = [Document(text="The tide is high."), Document(text="Bread is made of flour.")]
index = VectorStoreIndex.from_documents(documents, embed_model=embed_model)
for found in index.as_retriever(similarity_top_k=2).retrieve("sea level"):
    print(f"{found.score:.3f}  {found.text}")
