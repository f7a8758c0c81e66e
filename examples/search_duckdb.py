"""Search with SQL: `unpadded embed` writes Parquet, DuckDB reads it.

pip install duckdb
unpadded embed notes.jsonl -m sentence-transformers/all-MiniLM-L6-v2 --carry text,year -o vectors/
python examples/search_duckdb.py 'vectors/*.parquet' "What is a tide?"
"""

import sys

import duckdb

import unpadded

files, question = sys.argv[1:]
engine = unpadded.load("sentence-transformers/all-MiniLM-L6-v2")
kind = f"FLOAT[{engine.dimensions}]"

rows = duckdb.execute(
    f"""
    SELECT array_inner_product(embedding::{kind}, ?::{kind}) AS score, year, text
    FROM read_parquet(?) WHERE year::INT >= 2000 ORDER BY score DESC LIMIT 3
    """,
    [engine.encode(question, output="list"), files],
).fetchall()
for score, year, text in rows:
    print(f"{score:.3f}  {year}  {text}")
