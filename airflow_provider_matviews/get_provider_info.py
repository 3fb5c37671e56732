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
        "cli": ["airflow_provider_matviews.cli.definition.get_matviews_commands"],
        "extra-links": ["airflow_provider_matviews.links.matview.MatViewRunLink"],
        "plugins": [
            {
                "name": "matviews",
                "plugin-class": "airflow_provider_matviews.plugins.matviews.MatViewsPlugin",
            }
        ],
        "config": {
            "matviews": {
                "description": "The page that shows materialized views and their runs.",
                "options": {
                    "connections": {
                        "description": "The connections whose views are shown to those who may read them, with commas "
                        "between: ids, or id=tracking_schema where that is not ``matviews``. None are shown where this "
                        "is empty.",
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "warehouse, finance=matviews_finance",
                        "default": "",
                    },
                    "actions": {
                        "description": "The DAG that the page triggers to refresh, verify or mend a view, made by "
                        "``matview_actions()``; or one for each connection: id=dag_id, with commas between. Where this "
                        "is empty the page offers nothing of the kind.",
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "matviews_actions, finance=finance_actions",
                        "default": "",
                    },
                },
            }
        },
        "notifications": ["airflow_provider_matviews.notifications.matview.MatViewNotifier"],
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
