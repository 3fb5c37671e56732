-- The tables of the Rails gem as the run-tracking document says them, with a history: datetime is a timestamp
-- without time zone, string is varchar, and the times are UTC.
CREATE TABLE public.mat_view_definitions (
    id bigserial PRIMARY KEY,
    name varchar NOT NULL,
    sql text NOT NULL,
    refresh_strategy integer NOT NULL DEFAULT 0,
    unique_index_columns jsonb DEFAULT '[]',
    created_at timestamp(6) NOT NULL DEFAULT now(),
    updated_at timestamp(6) NOT NULL DEFAULT now()
);
CREATE TABLE public.mat_view_runs (
    id bigserial PRIMARY KEY,
    mat_view_definition_id bigint NOT NULL REFERENCES public.mat_view_definitions,
    status integer NOT NULL DEFAULT 1,
    operation integer NOT NULL DEFAULT 0,
    started_at timestamp(6),
    finished_at timestamp(6),
    duration_ms integer,
    error jsonb,
    meta jsonb DEFAULT '{}',
    created_at timestamp(6) NOT NULL,
    updated_at timestamp(6) NOT NULL
);
CREATE INDEX index_mat_view_runs_on_mat_view_definition_id ON public.mat_view_runs (mat_view_definition_id);
INSERT INTO public.mat_view_definitions (name, sql, refresh_strategy, unique_index_columns) VALUES
    ('mv_user_activity', 'SELECT account_id FROM app.payments', 1, '["account_id"]'),
    ('mv_gone', 'SELECT 1 AS one', 2, NULL);
INSERT INTO public.mat_view_runs
    (mat_view_definition_id, status, operation, started_at, finished_at, duration_ms, error, meta, created_at, updated_at)
SELECT definition, status, operation, at, CASE WHEN status <> 1 THEN at + interval '1 second' END,
       duration_ms, error::jsonb, meta::jsonb, at, at
FROM (
    SELECT 1 AS definition, 2 AS status, 1 AS operation, 123 AS duration_ms, NULL AS error,
           '{"row_count_before": 10, "row_count_after": 12, "request": {"view": "mv_user_activity"}, '
           '"response": {"strategy": "concurrent", "sql": ["REFRESH"]}}' AS meta, n
    FROM generate_series(1, 40) n
    UNION ALL SELECT 1, 2, 0, 210, NULL, '{"row_count_after": -1}', 41
    UNION ALL SELECT 1, 3, 1, 95,
           '{"class": "PG::UniqueViolation", "message": "duplicate key", "backtrace": ["a", "b"]}', '{}', 42
    UNION ALL SELECT 1, 3, 1, 95, NULL, 'null', 43
    UNION ALL SELECT 1, 1, 1, NULL, NULL, NULL, 44
    UNION ALL SELECT 2, 2, 2, 12, NULL, '{}', 45
) AS history
CROSS JOIN LATERAL (SELECT timestamp '2026-01-31 12:00' - n * interval '1 hour' AS at) AS moment;
