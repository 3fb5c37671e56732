"""Run PostgreSQL materialized views from Apache Airflow.

This module must not import Airflow: it is read while Airflow's own configuration is still loading.
"""

from __future__ import annotations

__version__ = "0.1.0"
