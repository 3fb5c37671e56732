"""Whole DAGs, for a DAG file of one line."""
