"""The service layer: what is done to a materialized view. Knows PostgreSQL, and nothing of Airflow."""
