"""The engine behind the interfaces of other libraries."""
