"""What turns one picture of a view into another, as statements on a relation that stands. Pure: reads no catalog.

A view that is built anew is altered from a bare one; one that stands, from what it is.
"""

from __future__ import annotations

from airflow_provider_matviews.services.alterations.base import Relation, text
from airflow_provider_matviews.services.alterations.indexes import body_of, build_index, dress_index, indexes
from airflow_provider_matviews.services.alterations.privileges import privileges
from airflow_provider_matviews.services.alterations.settings import bare, settings
from airflow_provider_matviews.services.alterations.statistics import make_statistics, statistics, statistics_body

__all__ = [
    "Relation",
    "bare",
    "body_of",
    "build_index",
    "dress_index",
    "indexes",
    "make_statistics",
    "privileges",
    "settings",
    "statistics",
    "statistics_body",
    "text",
]
