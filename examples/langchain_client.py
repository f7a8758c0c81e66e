"""LangChain with `unpadded serve`.

pip install langchain-openai
unpadded serve nomic-ai/nomic-embed-text-v1.5 --alias text-embedding-3-small --default-task search_document
python examples/langchain_client.py http://127.0.0.1:8080/v1
"""

import sys

from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings

embeddings = OpenAIEmbeddings(
    base_url=sys.argv[1],
    api_key="-",
    model="text-embedding-3-small",
    check_embedding_ctx_length=False,  # send texts; otherwise LangChain sends token ids of OpenAI's vocabulary
)
store = InMemoryVectorStore.from_texts(["The tide is high.", "Bread is made of flour."], embeddings)
for document, score in store.similarity_search_with_score("sea level", k=2):
    print(f"{score:.3f}  {document.page_content}")
