"""What Airflow is told about this provider. Must not import Airflow: it runs while Airflow loads."""

from __future__ import annotations

from typing import Any

from airflow_provider_matviews import __version__


def get_provider_info() -> dict[str, Any]:
    """Return the provider's description, as Airflow's ``provider_info.schema.json`` defines it."""
    return {
        "package-name": "airflow-provider-matviews",
        "name": "Materialized Views",
        "description": "Create, refresh and drop PostgreSQL materialized views, and record every run.",
        "versions": [__version__],
        "integrations": [
            {
                "integration-name": "PostgreSQL materialized views",
                "external-doc-url": "https://www.postgresql.org/docs/current/rules-materializedviews.html",
                "tags": ["software"],
            }
        ],
        "hooks": [
            {
                "integration-name": "PostgreSQL materialized views",
                "python-modules": ["airflow_provider_matviews.hooks.matview"],
            }
        ],
        "operators": [
            {
                "integration-name": "PostgreSQL materialized views",
                "python-modules": [
                    "airflow_provider_matviews.operators.matview",
                    "airflow_provider_matviews.operators.pg_cron",
                ],
            }
        ],
        "sensors": [
            {
                "integration-name": "PostgreSQL materialized views",
                "python-modules": ["airflow_provider_matviews.sensors.matview"],
            }
        ],
        "triggers": [
            {
                "integration-name": "PostgreSQL materialized views",
                "python-modules": [
                    "airflow_provider_matviews.triggers.matview",
                    "airflow_provider_matviews.triggers.changes",
                    "airflow_provider_matviews.triggers.metrics",
                ],
            }
        ],
    }
