"""What the page asks for: refresh a view, verify it, or make it what it was declared to be.

Its id stands in Airflow's configuration: `[matviews] actions = matviews_actions`. Who may trigger it may act.
"""

from __future__ import annotations

from datetime import timedelta

from airflow_provider_matviews.dags.actions import matview_actions

dag = matview_actions(default_args={"execution_timeout": timedelta(minutes=30)})
