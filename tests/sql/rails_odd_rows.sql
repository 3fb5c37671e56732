-- What may stand in the gem's tables beside what the gem writes: after rails_tables.sql.
ALTER TABLE public.mat_view_definitions
    ALTER name DROP NOT NULL, ALTER sql DROP NOT NULL, ALTER refresh_strategy DROP NOT NULL;
ALTER TABLE public.mat_view_runs
    ALTER status DROP NOT NULL, ALTER operation DROP NOT NULL,
    ALTER created_at DROP NOT NULL, ALTER updated_at DROP NOT NULL;
INSERT INTO public.mat_view_definitions (id, name, sql, refresh_strategy, unique_index_columns) VALUES
    (100, 'mv_null_columns', 'SELECT 1 AS one', 1, 'null'),
    (101, 'mv_text_columns', 'SELECT 1 AS one', 9, '"one"'),
    (102, 'mv_mixed_columns', NULL, NULL, '["one", 2, null, {"a": 1}]'),
    (103, 'mv_object_columns', '', -1, '{"one": true}'),
    (104, 'Odd "name", with.dot', 'SELECT 1 AS one', 0, '[]'),
    (105, 'mv_gone', 'SELECT 2 AS two', 2, '[]'),
    (106, NULL, 'SELECT 1 AS one', 0, '[]'),
    (107, '', 'SELECT 1 AS one', 0, '[]'),
    (108, repeat('long', 16), 'SELECT 1 AS one', 0, '[]');
INSERT INTO public.mat_view_runs
    (id, mat_view_definition_id, status, operation, error, meta, started_at, created_at, updated_at)
SELECT id, definition, status, operation, error::jsonb, meta::jsonb,
       CASE WHEN times <> 'none' THEN timestamp '2026-02-01' END,
       CASE WHEN times = 'all' THEN timestamp '2026-02-01' END,
       CASE WHEN times = 'all' THEN timestamp '2026-02-01' END
FROM (VALUES
    -- Not carried over: numbers that nothing is known of, names that no view can have, no time at all.
    (1000, 1, 0, 1, NULL, '{}', 'all'),
    (1001, 1, 4, 1, NULL, '{}', 'all'),
    (1002, 1, NULL, 1, NULL, '{}', 'all'),
    (1003, 1, 2, 3, NULL, '{}', 'all'),
    (1004, 1, 2, NULL, NULL, '{}', 'all'),
    (1005, 106, 2, 1, NULL, '{}', 'all'),
    (1006, 107, 2, 1, NULL, '{}', 'all'),
    (1007, 108, 2, 1, NULL, '{}', 'all'),
    (1008, 1, 2, 1, NULL, '{}', 'none'),
    -- Carried over.
    (2000, 100, 2, 1, NULL, '"said"', 'all'),
    (2001, 100, 2, 1, NULL, '[]', 'all'),
    (2002, 100, 2, 1, NULL, '[{"mat_views_run_id": 1}]', 'all'),
    (2003, 100, 2, 1, NULL, NULL, 'all'),
    (2004, 100, 2, 1, NULL, '7', 'all'),
    (2005, 100, 2, 1, NULL, '{"row_count_before": "abc", "row_count_after": 1.5}', 'all'),
    (2006, 100, 2, 1, NULL, '{"row_count_before": "12", "row_count_after": "99999999999999999999"}', 'all'),
    (2007, 100, 2, 1, NULL, '{"row_count_before": {}, "response": {"row_count_after": 8, "strategy": "swap"}}', 'all'),
    (2008, 100, 2, 1, NULL, '{"response": "all is well", "request": [1], "strategy": "by hand"}', 'all'),
    (2009, 100, 2, 1, NULL, '{"response": null, "map_index": "a", "try_number": "b", "pg_cron": 1, "deferral": 2}', 'all'),
    (2010, 100, 2, 1, NULL, '{}', 'started'),
    (2011, 101, 3, 1, '{"message": "boom"}', '{}', 'all'),
    (2012, 101, 3, 1, '"boom"', '{}', 'all'),
    (2013, 101, 3, 1, '{"class": null, "message": null, "backtrace": null}', '{}', 'all'),
    (2014, 101, 3, 1, '["boom"]', NULL, 'all'),
    (2015, 101, 3, 1, '{}', '{}', 'all'),
    (2016, 102, 1, 0, '{"message": "not yet"}', '{}', 'started'),
    (2017, 103, 2, 2, '{"message": "and yet it went well"}', '{}', 'all'),
    (2018, 104, 2, 1, NULL, '{}', 'all'),
    (2019, 105, 2, 1, NULL, '{}', 'all')
) AS odd (id, definition, status, operation, error, meta, times);
