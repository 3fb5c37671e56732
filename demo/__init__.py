"""The demo: a PostgreSQL server from a wheel, example data, and a real Airflow that runs the example DAGs."""
